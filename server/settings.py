"""Settings of the HTTP server."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, IPvAnyNetwork, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from engine.logs import FormatName, LevelName, LogSettings

from .keys import RULE, is_key, read_key_file


class ServerSettings(BaseSettings):
    """From arguments, else from the environment (`FASTBLT_PORT=8080`), else the default. Lists are comma-separated in
    the environment."""

    model_config = SettingsConfigDict(env_prefix="FASTBLT_", frozen=True, extra="forbid", hide_input_in_errors=True)

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes any free one.")
    ssl_certfile: Path | None = Field(
        None, description="File with the certificate chain (PEM) to serve HTTPS with; needs --ssl-keyfile."
    )
    ssl_keyfile: Path | None = Field(None, description="File with the certificate's private key (PEM), not encrypted.")
    ssl_ca_certs: Path | None = Field(
        None,
        description="File with CA certificates (PEM): clients must then present a certificate signed by one of them.",
    )
    trusted_proxies: Annotated[list[IPvAnyNetwork], NoDecode] = Field(
        [],
        description="Addresses or networks of proxies whose X-Forwarded-For header names the client; by default none.",
    )
    served_model_name: Annotated[list[str], NoDecode] = Field(
        [], description="Names under which the model is offered; by default the checkpoint's own name."
    )
    api_keys: Annotated[list[SecretStr], NoDecode] = Field(
        [], description="Keys that clients may send as 'Authorization: Bearer KEY'; without any, the server is open."
    )
    api_key_file: Path | None = Field(
        None, description="File with further API keys, one per line; lines that begin with '#' are comments."
    )
    admin_key_file: Path | None = Field(
        None,
        description="File with keys for the routes under /admin, one per line; by default there are no such routes.",
    )
    max_queue: int = Field(
        256, ge=1, description="Most sequences that may wait for their first byte; further requests get 429."
    )
    max_requests_per_key: int | None = Field(
        None,
        ge=1,
        description="Most completion requests of one API key at once, or of all clients of an open server; "
        "by default no limit.",
    )
    max_queued_bytes_per_key: int | None = Field(
        None,
        ge=1,
        description="Most bytes of prompts of one API key that wait for their first byte; by default no limit.",
    )
    max_bytes_per_second_per_key: int | None = Field(
        None,
        ge=1,
        description="Bytes that one API key may generate per second, on average over more than 10 s; "
        "by default no limit.",
    )
    max_choices: int = Field(
        128, ge=1, description="Most sequences of one request: number of prompts times the larger of n and best_of."
    )
    max_tokens_limit: int | None = Field(
        None, ge=0, description="Largest max_tokens of a request; by default only the model's length limits it."
    )
    max_scores: int = Field(
        1 << 19,
        ge=1,
        description="Most log-probabilities in one answer: scored bytes times choices times (logprobs + 1); also most "
        "entropies, and most ids.",
    )
    max_body_bytes: int = Field(4 << 20, ge=1024, description="Largest request body in bytes; larger ones get 413.")
    max_header_bytes: int = Field(
        64 << 10,
        ge=1024,
        description="Most bytes in the head of a request (names, values and URL); larger ones get 431.",
    )
    max_headers: int = Field(100, ge=1, description="Most headers of a request; requests with more get 431.")
    max_connections: int = Field(
        4096, ge=1, description="Most open connections; fewer where the limit of open files (ulimit -n) is lower."
    )
    max_connections_per_address: int = Field(
        1024, ge=1, description="Most open connections from one address, except from trusted proxies."
    )
    head_timeout: float = Field(10.0, gt=0, description="Seconds that the head of a request may take to arrive.")
    request_timeout: float = Field(
        60.0, gt=0, description="Seconds that a whole request, head and body, may take to arrive."
    )
    idle_timeout: float = Field(
        120.0, gt=0, description="Seconds that a connection may wait for its next request before it is closed."
    )
    write_timeout: float = Field(
        60.0,
        gt=0,
        description="Seconds in which a client must read the next 64 KiB of a waiting answer, "
        "or all of a shorter rest.",
    )
    default_timeout: float | None = Field(
        None,
        gt=0,
        description="Seconds after which a request without a timeout of its own ends, with finish_reason 'length' and "
        "stop_reason 'timeout'; by default none.",
    )
    retry_after: int = Field(1, ge=1, description="Seconds in the Retry-After header of 429 and 503 responses.")
    keepalive_seconds: float = Field(
        15.0,
        gt=0,
        description="Seconds of silence in a stream after which an empty line is sent, so that proxies keep it open.",
    )
    drain_seconds: float = Field(
        30.0, ge=0, description="Seconds that running requests get to finish after SIGTERM or Ctrl-C."
    )
    restart_seconds: float = Field(
        30.0,
        ge=0,
        description="Seconds without a working engine after which new completions are refused and /health/live fails, "
        "while the server goes on trying to start one.",
    )
    loading_seconds: float = Field(
        1800.0, gt=0, description="Seconds that the engine may take to load its model before it is started again."
    )
    cors_origins: Annotated[list[str], NoDecode] = Field(
        [], description="Web origins whose pages may call the API; by default none."
    )
    page: bool = Field(True, description="Serve the live page at /.")
    log_level: LevelName = Field("info", description="Lowest severity to log.")
    log_format: FormatName = Field("human", description="Log lines as text for people, or as one JSON object each.")
    log_content: bool = Field(
        False, description="Also log prompts and completions, shortened. Anyone who can read the log can read them."
    )
    metric_aliases: Literal["none", "vllm"] = Field(
        "none", description="Also export metrics under the names of another server: vllm, or none."
    )
    otlp_endpoint: str | None = Field(
        None,
        description="URL of an OpenTelemetry collector to send traces to, over HTTP; needs the extra 'traces'. "
        "By default OTEL_EXPORTER_OTLP_ENDPOINT; without either, traces are off.",
    )

    @field_validator("served_model_name", "api_keys", "cors_origins", "trusted_proxies", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part for part in map(str.strip, value.split(",")) if part] if isinstance(value, str) else value

    @field_validator("api_keys", mode="before")
    @classmethod
    def _names_a_key(cls, value: object) -> object:
        # An empty variable is more likely a mistake than a decision to open the server.
        if isinstance(value, str) and not value.strip(", "):
            raise ValueError("holds no API key; leave it out to run an open server")
        return value

    @field_validator("api_keys")
    @classmethod
    def _are_keys(cls, keys: list[SecretStr]) -> list[SecretStr]:
        if not all(is_key(key.get_secret_value()) for key in keys):
            raise ValueError(RULE)
        return keys

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_url(cls, url: str | None) -> str | None:
        if url is not None and not url.startswith(("http://", "https://")):
            raise ValueError(f"must be a URL such as http://127.0.0.1:4318, not {url!r}")
        return url

    @field_validator("served_model_name")
    @classmethod
    def _no_alias(cls, names: list[str]) -> list[str]:
        if bad := [name for name in names if ":" in name or not name]:
            raise ValueError(f"a model name must not be empty or hold ':', which sets a decoder apart: {bad[0]!r}")
        return names

    @model_validator(mode="after")
    def _queue_holds_a_request(self) -> "ServerSettings":
        if self.max_choices > self.max_queue:
            rule = f"--max-queue {self.max_queue} must be at least --max-choices {self.max_choices}"
            raise ValueError(f"{rule}: raise --max-queue, or lower --max-choices")
        return self

    @model_validator(mode="after")
    def _certificate_has_its_key(self) -> "ServerSettings":
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("--ssl-certfile and --ssl-keyfile go together")
        if self.ssl_ca_certs and not self.ssl_certfile:
            raise ValueError("--ssl-ca-certs needs --ssl-certfile and --ssl-keyfile")
        return self

    @property
    def logs(self) -> LogSettings:
        """The log settings of both processes."""
        return LogSettings(self.log_level, self.log_format)

    def load_api_keys(self) -> tuple[bytes, ...]:
        """All keys, including the file's, without duplicates. Raises OSError or ValueError like `read_key_file`."""
        keys = [key.get_secret_value() for key in self.api_keys]
        if self.api_key_file:
            keys += read_key_file(self.api_key_file)
        return tuple(dict.fromkeys(key.encode() for key in keys))

    def load_admin_keys(self) -> tuple[bytes, ...]:
        """Those of the file. Raises OSError or ValueError like `read_key_file`."""
        return tuple(key.encode() for key in read_key_file(self.admin_key_file)) if self.admin_key_file else ()
