"""Memory that cannot be had: how it is recognised, and which flags need less. Needs no torch."""

import errno

from .config import EngineConfig

WORDS = ("allocate memory", "out of memory", "ALLOC_FAILED", "start new thread")
"""Of errors for which torch, CUDA and Python's threads have no type of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that host or device has no memory left."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
    )


def flags_that_need_less(engine: EngineConfig) -> str:
    """With the values that they have."""
    return (
        f"lower --cache-bytes {engine.cache_bytes}, --max-sequences {engine.max_sequences}, "
        f"--max-step-rows {engine.max_step_rows}, --max-length or --num-threads; `fastblt size` shows what they take"
    )
