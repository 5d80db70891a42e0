"""Colours decoding in the terminal: patches, drafts and the order in which blocks are unmasked."""

from collections import deque
from collections.abc import Iterator, Sequence

from rich.style import Style
from rich.text import Text

from engine.config import BOS_ID, is_byte, text_of
from engine.types import Trace

from .schemas import Patches
from .text import Utf8Stream

PATCHES = ("grey15", "grey30")
"""Backgrounds, in turn."""
OWN, ACCEPTED, REJECTED = "white", "green3", "red3"
PROMPT = Style(color=OWN, dim=True)
PASSES = ("green1", "chartreuse3", "yellow3", "orange1", "dark_orange3", "deep_pink3", "medium_purple2", "slate_blue1")
"""Colours of a block's bytes, by the pass that settled them; the last one is for all later passes."""


def legend() -> Text:
    text = Text().append("prompt ", style=PROMPT)
    text.append("next byte ", style=OWN)
    text.append("draft accepted ", style=ACCEPTED)
    text.append("draft rejected", style=Style(color=REJECTED, strike=True))
    text.append(" block, by pass: ", style=OWN)
    for number, colour in enumerate(PASSES, 1):
        text.append(f"{number} ", style=colour)
    return text.append("background: patches\n", style=OWN)


class Show:
    """Takes the ids of one output with their traces, in order, and gives the text to print. The prompt comes first,
    once its patch starts are known."""

    def __init__(self, prompt: Sequence[int] = ()) -> None:
        self._num_prompt = len(prompt)
        self._starts: set[int] = set()
        self._waiting = deque((token, PROMPT) for token in prompt)
        """Ids whose patches are not known yet, with their styles."""
        self._rejected: dict[int, list[int]] = {}
        self._place = 0
        self._patch = 0
        self._utf8 = Utf8Stream()

    def feed(self, ids: list[int], traces: list[Trace], patches: Patches | None = None) -> Text:
        """The text that is final by now: whether a byte starts a patch is known one round later."""
        at = 0
        if patches:
            self._starts |= {start for start in patches.starts if start < self._num_prompt}
        for trace in traces:
            own = ids[at : at + trace.num_ids]
            first = self._place + len(self._waiting)
            for place, token in enumerate(own):
                self._waiting.append((token, Style(color=_colour(trace, place))))
            if trace.accepted < len(own) and trace.accepted < len(trace.drafts):
                self._rejected[first + trace.accepted] = trace.drafts[trace.accepted :]
            self._starts |= {self._num_prompt + start for start in trace.patch_starts}
            at += trace.num_ids
        return self._print(max(self._starts, default=0))

    def finish(self) -> Text:
        text = self._print(self._place + len(self._waiting))
        return text.append(self._utf8.finish())

    def _print(self, end: int) -> Text:
        text = Text()
        while self._waiting and self._place < end:
            token, style = self._waiting.popleft()
            if self._place in self._starts:
                self._patch += 1
                self._starts.discard(self._place)
            background = PATCHES[self._patch % len(PATCHES)]
            if rejected := self._rejected.pop(self._place, []):
                wrong_style = Style(color=REJECTED, bgcolor=background, strike=True)
                wrong = text_of(rejected).decode(errors="replace")
                text.append("".join(_visible(wrong)), style=wrong_style)
            text.append(self._character(token), style=style + Style(bgcolor=background))
            self._place += 1
        return text

    def _character(self, token: int) -> str:
        if is_byte(token):
            return self._utf8.feed(text_of([token]))
        return "" if token == BOS_ID and self._place == 0 < self._num_prompt else f"<{token}>"


def _colour(trace: Trace, place: int) -> str:
    if place >= trace.accepted:
        return OWN
    if not trace.passes:
        return ACCEPTED
    return PASSES[min(trace.passes[place], len(PASSES) - 1)]


def _visible(text: str) -> Iterator[str]:
    """A rejected line break would break the line."""
    for character in text:
        yield "↵" if character == "\n" else character if character.isprintable() else "·"
