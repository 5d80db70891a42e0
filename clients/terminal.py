"""Completions on a terminal, as `fastblt client` shows them."""

import sys
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from rich.console import Console

from .fastblt_client import ApiError, Client, first_model

notes = Console(stderr=True, highlight=False, style="dim")


def run(client: Client, prompts: Sequence[str], model: str | None, options: dict[str, Any]) -> None:
    """Streams each prompt's continuation to standard output; without prompts, that of each typed line. Notes go to
    standard error.

    Raises FastBltError for a given prompt; for typed lines a refusal is shown and the next line read.
    """
    if model is None:
        model = first_model(client.models())
    for prompt in prompts:
        show(client, prompt, model, options)
    if prompts:
        return
    notes.print(f"{model}: type a text to continue. Ctrl-C ends a stream, Ctrl-D the program.")
    while True:
        try:
            show(client, notes.input("> "), model, options)
        except EOFError:
            notes.print()
            return
        except KeyboardInterrupt:
            notes.print()
        except ApiError as error:
            notes.print(str(error), markup=False, style="red")


def show(client: Client, prompt: str, model: str, options: dict[str, Any]) -> None:
    """Shows one stream, then a line with its speed and finish reason. Ctrl-C ends it. Raises FastBltError."""
    reason: str | None = "interrupted"
    num_bytes = 0
    began = time.perf_counter()
    first: float | None = None
    with closing(client.stream(prompt, model=model, **options)) as stream:
        try:
            for event in stream:
                if event.text:
                    first = first or time.perf_counter()
                    num_bytes += len(event.text.encode())
                    sys.stdout.write(event.text)
                    sys.stdout.flush()
                if event.finish_reason:
                    reason = event.finish_reason
                if event.usage:
                    num_bytes = event.usage["completion_tokens"]
        except KeyboardInterrupt:
            pass
    ended = time.perf_counter()
    print()
    waited = f", first after {first - began:.2f} s" if first else ""
    rate = f"{num_bytes / (ended - began):.0f} bytes/s"
    notes.print(f"{reason}: {num_bytes} bytes, {rate}{waited}")
