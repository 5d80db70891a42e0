"""A process that compiles grammars of clients, to find out whether they can be used: `python -m server.grammar_worker`.

A grammar may take hours to compile, or all memory, or crash its compiler. Here it costs no other request anything: the
kernel ends a process that takes too much time or memory, and the parent (`server.grammars`) starts another. A byte of
its texts may take as much, so some are tried. Says `null` when it is ready. Then each line of its input is a grammar as
a JSON string, and each line of its output tells why that one cannot be used: null, or a JSON string.
"""

import json
import random
import re
import resource
import signal
import sys
import time

import numpy as np

from engine.config import BYTE_OFFSET
from engine.grammars import Compiled, Constraint, GrammarError, compiled

MEMORY = 1 << 30
"""Most bytes of address space."""
SECONDS = 0.5
"""Most processor time to compile a grammar, and again to try bytes of its texts. A busy machine refuses none that
another would take."""
TRIED_BYTES, TRIED_SECONDS = 256, 0.1
"""Most bytes of its texts that are tried, and processor time after which no further one is."""
SHORT_BYTES = 16
"""A grammar is refused if its parser has too many items before."""
SLOW_TEXTS = "working out what may follow takes too long in its texts: too many of its rules are under way at once"
SHOWN_CHARACTERS = 200
"""Of a message."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _say(None)
    for line in sys.stdin:
        # When it runs out, SIGPROF ends the process.
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        fault = _fault(json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(fault)


def _fault(grammar: str) -> str | None:
    try:
        made = compiled(grammar)
    except GrammarError as error:
        return essence(str(error))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    return fault_of_texts(made)


def fault_of_texts(made: Compiled) -> str | None:
    """Of some that match, always the same ones. A dead end is no fault unless it comes early: shorter texts may do."""
    draw, text = random.Random(0), Constraint(made, BYTE_OFFSET + 256)
    until, length = time.process_time() + TRIED_SECONDS, 0
    for _ in range(TRIED_BYTES):
        (mask,) = text.allowed([])
        assert mask is not None
        if (ids := np.flatnonzero(mask[BYTE_OFFSET:])).size:
            text.advance(int(draw.choice(ids)) + BYTE_OFFSET)
            length += 1
        elif "items" in text.error and length < SHORT_BYTES:
            return essence(text.error)
        else:
            text, length = Constraint(made, BYTE_OFFSET + 256), 0
        if time.process_time() > until:
            break
    return SLOW_TEXTS if made.is_slow else None


def essence(message: str) -> str:
    """The essence of a compiler's message, in one line."""
    if found := re.search(r"^error: (.*)$", message, re.M):
        return found[1][:SHOWN_CHARACTERS]
    line = message.split("\n", 1)[0]
    # What it says first is our frame of a regular expression, or repeats it.
    line = re.sub(r"^at \d+\(\d+\): (invalid regex .* \(in regex\): )?", "", line)
    line = re.sub(r" in regex /.*$", "", line)
    # A schema has no rules to rewrite.
    line = line.replace("consider making your grammar", "make fewer properties of an object optional, or the grammar")
    # Its options cannot be sent.
    return re.sub(r"\. Enable 'coerce_one_of'.*$", " where two branches may both match; use anyOf", line)[
        :SHOWN_CHARACTERS
    ]


def _say(fault: str | None) -> None:
    sys.stdout.write(json.dumps(fault) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
