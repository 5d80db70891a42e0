"""A process that compiles grammars of clients, to find out whether they can be used: `python -m server.grammar_worker`.

A grammar may take hours to compile, or all memory, or crash its compiler. Here it costs no other request anything: the
parent (`server.grammars`) ends a process that is too slow. Says `null` when it is ready. Then each line of its input is
a grammar as a JSON string, and each line of its output tells why that one cannot be used: null, or a JSON string.
"""

import json
import re
import resource
import sys
import time

from engine.grammars import GrammarError, compiled

MEMORY = 1 << 30
"""Most bytes of address space."""
CPU_SECONDS = 3
"""Most time on one grammar, for a process whose parent was killed and cannot end it."""
SHOWN_CHARACTERS = 200
"""Of a message."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    _say(None)
    for line in sys.stdin:
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CPU_SECONDS, resource.RLIM_INFINITY))
        _say(_fault(json.loads(line)))


def _fault(grammar: str) -> str | None:
    try:
        compiled(grammar)
    except GrammarError as error:
        return essence(str(error))
    return None


def essence(message: str) -> str:
    """The essence of a compiler's message, in one line."""
    if found := re.search(r"^error: (.*)$", message, re.M):
        return found[1][:SHOWN_CHARACTERS]
    line = message.split("\n", 1)[0]
    # What it says first is our frame of a regular expression, or repeats it.
    line = re.sub(r"^at \d+\(\d+\): (invalid regex .* \(in regex\): )?", "", line)
    line = re.sub(r" in regex /.*$", "", line)
    # Its options cannot be sent.
    return re.sub(r"\. Enable 'coerce_one_of'.*$", " where two branches may both match; use anyOf", line)[
        :SHOWN_CHARACTERS
    ]


def _say(fault: str | None) -> None:
    sys.stdout.write(json.dumps(fault) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
