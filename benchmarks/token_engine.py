"""llama.cpp on a CPU, greedily, one token after another, in its own processes, which sleep while others work.

Its threads wait for each other hundreds of times a token. Spinning is faster if every thread has a core to itself;
sleeping is several times as fast if anything else runs. OpenMP fixes that when it is loaded, so there is a process for
each; both run in every turn and the faster one counts.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
"""Not imported from `report`: these processes do not load torch."""
POLICY = "OMP_WAIT_POLICY"
WAITING: dict[str, dict[str, str]] = {"awake": {}, "asleep": {POLICY: "PASSIVE"}}
"""The variable's value: unset, llama.cpp's default (spin for a few milliseconds, then sleep), or sleep at once."""
ERROR = 4
"""A level of llama.cpp's log."""


class Facts(NamedTuple):
    """size: bytes of all tensors. system: the library's compiled features."""

    version: str
    system: str
    parameters: int
    size: int


@dataclass(frozen=True, slots=True)
class TokenReading:
    """The generated tokens, their seconds without the prompt, and how threads waited: a key of `WAITING`."""

    tokens: list[int]
    seconds: float
    waiting: str

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds


class TokenEngine:
    """A model in llama.cpp, in a process for each way of waiting."""

    def __init__(self, processes: "dict[str, subprocess.Popen[str]]") -> None:
        self._processes = processes
        self.facts, *_ = [Facts(**_answer(process)) for process in processes.values()]

    def generate(self, prompt: Sequence[int], count: int) -> TokenReading:
        """`count` tokens after the prompt and its first. A prompt equal to the previous one is computed only from its
        last token on."""
        asked = json.dumps({"prompt": list(prompt), "count": count})
        found = []
        for waiting, process in self._processes.items():
            assert process.stdin
            print(asked, file=process.stdin, flush=True)
            found.append(TokenReading(waiting=waiting, **_answer(process)))
        return min(found, key=lambda reading: reading.seconds)


@contextmanager
def token_engine(path: Path, threads: int, positions: int) -> Iterator[TokenEngine]:
    """The model of a GGUF file with room for `positions` tokens, until the block ends. Raises RuntimeError."""
    inherited = {name: value for name, value in os.environ.items() if name != POLICY}
    command = [sys.executable, "-m", "benchmarks.token_engine", str(path.resolve()), str(threads), str(positions)]
    with ExitStack() as stack:
        processes = {}
        for waiting, policy in WAITING.items():
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=inherited | policy,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            # The process ends at the end of its input.
            processes[waiting] = stack.enter_context(process)
        yield TokenEngine(processes)


def _answer(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"llama.cpp ended with {process.wait()}; the lines above say why")
    answer: dict[str, Any] = json.loads(line)
    return answer


class _Sequence:
    """One sequence of a model, in this process."""

    def __init__(self, path: str, threads: int, positions: int) -> None:
        import llama_cpp
        import numpy as np

        # Kept, since the library keeps calling it.
        self._log = llama_cpp.llama_log_callback(_tell)
        llama_cpp.llama_log_set(self._log, None)
        self._library, self._array = llama_cpp, np.ctypeslib.as_array
        llama_cpp.llama_backend_init()
        how = llama_cpp.llama_model_default_params()
        how.n_gpu_layers = 0
        model = llama_cpp.llama_model_load_from_file(path.encode(), how)
        if not model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        given = llama_cpp.llama_context_default_params()
        given.n_ctx, given.n_threads, given.n_threads_batch = positions, threads, threads
        self._context = llama_cpp.llama_init_from_model(model, given)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._prompt: list[int] = []
        self.facts = Facts(
            llama_cpp.__version__,
            llama_cpp.llama_print_system_info().decode().strip(" |"),
            llama_cpp.llama_model_n_params(model),
            llama_cpp.llama_model_size(model),
        )

    def generate(self, prompt: list[int], count: int) -> dict[str, Any]:
        known = len(prompt) - 1 if prompt == self._prompt else 0
        memory = self._library.llama_get_memory(self._context)
        self._library.llama_memory_seq_rm(memory, -1, known, -1)
        self._prompt = prompt
        token, tokens = self._next(prompt[known:]), []
        began = time.perf_counter()
        for _ in range(count):
            token = self._next([token])
            tokens.append(token)
        return {"tokens": tokens, "seconds": time.perf_counter() - began}

    def _next(self, tokens: Sequence[int]) -> int:
        batch = (self._library.llama_token * len(tokens))(*tokens)
        if self._library.llama_decode(self._context, self._library.llama_batch_get_one(batch, len(tokens))):
            raise SystemExit("llama.cpp did not decode")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return int(self._array(logits, shape=(self._vocab_size,)).argmax())


def _tell(level: int, text: bytes, _: object) -> None:
    """Prints only the library's errors."""
    if level == ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def main(path: str, threads: str, positions: str) -> None:
    """Prints the model's facts, then answers lines on standard input until its end."""
    sequence = _Sequence(path, int(threads), int(positions))
    print(json.dumps(sequence.facts._asdict()), flush=True)
    for line in sys.stdin:
        print(json.dumps(sequence.generate(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
