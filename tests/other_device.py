"""A device that is not the host, where there is none: it computes on the host, and refuses what a GPU would refuse.

Tensors on it say that they are on `meta`, a device which autograd knows without a driver, but they have values. Every
operation is seen: one that mixes them with the host's tensors fails as on a GPU, and one for which the host would have
to wait for the device is counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
HOST = torch.device("cpu")
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"}
WAITS_BY_MASK = {"aten::index", "aten::index_put", "aten::index_put_"}
"""They wait if an index is a mask: how many places it has, the device must tell."""
COPIES = {"aten::_to_copy", "aten::copy_"}


class There(Tensor):
    """A tensor on the device, around the host's tensor that has its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=DEVICE,
        )  # fmt: skip

    def __init__(self, here: Tensor) -> None:
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{operation} outside of other_device()")


class _Watch(TorchDispatchMode):
    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, flat = operation._schema.name, tree_flatten((args, kwargs or {}))[0]
        there = [x for x in flat if isinstance(x, There)]
        here = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, There)]
        to = next((x for x in flat if isinstance(x, torch.device)), None)
        if name in COPIES:
            across = bool(there) != (to == DEVICE) if name == "aten::_to_copy" and to else bool(there and here)
            if across and not any(x is True for x in flat):  # non_blocking
                self._waits.append(name)
        elif there and any(x.dim() for x in here):
            raise RuntimeError(f"{name}: tensors on different devices: {[tuple(x.shape) for x in here]} on the host")
        elif name in WAITS or (name in WAITS_BY_MASK and any(x.dtype == torch.bool for x in tree_flatten(args[1])[0])):
            self._waits += [name] * bool(there)
        if name == "aten::_pin_memory":  # only a driver can
            return args[0]
        result = operation(*tree_map(_unwrapped, args), **tree_map(_unwrapped, kwargs or {}))
        if to == DEVICE or (there and to is None):
            # What an operation changes in place or writes to stays the tensor that it was.
            known = {id(x.here): x for x in there}
            return tree_map(lambda x: known[id(x)] if id(x) in known else _wrapped(x), result)
        return result


def _wrapped(value: Any) -> Any:
    return There(value) if isinstance(value, Tensor) else value


def _unwrapped(value: Any) -> Any:
    if isinstance(value, There):
        return value.here
    return HOST if isinstance(value, torch.device) and value == DEVICE else value


@contextmanager
def other_device() -> Iterator[list[str]]:
    """While the block runs, `DEVICE` is such a device; gives the operations that waited for it, so far."""
    waits: list[str] = []
    with _Watch(waits):
        yield waits
