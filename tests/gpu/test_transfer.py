"""What comes from the device does not wait for what was launched after it."""

import pytest
import torch

from engine.transfer import read_async

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_an_asynchronous_read_completes_while_the_device_is_busy() -> None:
    ids, highest = torch.arange(3, device="cuda"), torch.tensor([0.5, -1.0, 2.0], device="cuda")
    heard = read_async(ids, highest)
    # A second or so on any device.
    torch.cuda._sleep(2_000_000_000)
    behind = torch.cuda.Event()
    behind.record()
    assert heard() == [[0, 1, 2], [0.5, -1.0, 2.0]]
    assert not behind.query()
    torch.cuda.synchronize()
