"""Joining a Ray cluster, with Ray's token where the cluster demands one.

Ray 2.60 closes a cluster with a token as soon as it finds one, and `ray.init` leaves one in the home folder when it
starts a cluster. Yet it sends no token to a given address unless RAY_AUTH_MODE is `token`; it then fails only minutes
later. Nor may it always send one: a driver in token mode refuses the workers of a cluster without a token. So the
cluster is probed first.
"""

import logging
import os

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import AuthenticationTokenLoader, Config
from ray.exceptions import AuthenticationError, RayError

ANSWER_SECONDS = 15.0
"""Seconds for the cluster to answer, even if it has just been started."""
MODE = "RAY_AUTH_MODE"
CLUSTER_CALL = "/ray.rpc.NodeInfoGcsService/CheckAlive"
CLIENT_CALL = "/ray.rpc.RayletDriver/ClusterInfo"
"""Calls that a cluster's head answers at its own address and at that of `ray://`. Both check the token."""
NO_ANSWER = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNIMPLEMENTED)


class JoinError(RuntimeError):
    """No cluster was joined. The message is one line for the operator."""


def join(address: str | None) -> None:
    """`ray.init` in the cluster's own mode, token or none. Raises JoinError."""
    if address in (None, "auto"):
        address = os.environ.get("RAY_ADDRESS") or address
    try:
        if address and "://" in address:
            _agree(address.partition("://")[2], CLIENT_CALL)
        elif found := canonicalize_bootstrap_address(address):
            _agree(found, CLUSTER_CALL)
        ray.init(address, logging_level=logging.WARNING)
    except JoinError:
        raise
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        what = f"cannot join the Ray cluster at {address}" if address else "cannot join or start a Ray cluster"
        # The rest is about the mode, which is not the cause.
        reason = error.message if isinstance(error, AuthenticationError) else str(error)
        raise JoinError(f"{what}: {' '.join(reason.split())}") from error


def _agree(server: str, call: str) -> None:
    """Sets this process to the cluster's mode. Raises JoinError if the environment sets another mode, or if the token
    is not the cluster's."""
    wanted = os.environ.get(MODE, "").lower()
    # Probed without the token, so that a stranger at that address does not learn it.
    _set_mode("disabled")
    if not _refuses(server, call):
        if wanted == "token":
            raise JoinError(
                f"{MODE} is 'token', but the Ray cluster at {server} has no token and lets anyone in: start it with "
                f"{MODE}=token, or unset {MODE} here"
            )
        return
    if wanted not in ("", "token"):
        raise JoinError(
            f"the Ray cluster at {server} demands a token, but {MODE} is {wanted!r}: unset it, or set it to 'token'"
        )
    if not AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
        raise JoinError(
            f"the Ray cluster at {server} demands a token, and there is none here: set RAY_AUTH_TOKEN to what "
            "`ray get-auth-token` prints where the cluster was started, or copy ~/.ray/auth_token from there"
        )
    _set_mode("token")
    if _refuses(server, call):
        raise JoinError(
            f"the Ray cluster at {server} refuses the token that was found in {_source()}: it must be what "
            "`ray get-auth-token` prints where the cluster was started"
        )


def _set_mode(mode: str) -> None:
    os.environ[MODE] = mode
    # Ray reads it when it is imported.
    Config.initialize("")


def _source() -> str:
    """Where Ray finds the token."""
    names = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    return names[0] if names else "~/.ray/auth_token"


def _refuses(server: str, call: str) -> bool:
    """Whether the cluster reports a missing or wrong token. Raises JoinError if there is no cluster."""
    with init_grpc_channel(server, options=GLOBAL_GRPC_OPTIONS) as channel:
        try:
            channel.unary_unary(call)(b"", timeout=ANSWER_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() in NO_ANSWER:
                raise JoinError(
                    f"no Ray cluster answers at {server}: start one there with `ray start --head`, or correct "
                    "--ray-address (by default RAY_ADDRESS)"
                ) from error
            return bool(error.code() == grpc.StatusCode.UNAUTHENTICATED)
    return False
