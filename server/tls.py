"""HTTPS: the context that connections are encrypted with."""

import ssl

from .settings import ServerSettings


def make_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """None without a certificate. Raises ValueError, for the operator, for files that cannot be used."""
    if not settings.ssl_certfile or not settings.ssl_keyfile:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password=_no_password)
    except (OSError, ValueError) as error:
        files = f"--ssl-certfile {settings.ssl_certfile} and --ssl-keyfile {settings.ssl_keyfile}"
        raise ValueError(f"{files}: {_reason(error)}") from None
    if settings.ssl_ca_certs:
        try:
            context.load_verify_locations(settings.ssl_ca_certs)
        except (OSError, ValueError) as error:
            raise ValueError(f"--ssl-ca-certs {settings.ssl_ca_certs}: {_reason(error)}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _no_password() -> str:
    # OpenSSL would prompt on the terminal.
    raise ValueError("the key is encrypted; serve with one that is not")


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "not PEM").replace("_", " ").lower()
        return f"these files do not fit together or are not PEM ({reason})"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
