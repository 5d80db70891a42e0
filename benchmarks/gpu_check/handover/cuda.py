"""CUDA C++ without a toolkit: NVRTC, which torch's CUDA builds include, compiles it, and the driver launches it."""

import ctypes
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from .question import NotHere

_MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""


def compile_cubin(source: Path, arch: str, defines: Mapping[str, int]) -> bytes:
    """Compiles a file with NVRTC for an architecture, such as sm_90a.

    Raises NotHere if there is no NVRTC, RuntimeError with the compiler's words if it refuses the file.
    """
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    _check(
        nvrtc.nvrtcCreateProgram(
            ctypes.byref(program), source.read_bytes(), source.name.encode(), 0, None, None
        ), "nvrtcCreateProgram",
    )  # fmt: skip
    given = [f"--gpu-architecture={arch}", *(f"-D{name}={value}" for name, value in defines.items())]
    options = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
    if nvrtc.nvrtcCompileProgram(program, len(given), options):
        size = ctypes.c_size_t()
        _check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)), "nvrtcGetProgramLogSize")
        log = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetProgramLog(program, log), "nvrtcGetProgramLog")
        raise RuntimeError(f"{source.name} does not compile for {arch}:\n{log.value.decode(errors='replace')}")
    size = ctypes.c_size_t()
    _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
    cubin = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
    _check(nvrtc.nvrtcDestroyProgram(ctypes.byref(program)), "nvrtcDestroyProgram")
    return cubin.raw


class Kernel:
    """A kernel of a cubin in the current device's context. shared: bytes of shared memory that a block takes."""

    def __init__(self, cubin: bytes, name: str, shared: int) -> None:
        torch.cuda.synchronize()  # torch's context is current from here on
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._shared = shared
        driver = self._driver
        _check(driver.cuModuleLoadData(ctypes.byref(self._module), cubin), "cuModuleLoadData")
        _check(
            driver.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()),
            "cuModuleGetFunction",
        )
        _check(driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, shared), "cuFuncSetAttribute")

    def launch(self, blocks: int, threads: int, arguments: Sequence[Tensor | int]) -> None:
        """On torch's current stream, all blocks on the device at once, or refused. Integers are 32 bits wide."""
        held = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int(a) for a in arguments]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(value) for value in held))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        _check(
            self._driver.cuLaunchCooperativeKernel(
                self._function, blocks, 1, 1, threads, 1, 1, self._shared, stream, pointers
            ),
            "cuLaunchCooperativeKernel",
        )


def _nvrtc() -> ctypes.CDLL:
    """Raises NotHere if there is none."""
    folders = [Path(folder) / "nvidia" for folder in sys.path]
    for path in sorted(path for folder in folders for path in folder.glob("*/lib/libnvrtc.so.*")):
        # NVRTC itself would look for this one only in the system's folders.
        for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))
        return ctypes.CDLL(str(path))
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"):
        with suppress(OSError):
            return ctypes.CDLL(name)
    raise NotHere("there is no NVRTC, which torch's CUDA builds bring along")


def _check(code: int, call: str) -> None:
    if code:
        raise RuntimeError(f"{call} failed with {code}")
