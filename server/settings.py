"""Every choice of whoever runs the HTTP server, in one typed place."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from engine.logs import FormatName, LevelName, LogSettings


class ServerSettings(BaseSettings):
    """From arguments, else from the environment (`FASTBLT_PORT=8080`), else the default. Lists are comma-separated in
    the environment."""

    model_config = SettingsConfigDict(env_prefix="FASTBLT_", frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes any free one.")
    served_model_name: Annotated[list[str], NoDecode] = Field(
        [], description="Names under which the model is offered; by default the checkpoint's own name."
    )
    api_keys: Annotated[list[SecretStr], NoDecode] = Field(
        [], description="Keys that clients may present as 'Authorization: Bearer KEY'; none means open to all."
    )
    api_key_file: Path | None = Field(None, description="File with further API keys, one a line.")
    max_queue: int = Field(
        256, ge=1, description="Most sequences that may wait for their first byte; beyond it requests get 429."
    )
    max_choices: int = Field(
        128, ge=1, description="Most sequences of one request: number of prompts times the larger of n and best_of."
    )
    max_tokens_limit: int | None = Field(
        None, ge=0, description="Largest max_tokens of a request; by default only the model's length limits it."
    )
    max_body_bytes: int = Field(4 << 20, ge=1024, description="Largest request body in bytes; beyond it 413.")
    body_timeout: float = Field(30.0, gt=0, description="Seconds a client may take to send a request body.")
    default_timeout: float | None = Field(
        None, gt=0, description="Seconds after which a request without a timeout of its own ends; by default none."
    )
    retry_after: int = Field(1, ge=1, description="Seconds in the Retry-After header of 429 and 503 responses.")
    keepalive_seconds: float = Field(
        15.0, gt=0, description="Silence in a stream after which an SSE comment is sent, so that proxies keep it open."
    )
    drain_seconds: float = Field(
        30.0, ge=0, description="Seconds that running requests get to finish after SIGTERM or Ctrl-C."
    )
    cors_origins: Annotated[list[str], NoDecode] = Field(
        [], description="Web origins whose pages may call the API; by default none."
    )
    page: bool = Field(True, description="Serve the live page at /.")
    log_level: LevelName = Field("info", description="Least severity to log.")
    log_format: FormatName = Field("human", description="Log lines for people, or one JSON object each.")
    log_content: bool = Field(
        False, description="Also log prompts and completions, cut short; whoever reads the log reads them."
    )
    otlp_endpoint: str | None = Field(
        None,
        description="URL of an OpenTelemetry collector to send traces to, over HTTP; needs the extra 'traces'. "
        "By default OTEL_EXPORTER_OTLP_ENDPOINT, else none are made.",
    )

    @field_validator("served_model_name", "api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part for part in map(str.strip, value.split(",")) if part] if isinstance(value, str) else value

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
            raise ValueError(f"max_choices {self.max_choices} must not exceed max_queue {self.max_queue}")
        return self

    @property
    def logs(self) -> LogSettings:
        """As both processes take them."""
        return LogSettings(self.log_level, self.log_format)

    def load_api_keys(self) -> tuple[bytes, ...]:
        """All keys, those of the file included. Raises OSError if it cannot be read, ValueError for an empty key."""
        keys = [key.get_secret_value().encode() for key in self.api_keys]
        if self.api_key_file:
            keys += self.api_key_file.read_bytes().split()
            if not keys:
                raise ValueError(f"{self.api_key_file} holds no API key")
        if b"" in keys:
            raise ValueError("an API key must not be empty")
        return tuple(keys)
