"""What comes from the device does not wait for what was launched behind it."""

import pytest
import torch

from engine.step.transfer import read_async

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_what_was_begun_to_be_read_is_heard_while_the_device_goes_on() -> None:
    ids, highest = torch.arange(3, device="cuda"), torch.tensor([0.5, -1.0, 2.0], device="cuda")
    heard = read_async(ids, highest)
    # A second or so on any device.
    torch.cuda._sleep(2_000_000_000)
    behind = torch.cuda.Event()
    behind.record()
    assert heard() == [[0, 1, 2], [0.5, -1.0, 2.0]]
    assert not behind.query()
    torch.cuda.synchronize()
