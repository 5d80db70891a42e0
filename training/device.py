"""The device that training runs on."""

import platform

import torch


def chosen_device(name: str) -> torch.device:
    """`cpu` or `cuda`. Raises ValueError if there is no such device here."""
    if name == "cuda" and not torch.cuda.is_available():
        built = "has no CUDA" if torch.version.cuda is None else f"is built for CUDA {torch.version.cuda}"
        raise ValueError(
            f"--device cuda: torch finds no CUDA device (torch {torch.__version__} {built}); --device cpu needs none"
        )
    # Training multiplies in bfloat16, except for the float32 patcher that decides where patches start. It must decide
    # as it does when served: no TF32 for it.
    torch.set_float32_matmul_precision("highest")
    return torch.device(name)


def description(device: torch.device) -> str:
    """The device's description in the model card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of a CPU ({platform.machine()})"


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all launched work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
