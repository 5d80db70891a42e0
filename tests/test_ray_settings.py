"""What follows from the settings of several replicas, without Ray."""

import pytest

from deploy.ray_settings import MOST_THREADS, RaySettings
from engine.config import EngineConfig


@pytest.mark.parametrize(
    ("cores", "given", "threads"),
    [(1, None, 1), (0, None, 1), (0.5, None, 1), (4.9, None, 4), (2, 8, 8), (999, None, 256)],
)
def test_a_replica_has_a_thread_for_each_core_that_it_reserves(cores: float, given: int | None, threads: int) -> None:
    assert RaySettings(replica_cpus=cores).threads(given) == threads
    EngineConfig(model="x", num_threads=MOST_THREADS).check()
