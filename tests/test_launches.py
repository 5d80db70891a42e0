"""How many launches a byte takes, and what follows from that for its time on a GPU."""

from collections import Counter
from typing import Any

import pytest
from torch import Tensor

from benchmarks import gpu_model, launches
from benchmarks.models import shaped
from kernels import sampling
from kernels.dispatch import TritonKernels

CONFIG = shaped("1b", "fast")
MOST = {"blt": 203, "blt-s k=8": 106, "blt-d B=8": 54, "blt-dv B=8": 48}
"""Launches of a committed byte at the 1B shape. Lower it with every launch that goes."""


@pytest.fixture(scope="module")
def found() -> dict[str, Counter[str]]:
    return launches.calls(CONFIG)


@pytest.mark.parametrize("decoder", MOST)
def test_a_byte_takes_few_launches(found: dict[str, Counter[str]], decoder: str) -> None:
    of_byte = launches.per_byte(found, launches.RATES[decoder])
    assert MOST[decoder] - 1 < of_byte <= MOST[decoder]


def test_a_layer_is_five_kernels_and_seven_with_slots(found: dict[str, Counter[str]]) -> None:
    layers = CONFIG.decoder.num_layers
    assert found["patcher"].total() == 5 * CONFIG.patcher.num_layers + 4
    assert found["decoder"].total() == 7 * layers + 5


def test_an_operation_of_torch_and_a_kernel_more_are_counted(
    found: dict[str, Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def more(logits: Tensor) -> Any:
        return sampling.argmax_triton(logits.double().float())

    monkeypatch.setattr(TritonKernels, "argmax", staticmethod(more))
    counts = launches.calls(CONFIG)
    assert counts["decoder"] - found["decoder"] == Counter({"_to_copy": 2})
    assert counts["patcher"] == found["patcher"]


def test_the_model_of_time_gives_the_speeds_that_were_measured() -> None:
    """Of the kernels of then."""
    then = gpu_model.Launches(133, 235, 114, 114)
    measured = {"blt": 692, "blt-s k=8": 1379, "blt-d B=8": 2397, "blt-dv B=8": 2087}
    for name, speed in measured.items():
        told = gpu_model.predict(CONFIG, then, launches.RATES[name], gpu_model.HOST_SHARE[name])
        assert told.bytes_per_second == pytest.approx(speed, rel=0.02)
        assert 0.2 < told.use < 0.3


def test_a_batch_shares_launches_and_weights_but_not_keys_and_values() -> None:
    of, rates = gpu_model.Launches(133, 235, 114, 114), launches.RATES["blt"]
    one, many = (gpu_model.predict(CONFIG, of, rates, 0.0, batch=batch) for batch in (1, 16))
    assert 8 < many.bytes_per_second / one.bytes_per_second < 16
    # Keys and values of nine layers and 260 bytes, for 15 sequences more.
    assert many.pass_us - one.pass_us == pytest.approx(15 * 9 * 260 * 4096 / gpu_model.COPY_GB_S / 1e3, rel=0.03)
    assert many.use > one.use
