"""Grammars: which bytes may come next in a text that must match one. Needs no torch.

A grammar is what `llguidance` takes: a Lark grammar, or JSON that holds a JSON schema, a regular expression or a Lark
grammar. To it every byte is a token, so a mask has a bit per id and no token ever spans two terminals.
"""

import re
import time
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from .config import BOS_ID, BYTE_OFFSET, EOS_ID, is_byte

Mask = NDArray[np.bool_]
"""(V,): the ids that may come next."""

STEP_FUEL = 50_000
"""Most work on one mask, in steps of the lexer: a few milliseconds."""
SCHEMA_ITEMS, ITEMS = 1_000, 250
"""Most items of the parser after a byte, for a JSON schema and for any other grammar. An item is a rule under way and
where it began: a schema has some for each property that may come next, and those of an ambiguous or right-recursive
grammar add up along the text. A byte takes time as up to their cube, and keeps eight bytes of memory for each."""
STEP_ITEMS = 4_000
"""Most items that are tried for one mask."""
ANSWER_SECONDS, OWED_SECONDS = 0.002, 0.1
"""Processor time that an answer of a grammar's matchers may take on average, and what they may take beyond that. Items
do not bound a single answer: a byte may complete thousands of rules. Grammars that people write take a tenth of it."""
STATES = 8_000
"""Most states that a lexer remembers. Every text adds some."""
KEPT_BYTES = 256 << 20
"""Most memory for compiled grammars that are kept for later requests."""
BYTES_PER_STATE, BYTES_PER_BYTE = 2_000, 200
"""Most memory for a state of a lexer, and for a byte of a grammar, by measurement."""
QUICK_SECONDS = 0.05
"""Most processor time to compile a grammar while a step waits for it."""

T = TypeVar("T")


class GrammarError(ValueError):
    """A grammar that cannot be used, and why."""


class _Bytes:
    """The vocabulary: special ids, then the 256 bytes. Ids after those are no tokens of a grammar."""

    bos_token_id, eos_token_id = BOS_ID, EOS_ID
    special_token_ids = range(BYTE_OFFSET)
    tokens = [*(f"<{i}>".encode() for i in range(BYTE_OFFSET)), *(bytes((byte,)) for byte in range(256))]

    def __call__(self, text: bytes) -> list[int]:
        return [byte + BYTE_OFFSET for byte in text]


_TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()), slices=[])
_BROKEN = LLMatcher(_TOKENIZER, "", log_level=0)
"""Of no grammar: it allows nothing."""
_SCHEMA = re.compile(r'\s*\{\s*"grammars"\s*:\s*\[\s*\{(\s*"name"\s*:\s*"\w*"\s*,)?\s*"json_schema"\s*:\s*\{')
"""How a grammar begins that is a JSON schema."""


class Compiled:
    """A grammar with a matcher at the beginning of a text. Copies of the matcher share its lexer: the states that it
    remembers, and its error once there are too many."""

    def __init__(self, grammar: str, matcher: LLMatcher, seconds: float) -> None:
        """seconds: of processor time."""
        self.matcher = matcher
        self._grammar, self._seconds = grammar, seconds
        self._num_fed = 0
        """Ids of texts that have moved to its lexer."""
        self._owed = 0.0

    @property
    def is_slow(self) -> bool:
        """Whether its texts would take the host too much time: all of them end."""
        return self._owed > OWED_SECONDS

    def charge(self, seconds: float) -> None:
        """For an answer, of processor time."""
        self._owed = self._owed if self.is_slow else max(0.0, self._owed + seconds - ANSWER_SECONDS)

    @property
    def is_worn(self) -> bool:
        """Whether no copy works any more."""
        return _is_worn(self.matcher)

    def renewed(self, used: LLMatcher, num_ids: int) -> LLMatcher | None:
        """What replaces `used` for a text of so many ids, if its lexer is worn and the grammar quick to compile. Texts
        that move at about the same time share a lexer. Each of their ids may add a state to it; half of the states are
        kept for what comes."""
        if self.is_slow or self._seconds > QUICK_SECONDS or not _is_worn(used):
            return None
        if self._num_fed + num_ids > STATES // 2 or self.is_worn:
            self.matcher, self._num_fed = compiled(self._grammar).matcher, 0
        self._num_fed += num_ids
        return self.matcher


def _is_worn(matcher: LLMatcher) -> bool:
    copy = matcher.deep_copy()
    copy.compute_bitmask()
    return bool(copy.is_error())


def compiled(grammar: str) -> Compiled:
    """Its first mask is made. May take long, but lets other threads run. Raises GrammarError."""
    began = time.thread_time()
    limits = LLParserLimits(
        max_items_in_row=SCHEMA_ITEMS if _SCHEMA.match(grammar) else ITEMS,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=STEP_FUEL,
        step_max_items=STEP_ITEMS,
        max_lexer_states=STATES,
        max_grammar_size=100_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )
    matcher = LLMatcher(_TOKENIZER, grammar, limits=limits, log_level=0)
    if matcher.is_error():
        raise GrammarError(matcher.get_error())
    if not any(matcher.compute_bitmask()) or matcher.is_error():
        raise GrammarError(matcher.get_error() or "no text matches it")
    return Compiled(grammar, matcher, time.thread_time() - began)


class Grammars:
    """Compiles grammars in a thread of its own, and keeps those that were used last. A future may be cancelled."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._kept: OrderedDict[str, Future[Compiled]] = OrderedDict()

    def compile(self, grammar: str) -> "Future[Compiled]":
        """See `compiled`."""
        future = self._kept.pop(grammar, None)
        if future is None or _is_useless(future):
            future = self._thread.submit(compiled, grammar)
        self._kept[grammar] = future
        while len(self._kept) > 1 and sum(map(_most_bytes, self._kept)) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return future

    def close(self) -> None:
        """Drops compilations that have not begun: the interpreter would run them before it ends."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _most_bytes(grammar: str) -> int:
    """Of memory, however many texts have used its lexer."""
    return BYTES_PER_BYTE * len(grammar.encode()) + BYTES_PER_STATE * STATES


