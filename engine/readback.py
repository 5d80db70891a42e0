"""Results on their way from the device to the host, while the device goes on with what was launched behind them."""

import torch
from torch import Tensor


class Readback:
    """Starts to copy a tensor; `wait` is for when its values are needed."""

    def __init__(self, tensor: Tensor) -> None:
        self._values, self._copied = tensor, None
        if tensor.is_cuda:
            self._values = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def wait(self) -> Tensor:
        """The tensor on the host."""
        if self._copied:
            self._copied.synchronize()
        return self._values
