"""Errors of the hub, each in one line that says what to do and never contains a token."""

from collections.abc import Iterator
from contextlib import contextmanager

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's in 1.x, httpx2's in 2.x

from .reference import HubError, Reference

TOKEN = "HF_TOKEN or `hf auth login`"


@contextmanager
def explained(reference: Reference) -> Iterator[None]:
    """Turns the library's exceptions into a HubError about `reference`."""
    try:
        yield
    except HubError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise HubError(f"{reference}: {_reason(error, reference)}") from error


def is_offline() -> bool:
    """Whether the user wants no network (HF_HUB_OFFLINE)."""
    return bool(constants.is_offline_mode())


def _reason(error: BaseException, reference: Reference) -> str:
    hub, repository = constants.ENDPOINT, reference.repository
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.DryRunError)) and error.__cause__:
        # The library tried its cache after this error.
        return _reason(error.__cause__, reference)
    if isinstance(error, errors.GatedRepoError):
        page = f"{hub}/{repository}"
        if _token():
            return f"gated, and the token given has no access: accept the licence at {page} with its account"
        return f"gated: accept the licence at {page}, then give a token of that account ({TOKEN})"
    if isinstance(error, errors.RepositoryNotFoundError):
        private = "the token given may not read it" if _token() else f"it is private and needs a token ({TOKEN})"
        return f"no such directory, and no such repository at {hub}, unless {private}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository has no revision {reference.revision or 'main'}; name a branch, a tag or a commit of it"
    if isinstance(error, errors.HFValidationError):
        return f"no such directory, and no name that the hub allows: {_first_line(error)}"
    if isinstance(error, errors.OfflineModeIsEnabled) or is_offline():
        return (
            f"no such directory, and not (wholly) in the cache {constants.HF_HUB_CACHE}; HF_HUB_OFFLINE forbids "
            "downloading it"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(error.response.status_code)
    if isinstance(error, OSError) and error.errno:
        problem = (error.strerror or "").lower()
        return f"cannot write to the cache, {error.filename or constants.HF_HUB_CACHE}: {problem}; HF_HOME moves it"
    return f"no such directory, and cannot be downloaded from {hub}: {_first_line(error)}"


def _refused(status: int) -> str:
    hub = constants.ENDPOINT
    if status == 401:
        return f"{hub} refuses the token given ({TOKEN}): it may be mistyped or expired"
    if status == 403:
        return f"{hub} forbids it: the token given ({TOKEN}) may not read this repository"
    if status == 429:
        return f"{hub} had too many requests from here: wait, or give a token ({TOKEN})"
    return f"{hub} answers with status {status}"


def _token() -> str | None:
    return huggingface_hub.get_token()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    # An error about an invalid header shows the header, and with it the token.
    return lines[0] if lines and "Bearer" not in lines[0] else type(error).__name__