def _is_useless(future: "Future[Compiled]") -> bool:
    return future.cancelled() or (future.done() and not future.exception() and future.result().is_worn)


class Constraint:
    """A grammar along the text of one sequence. Its ids are those that were generated and committed."""

    def __init__(self, compiled: Compiled, vocab_size: int, *, allows_eos: bool = True) -> None:
        """allows_eos: whether an EOS may come where the text may end, and must not go on."""
        self._compiled, self._vocab_size, self._allows_eos = compiled, vocab_size, allows_eos
        self._first = compiled.matcher
        """At the beginning of the text."""
        self._matcher, self._ids = self._first.deep_copy(), list[int]()
        self._drafts, self._masks = list[int](), list[Mask]()
        """Drafts that may stand, of the last question, and what may follow the text and each of them, if it is known: a
        round asks about the same drafts again and again."""
        self._ahead = memoryview(b"")
        self._has_restarted = False

    @property
    def may_end(self) -> bool:
        """Whether the text matches."""
        return self._ask(LLMatcher.is_accepting)

    @property
    def is_finished(self) -> bool:
        """Whether the text matches and nothing can follow."""
        return self.may_end and not self._latest()[BYTE_OFFSET:].any()

    @property
    def error(self) -> str:
        """The limit at which the parser gives up here; empty if it does not."""
        self._ask(LLMatcher.compute_bitmask)
        return "too much time" if self._compiled.is_slow else self._matcher.get_error().split("\n")[0]

    def advance(self, token: int) -> None:
        """Takes an id that was allowed and is committed."""
        if is_byte(token):
            self._take(token)
            kept = self._drafts[:1] == [token]
            self._drafts, self._masks = (self._drafts[1:], self._masks[1:]) if kept else ([], [])

    def forced(self, most: int) -> list[int]:
        """The ids that must follow, whatever the model says: the first of them, at most so many."""
        return [byte + BYTE_OFFSET for byte in self._tail()[:most]]

    def allowed(self, drafts: Seq[int]) -> list[Mask | None]:
        """What may follow the text, and each of the drafts after it: None after one that may not stand there itself,
        where it does not matter. In a dead end only EOS may follow."""
        self._latest()
        drafts, masks, ahead, taken = list(drafts), self._masks, self._ahead, 0
        while self._drafts != drafts[: len(self._drafts)]:
            self._drafts.pop()
            masks.pop()
        # Drafts often lead to a dead end again, and to take a long text anew takes long.
        spare = self._matcher.deep_copy() if self._has_restarted and self._drafts != drafts else None
        for place in range(len(self._drafts), len(drafts)):
            if not masks[-1][drafts[place]] or not is_byte(drafts[place]):
                break
            for token in drafts[taken : place + 1]:
                self._take(token)
            taken = place + 1
            self._drafts.append(drafts[place])
            masks.append(self._mask())
        if taken:
            del self._ids[-taken:]
            self._ahead = ahead
            if not self._matcher.is_error():
                self._matcher.rollback(taken)
            elif spare:
                self._matcher = spare
            else:
                self._restart()
        return [*masks, *[None] * (len(drafts) + 1 - len(masks))]

    def _take(self, token: int) -> None:
        self._ask(lambda matcher: matcher.consume_token(token))
        self._ids.append(token)
        self._ahead = self._ahead[1:]

    def _latest(self) -> Mask:
        if not self._masks:
            self._masks.append(self._mask())
        return self._masks[0]

    def _tail(self) -> memoryview:
        """The bytes that must follow. They are kept until the text has passed them: a matcher takes time for each, also
        for a mask where there are any."""
        if not self._ahead or self._matcher.is_error():
            # A special id that a grammar names begins with 0xff here.
            self._ahead = memoryview(self._ask(LLMatcher.compute_ff_bytes).partition(b"\xff")[0])
        return self._ahead

    def _mask(self) -> Mask:
        mask = np.zeros(self._vocab_size, dtype=np.bool_)
        if tail := self._tail():
            mask[tail[0] + BYTE_OFFSET] = True
            return mask
        bits = np.frombuffer(self._ask(LLMatcher.compute_bitmask), dtype=np.uint8)
        if not self._matcher.is_error():
            known = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
            mask[: len(known)] = known
            # A Lark grammar may name any special id.
            mask[:BYTE_OFFSET] &= np.arange(BYTE_OFFSET) == EOS_ID
            mask[EOS_ID] &= self._allows_eos
        mask[EOS_ID] |= not mask.any()
        return mask

    def _ask(self, question: Callable[[LLMatcher], T]) -> T:
        """What the matcher says after `_ids`. If its lexer is worn, another one answers."""
        said = self._answer(question)
        # The second is new, if other texts have worn out the first.
        for _ in range(2):
            if not self._matcher.is_error() or not (first := self._compiled.renewed(self._first, len(self._ids))):
                break
            self._first = first
            self._restart()
            said = self._answer(question)
        return said

    def _answer(self, question: Callable[[LLMatcher], T]) -> T:
        if self._compiled.is_slow:
            self._matcher = _BROKEN
        began = time.thread_time()
        said = question(self._matcher)
        self._compiled.charge(time.thread_time() - began)
        return said

    def _restart(self) -> None:
        """Forgets an error: a matcher never does."""
        self._has_restarted = True
        self._matcher = _BROKEN if self._compiled.is_slow else self._first.deep_copy()
        self._matcher.consume_tokens(self._ids)
