"""A process that compiles grammars of clients, to find out whether they can be used: `python -m server.grammar_worker`.

A grammar may take hours to compile, or all memory, or crash its compiler. Here it costs no other request anything: the
kernel ends a process that takes too much time or memory, and the parent (`server.grammars`) starts another. Says `null`
when it is ready. Then each line of its input is a grammar as a JSON string, and each line of its output tells why that
one cannot be used: null, or a JSON string.
"""

import json
import re
import resource
import signal
import sys

from engine.grammars import GrammarError, compiled

MEMORY = 1 << 30
"""Most bytes of address space."""
SECONDS = 0.5
"""Most processor time on one grammar, so that a busy machine refuses none that another would take."""
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
