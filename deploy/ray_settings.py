"""Settings of `deploy.ray_serve`, besides the server's and the engine's."""

from pydantic import Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MOST_THREADS = 256
"""Of an engine."""


class RaySettings(BaseSettings):
    """From arguments, else from the environment (`FASTBLT_REPLICAS=4`), else the default."""

    model_config = SettingsConfigDict(env_prefix="FASTBLT_", frozen=True, extra="forbid")

    replicas: int = Field(1, ge=1, description="Initial and least number of replicas.")
    max_replicas: int | None = Field(None, ge=1, description="Most replicas; by default --replicas, a fixed number.")
    target_requests: float | None = Field(
        None,
        gt=0,
        description="Requests per replica, running or waiting, above which a replica is added; "
        "by default --max-sequences.",
    )
    target_queued_bytes: int = Field(
        1 << 17,
        gt=0,
        description="Bytes of prompts and outputs per replica, without a first byte yet, above which one is added.",
    )
    upscale_delay: float = Field(30.0, ge=0, description="Seconds above either target before a replica is added.")
    downscale_delay: float = Field(600.0, ge=0, description="Seconds below both before a replica is removed.")
    replica_cpus: float = Field(
        1.0,
        ge=0,
        description="CPU cores that a replica reserves in the cluster, and by default its threads: at least 1, see "
        "--num-threads.",
    )
    replica_gpus: float | None = Field(
        None, ge=0, description="GPUs that a replica reserves; by default 1 with --device cuda, else none."
    )
    ingresses: int = Field(
        1, ge=1, description="Processes that choose a replica for each request and relay its answer."
    )
    replica_wait: float = Field(
        30.0,
        gt=0,
        description="Seconds that a request waits for a replica to take it, also after its replica was lost; then 503.",
    )
    health_check_period: float = Field(
        2.0, gt=0, description="Seconds between two checks of a replica; after three that fail it is replaced."
    )
    ray_address: str | None = Field(
        None, description="Cluster to join; by default the one on this machine, and a new one if there is none."
    )

    @model_validator(mode="after")
    def _most_is_not_less_than_fewest(self) -> "RaySettings":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas {self.max_replicas} must not be less than replicas {self.replicas}")
        return self

    def threads(self, num_threads: int | None) -> int:
        """Of a replica's engine. num_threads: the engine's setting. Without one, as many as the cores that the replica
        reserves, so that replicas on one machine do not share cores."""
        return num_threads or max(min(int(self.replica_cpus), MOST_THREADS), 1)
