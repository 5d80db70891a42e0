"""A grammar holds for every byte of every exact decoder, and leaves the model its choice among what it allows."""

import json
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher
from msgspec import structs

from engine import grammars
from engine.checkpoint import PRESETS, calibrated, random_tensors, save
from engine.config import BOS_ID, BYTE_OFFSET, EOS_ID
from engine.engine import Engine
from engine.grammars import Constraint, GrammarError, Grammars, compiled
from engine.types import MAX_DRAFT, Delta, Event, Failed, Finished, Request, SamplingParams
from tests import reference
from tests.engines import Output, bill, crowded_engine, make_engine, request, run, save_ours, usage
from tests.models import our_config, our_model, text

NANO = Path(__file__).parents[1] / "models" / "nano"
PATTERNS = [
    rb"[a-z]{3,9}( [a-z]{1,7}){0,6}\.",
    rb"(ab|ba)*c",
    rb"\{\"name\": \"[A-Z][a-z]+\", \"age\": [0-9]{1,3}, \"tags\": \[(\"[a-z]+\"(, \"[a-z]+\")*)?\]\}",
    rb"def [a-z_]{1,12}\(self(, [a-z]{1,5})*\) -> (None|int|str):",
    rb"(0|1){4}-(0|1){4}-end of it",
]
SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 5},
    {"anyOf": [{"type": "boolean"}, {"type": "object", "properties": {"when": {"type": "string", "format": "date"}}}]},
]


def of_regex(pattern: bytes) -> str:
    return LLMatcher.grammar_from_regex(pattern.decode())


def of_schema(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


GRAMMARS = [*map(of_regex, PATTERNS), *map(of_schema, SCHEMAS)]


def to_ids(data: bytes) -> list[int]:
    return [byte + BYTE_OFFSET for byte in data]


@cache
def may_follow(pattern: bytes, data: bytes) -> set[int]:
    """By another library, and byte by byte."""
    allowed = {
        byte + BYTE_OFFSET for byte in range(256) if regex.fullmatch(pattern, data + bytes((byte,)), partial=True)
    }
    return allowed | ({EOS_ID} if regex.fullmatch(pattern, data) else set())


def ids_of(mask: Any) -> set[int]:
    return set(np.flatnonzero(mask).tolist())


@settings(max_examples=30)
@given(st.sampled_from(PATTERNS), st.data())
def test_masks_are_those_of_another_library_along_drafts_and_after_them(pattern: bytes, data: st.DataObject) -> None:
    constraint, done = Constraint(compiled(of_regex(pattern)), 261), b""
    while not constraint.is_finished and len(done) < 24:
        drafts: list[int] = []
        for _ in range(data.draw(st.integers(0, 5))):
            follow = sorted(may_follow(pattern, done + bytes(i - BYTE_OFFSET for i in drafts)) - {EOS_ID})
            wrong = [97 + BYTE_OFFSET, EOS_ID]
            drafts.append(data.draw(st.sampled_from(follow + wrong)))
            if drafts[-1] not in follow:
                break
        masks = constraint.allowed(drafts)
        assert len(masks) == len(drafts) + 1
        for number, mask in enumerate(masks):
            before = done + bytes(i - BYTE_OFFSET for i in drafts[:number] if i != EOS_ID)
            if mask is None:
                assert not regex.fullmatch(pattern, before, partial=True) or EOS_ID in drafts[:number]
            else:
                assert ids_of(mask) == may_follow(pattern, before)
        forced = bytes(i - BYTE_OFFSET for i in constraint.forced(MAX_DRAFT))
        for end in range(len(forced)):
            assert may_follow(pattern, done + forced[:end]) == {forced[end] + BYTE_OFFSET}
        choices = sorted(may_follow(pattern, done) - {EOS_ID})
        if not choices:
            break
        token = data.draw(st.sampled_from(choices))
        constraint.advance(token)
        done += bytes((token - BYTE_OFFSET,))
    assert constraint.may_end == bool(regex.fullmatch(pattern, done))
    assert constraint.is_finished == (may_follow(pattern, done) == {EOS_ID})


LITERALS = [
    LLMatcher.grammar_from_regex(pattern)
    for pattern in (
        r"日本語(の|は)?テキスト[0-9]*終わり",
        r"(the quick brown fox )?jumps[ab]{2}over the lazy dog, and over it again(\.|!)?",
        r"[à-ÿ]{2}: Ende 😀(Grüße|Grün|Gras)",
        r"a?b?(c?dddd){1,3}x{40}",
    )
] + [LLMatcher.grammar_from_lark('start: ("ab" | "é") "cdefg" <[0]> "h"')]
"""Much of each must follow; the last one ends in a dead end."""


def full_mask(grammar: str, ids: Sequence[int]) -> set[int]:
    """What may follow, as a matcher says that was asked nothing before."""
    matcher = compiled(grammar).matcher.deep_copy()
    assert matcher.consume_tokens(list(ids))
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
    return (ids_of(bits) - {*range(BYTE_OFFSET)}) | ({EOS_ID} if bits[EOS_ID] else set()) or {EOS_ID}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("grammar", LITERALS)
def test_masks_are_full_ones_within_bytes_that_must_follow_and_after_drafts(grammar: str, seed: int) -> None:
    draw, full = random.Random(seed), cache(lambda ids: full_mask(grammar, ids))
    constraint, done = Constraint(compiled(grammar), 261), list[int]()
    while full(tuple(done)) != {EOS_ID}:
        drafts = constraint.forced(draw.choice([0, 3, MAX_DRAFT]))
        for _ in range(draw.randint(0, 4)):
            drafts.append(draw.choice([*sorted(full((*done, *drafts))), 97 + BYTE_OFFSET]))
            if drafts[-1] == EOS_ID or drafts[-1] not in full((*done, *drafts[:-1])):
                break
        stands = True
        for number, mask in enumerate(constraint.allowed(drafts)):
            assert (None if mask is None else ids_of(mask)) == (full((*done, *drafts[:number])) if stands else None)
            stands = stands and {*drafts[number : number + 1]} <= full((*done, *drafts[:number])) - {EOS_ID}
        if draw.random() < 0.3:
            # Another engine goes on.
            constraint = Constraint(compiled(grammar), 261)
            for token in done:
                constraint.advance(token)
        for token in [*drafts, min(full(tuple(done)) - {EOS_ID})][: draw.randint(1, 40)]:
            if token == EOS_ID or token not in full(tuple(done)):
                break
            constraint.advance(token)
            done.append(token)
            assert constraint.is_finished == (constraint.may_end and full(tuple(done)) == {EOS_ID})


@pytest.fixture(scope="module", params=["embedding", "encoder", "nano"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "nano":
        return NANO
    fields = {"mask_id": 260, "block_size": 6} if request.param == "embedding" else {}
    made = our_model(our_config(decoder_input=request.param, **fields), 5)
    return save_ours(tmp_path_factory.mktemp("constraints") / "model", made)


def all_events(engine: Engine) -> list[Event]:
    """Until it has no work."""
    events = list[Event]()
    while engine.has_work:
        events += engine.step()
    return events


def asked(decoder: str, grammars: Sequence[str], **fields: Any) -> list[Request]:
    samplings = [SamplingParams(temperature=0), SamplingParams(temperature=1.0, top_p=0.95, seed=3)]
    return [
        request(
            str(number), text(3 + 5 * number, number, specials=False), 90, decoder=decoder, grammar=grammar,
            sampling=samplings[number % 2], **fields,
        )
        for number, grammar in enumerate(grammars)
    ]  # fmt: skip


def ending(output: Output) -> str:
    assert isinstance(output.end, Finished)
    return output.end.reason


def matches(output: Output, number: int) -> bool:
    data = output.text
    if number < len(PATTERNS):
        return bool(regex.fullmatch(PATTERNS[number], data, partial=ending(output) == "length"))
    if ending(output) == "length":
        return True
    jsonschema.validate(json.loads(data), SCHEMAS[number - len(PATTERNS)])
    return True


def test_exact_decoders_write_what_blt_does_and_all_of_it_matches(model: Path) -> None:
    wanted = run(make_engine(model), asked("blt", GRAMMARS))
    engine = make_engine(model)
    exact = [name for name in engine.limits.decoders if name != "blt-d"]
    assert len(exact) >= 3
    for number in range(len(GRAMMARS)):
        assert matches(wanted[str(number)], number), wanted[str(number)].text
    for decoder in exact:
        found = run(engine, asked(decoder, GRAMMARS))
        for name, output in wanted.items():
            assert (found[name].ids, found[name].end.reason) == (output.ids, ending(output)), (
                decoder,
                name,
            )


def test_a_constrained_text_is_the_plain_full_forwards(tmp_path: Path) -> None:
    config, tensors = our_model(our_config(decoder_input="embedding"), 5)
    folder = save_ours(tmp_path / "model", (config, tensors))
    prompt, pattern = text(9, 2, specials=False), PATTERNS[3]
    ids, data = list(prompt), b""
    while (follow := may_follow(pattern, data)) != {EOS_ID} and len(data) < 40:
        logits = reference.forward(config, tensors, ids)[-1]
        best = max(sorted(follow), key=lambda token: float(logits[token]))
        if best == EOS_ID:
            break
        ids.append(best)
        data += bytes((best - BYTE_OFFSET,))
    for decoder in ("blt", "blt-s"):
        out = run(make_engine(folder), [request("a", prompt, 40, decoder=decoder, grammar=of_regex(pattern))])["a"]
        assert out.text == data


def test_forced_bytes_take_fewer_calls(model: Path) -> None:
    grammar = of_regex(rb"\{\"temperature\":[0-9],\"humidity\":[0-9],\"pressure\":[0-9]\}")
    engine = make_engine(model)
    for decoder in ("blt", "blt-s"):
        out = run(engine, [request("a", text(20, 1), 90, decoder=decoder, grammar=grammar)])["a"]
        assert ending(out) == "stop" and json.loads(out.text).keys() == {"temperature", "humidity", "pressure"}
        # Each of its four fixed pieces is a round.
        assert usage(out).decoder_calls <= 2 * 4 + 2 < len(out.text)


def test_texts_are_those_of_full_masks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crowd = [request(f"free {n}", text(40, n), 60, decoder="blt-s", ignore_eos=True) for n in range(12)]
    engine = crowded_engine(model, max_length=160, max_sequences=30, max_step_rows=24)
    found = run(engine, asked("blt-s", LITERALS) + crowd)
    assert engine.snapshot().preemptions
    parts = [structs.replace(part, output_ids=found[part.id].ids[:9]) for part in asked("blt", LITERALS)]
    rest = run(make_engine(model), parts)
    monkeypatch.setattr(Constraint, "_tail", lambda constraint: memoryview(b""))
    for name, output in run(make_engine(model), asked("blt", LITERALS)).items():
        assert (found[name].ids, ending(found[name])) == (output.ids, ending(output))
        assert (output.ids[:9] + rest[name].ids, ending(rest[name])) == (output.ids, ending(output))


def test_few_questions_are_asked_about_a_long_literal(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes time in proportion to its length."""
    literal = bytes(random.Random(1).choices(b"abcdefghijklmnop", k=300))
    questions, ask = Counter[Any](), Constraint._ask

    def counted(constraint: Constraint, question: Any) -> Any:
        questions[question] += 1
        return ask(constraint, question)

    monkeypatch.setattr(Constraint, "_ask", counted)
    for decoder in ("blt", "blt-s"):
        questions.clear()
        asked = request("a", text(20, 1), 400, decoder=decoder, grammar=of_regex(literal + b"[0-9]" + literal[:50]))
        out = run(make_engine(model), [asked])["a"]
        assert out.text[:300] == literal and out.text[301:] == literal[:50] and ending(out) == "stop"
        assert questions[LLMatcher.compute_bitmask] <= 8, questions
        assert questions[LLMatcher.compute_ff_bytes] <= 12, questions


def test_a_round_asks_once_about_each_of_its_drafts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = request(
        "a", text(20, 1), 200, grammar=of_regex(rb"[a-z ]*"), sampling=SamplingParams(temperature=1, seed=2)
    )
    wanted = run(make_engine(model), [asked])["a"]
    questions, ask = Counter[Any](), Constraint._ask

    def counted(constraint: Constraint, question: Any) -> Any:
        questions[question] += 1
        return ask(constraint, question)

    monkeypatch.setattr(Constraint, "_ask", counted)
    out = run(make_engine(model), [structs.replace(asked, decoder="blt-s", draft_length=16)])["a"]
    assert out.ids == wanted.ids and usage(out).drafted > 200
    assert questions[LLMatcher.compute_bitmask] <= usage(out).drafted + usage(out).rounds + 2, questions


def test_company_chunks_and_preemption_change_nothing(model: Path) -> None:
    wanted = run(make_engine(model), asked("blt", GRAMMARS))
    crowd = [request(f"free {n}", text(40, n), 60, decoder="blt-s", ignore_eos=True) for n in range(12)]
    engine = crowded_engine(model, max_length=160, max_sequences=30, max_step_rows=24)
    found = run(engine, asked("blt-s", GRAMMARS) + crowd)
    assert engine.snapshot().preemptions
    for name, output in wanted.items():
        assert found[name].ids == output.ids


def test_stop_strings_scores_and_a_restart_hold_too(model: Path) -> None:
    grammar, prompt = of_regex(PATTERNS[0]), text(12, 4)
    engine = make_engine(model)
    whole = run(engine, [request("a", prompt, 60, grammar=grammar, logprobs=2)])["a"]
    drafted = run(engine, [request("a", prompt, 60, grammar=grammar, logprobs=2, decoder="blt-s")])["a"]
    assert (drafted.ids, drafted.logprobs) == (whole.ids, whole.logprobs)
    again = run(engine, [request("a", prompt, 60, grammar=grammar, output_ids=whole.ids[:4], decoder="blt-s")])["a"]
    assert [*whole.ids[:4], *again.ids] == whole.ids
    stop = whole.text[5:7]
    cut = run(engine, [request("a", prompt, 60, grammar=grammar, stop=[stop], decoder="blt-s")])["a"]
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_requests_beside_a_constrained_one_are_as_without_it(model: Path) -> None:
    free = [request("free", text(30, 7), 50, decoder="blt-s")]
    alone = run(make_engine(model), free)["free"]
    beside = run(make_engine(model), [*free, *asked("blt", GRAMMARS)])["free"]
    assert bill(beside) == bill(alone)


def test_an_empty_text_that_nothing_can_follow_ends_at_once(model: Path) -> None:
    out = run(make_engine(model), [request("a", text(5, 1), 9, grammar=of_regex(b""))])["a"]
    assert (out.ids, ending(out)) == ([], "stop")


def test_texts_that_a_new_engine_takes_over_are_fed_over_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling, grammar = SamplingParams(temperature=1.0, seed=7), of_regex(rb"[a-z ]*")
    asked = [request(str(n), text(9, n), 70, grammar=grammar, sampling=sampling) for n in range(3)]
    whole, free = run(make_engine(NANO), asked), request("free", text(9, 4), 400)
    rest = [structs.replace(part, output_ids=whole[part.id].ids[:40]) for part in asked]
    advance, ask, fed, questions = Constraint.advance, Constraint._ask, [0], Counter[Any]()

    def slow(constraint: Constraint, token: int) -> None:
        fed[-1] += 1
        time.sleep(0.002)
        advance(constraint, token)

    def counted(constraint: Constraint, question: Any) -> Any:
        questions[question] += 1
        return ask(constraint, question)

    monkeypatch.setattr(Constraint, "advance", slow)
    monkeypatch.setattr(Constraint, "_ask", counted)
    engine, ids = make_engine(NANO), {part.id: list(part.output_ids) for part in [*rest, free]}
    engine.add(free)
    while not ids["free"]:
        ids["free"] += [token for event in engine.step() if isinstance(event, Delta) for token in event.ids]
    for part in rest:
        engine.add(part)
    while engine.has_work:
        fed.append(0)
        events = [event for event in engine.step() if isinstance(event, Delta)]
        assert "free" in {event.id for event in events} or len(ids["free"]) == 400
        for event in events:
            ids[event.id] += event.ids
    assert {name: output.ids for name, output in whole.items()} == {part.id: ids[part.id] for part in rest}
    # One that starts takes its last id besides, and each of three that run takes one.
    assert max(fed) <= 10
    assert questions[LLMatcher.compute_bitmask] <= 3 * (70 - 40 + 2), questions


WEARING = of_regex(rb"(?:\p{L}|[0-9 ]{3}){1,200}")
"""Some twenty states of its lexer for each byte, many of them new."""


def walk(constraint: Constraint, ids: Sequence[int]) -> list[Any]:
    """Masks along a text, two bytes of which are drafts each time."""
    masks = []
    for place, token in enumerate(ids):
        masks += [None if mask is None else mask.tobytes() for mask in constraint.allowed(ids[place : place + 2])]
        masks += [constraint.may_end, constraint.is_finished, constraint.forced(MAX_DRAFT)]
        constraint.advance(token)
    return masks


def test_texts_wear_out_no_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        to_ids(text.encode())
        for text in ("0 1日本語テキスト9 8 Łódź", "いろはにほへとЖизнь777", "δοκιμή0  کتابあ한국어")
    ]
    wanted = [walk(Constraint(compiled(WEARING), 261), ids) for ids in texts]
    monkeypatch.setattr(grammars, "STATES", 150)
    shared = compiled(WEARING)
    together = [Constraint(shared, 261) for _ in texts]
    assert [walk(constraint, ids) for constraint, ids in zip(together, texts, strict=True)] == wanted
    # Others go on with the lexer that these have left, be it worn or not.
    assert walk(Constraint(shared, 261), texts[0]) == wanted[0]
    kept = Grammars()
    first = kept.compile(WEARING).result()
    assert kept.compile(WEARING).result() is first
    monkeypatch.setattr(grammars, "QUICK_SECONDS", 0.0)
    for ids in texts:
        walk(Constraint(first, 261), ids)
    assert first.is_worn and not kept.compile(WEARING).result().is_worn


def test_texts_share_what_replaces_a_worn_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar, draw = of_regex(rb"(a|b)*a(a|b){18}c"), random.Random(2)
    texts = [to_ids(bytes(draw.choices(b"ab", k=80))) for _ in range(24)]
    monkeypatch.setattr(grammars, "STATES", 1_000)
    together, made = [Constraint(shared, 261) for shared in [compiled(grammar)] for _ in texts], list[int]()

    def counted(grammar: str) -> grammars.Compiled:
        made[-1] += 1
        return compiled(grammar)

    monkeypatch.setattr(grammars, "compiled", counted)
    for place in range(80):
        made.append(0)
        for constraint, ids in zip(together, texts, strict=True):
            (mask,) = constraint.allowed([])
            may_end = place > 18 and ids[place - 19] == ord("a") + BYTE_OFFSET
            assert ids_of(mask) == {*to_ids(b"abc" if may_end else b"ab")}
            constraint.advance(ids[place])
    # Half of what a lexer may remember is of texts that move to it.
    assert 0 < sum(made) <= 12 and max(made) <= 2, made


def test_a_worn_grammar_that_is_slow_to_compile_ends_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "STATES", 150)
    monkeypatch.setattr(grammars, "QUICK_SECONDS", 0.0)
    constraint = Constraint(compiled(WEARING), 261)
    for token in to_ids("いろはにほへとЖизнь777".encode()):
        constraint.advance(token)
        (mask,) = constraint.allowed([])
    assert ids_of(mask) == {EOS_ID} and not constraint.may_end and not constraint.forced(MAX_DRAFT)


def test_it_ends_them_within_bytes_that_must_follow_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "STATES", 150)
    monkeypatch.setattr(grammars, "QUICK_SECONDS", 0.0)
    shared = compiled(of_regex(rb"(0|1)abcdefgh(?:\p{L}|[0-9 ]{3}){1,200}"))
    constraint, other = Constraint(shared, 261), Constraint(shared, 261)
    constraint.advance(ord("0") + BYTE_OFFSET)
    assert constraint.forced(MAX_DRAFT) == to_ids(b"abcdefgh")
    for token in to_ids("0abcdefghいろはにほへとЖизнь777".encode()):
        other.advance(token)
        other.allowed([])
    assert shared.is_worn
    constraint.advance(ord("a") + BYTE_OFFSET)
    assert ids_of(constraint.allowed([])[0]) == {EOS_ID} and not constraint.forced(MAX_DRAFT)


def test_requests_with_one_grammar_end_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_ours(tmp_path / "model", our_model(our_config(decoder_input="embedding"), 5))
    sampling = SamplingParams(temperature=1.0, seed=1)
    asked = [
        request(f"{decoder} {n}", text(9, n, specials=False), 16, grammar=WEARING, decoder=decoder, sampling=sampling)
        for decoder in ("blt", "blt-s")
        for n in range(2)
    ]
    wanted = {name: (output.ids, ending(output)) for name, output in run(make_engine(model), asked).items()}
    monkeypatch.setattr(grammars, "STATES", 150)
    engine = make_engine(model)
    for _ in range(2):
        assert {name: (out.ids, ending(out)) for name, out in run(engine, asked).items()} == wanted


def of_lark(lark: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


AMBIGUOUS = of_lark('start: s\ns: s s | "a" | "b" |')
"""Each byte adds two items of the parser, and takes time as their cube."""
OPTIONAL = of_schema(
    {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(200)}, "additionalProperties": False}
)


def test_an_ambiguous_grammar_ends_a_text_before_a_byte_takes_long() -> None:
    constraint, data = Constraint(compiled(AMBIGUOUS), 261, allows_eos=False), random.Random(1).choices(b"ab", k=200)
    began, length = time.thread_time(), 0
    while (ids := ids_of(constraint.allowed([])[0])) != {EOS_ID}:
        assert ids == {*to_ids(b"ab")}
        constraint.advance(data[length] + BYTE_OFFSET)
        length += 1
    # It would be 497 bytes and 6 s with four times as many items.
    assert 100 < length < grammars.ITEMS // 2 and time.thread_time() - began < 1
    assert "items" in constraint.error


def test_a_schema_may_have_many_optional_properties() -> None:
    constraint = Constraint(compiled(OPTIONAL), 261)
    for token in to_ids(json.dumps({f"p{n}": n for n in range(200)}, separators=(",", ":")).encode()):
        assert token in ids_of(constraint.allowed([])[0])
        constraint.advance(token)
    assert constraint.is_finished and not constraint.error


def test_a_text_that_an_ambiguous_grammar_ends_is_the_same_however_it_is_written(model: Path) -> None:
    for grammar in (AMBIGUOUS, of_lark('start: e\ne: e "+" e | e e | /[0-9]/')):
        sampling = SamplingParams(temperature=1.0, seed=4)
        asked = request("a", text(9, 1), 300, grammar=grammar, ignore_eos=True, sampling=sampling)
        whole = run(make_engine(model), [asked])["a"]
        assert ending(whole) == "dead_end" and len(whole.ids) < 130
        drafted = run(make_engine(model), [structs.replace(asked, decoder="blt-s")])["a"]
        assert (drafted.ids, ending(drafted)) == (whole.ids, "dead_end")
        for begun in (len(whole.ids) // 2, len(whole.ids) - 2):
            rest = run(make_engine(model), [structs.replace(asked, output_ids=whole.ids[:begun])])["a"]
            assert ([*whole.ids[:begun], *rest.ids], ending(rest)) == (whole.ids, "dead_end")


def test_the_log_names_the_limit_that_ended_a_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fastblt.engine")
    texts = dict(limited=AMBIGUOUS, dead=of_lark('start: "ab" <[0]> "c"'), matched=of_regex(b"abc"))
    for decoder in ("blt", "blt-s"):
        caplog.clear()
        asked = [
            request(name, text(9, 1), 300, grammar=grammar, decoder=decoder, log_fields={"request": name})
            for name, grammar in texts.items()
        ]
        found = run(make_engine(NANO), asked)
        assert [ending(found[name]) for name in texts] == ["dead_end", "dead_end", "stop"]
        (line,) = (record for record in caplog.records if "dead end" in record.getMessage())
        assert line.__dict__["request"] == "limited"
        assert f"items; max is {grammars.ITEMS}" in line.getMessage() and "\n" not in line.getMessage()


def test_drafts_into_a_dead_end_do_not_take_the_text_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    restarts, restart = Counter[int](), Constraint._restart

    def counted(constraint: Constraint) -> None:
        restarts[id(constraint)] += 1
        restart(constraint)

    monkeypatch.setattr(Constraint, "_restart", counted)
    shared, ids = compiled(AMBIGUOUS), to_ids(bytes(random.Random(1).choices(b"ab", k=140)))
    constraint = Constraint(shared, 261, allows_eos=False)
    for place in range(130):
        found = [None if mask is None else ids_of(mask) for mask in constraint.allowed(ids[place : place + 10])]
        new = Constraint(shared, 261, allows_eos=False)
        for token in ids[:place]:
            new.advance(token)
        assert found == [None if mask is None else ids_of(mask) for mask in new.allowed(ids[place : place + 10])]
        if found[0] == {EOS_ID}:
            break
        constraint.advance(ids[place])
    assert place > 100 and {EOS_ID} in found and restarts[id(constraint)] == 1


def test_a_grammar_that_takes_the_host_too_long_ends_its_texts_and_no_others() -> None:
    pattern = of_regex(PATTERNS[0])
    slow, well = compiled(pattern), Constraint(compiled(pattern), 261)
    texts = [Constraint(slow, 261) for _ in range(2)]
    for token in to_ids(b"abcde fgh"):
        for constraint in (*texts, well):
            assert token in ids_of(constraint.allowed([token])[0])
            constraint.advance(token)
    # Short answers make up for a long one.
    for seconds in (0.09, *[0.0] * 45, 0.09):
        slow.charge(seconds)
    assert not slow.is_slow
    slow.charge(0.3)
    for _ in range(1000):
        slow.charge(0.0)
    for constraint in (*texts, Constraint(slow, 261)):
        constraint.advance(ord("i") + BYTE_OFFSET)
        assert [None if mask is None else ids_of(mask) for mask in constraint.allowed(to_ids(b"j"))] == [{EOS_ID}, None]
        assert not constraint.may_end and not constraint.forced(MAX_DRAFT) and constraint.error
    assert len(ids_of(well.allowed([])[0])) > 1


def test_an_answer_that_takes_long_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = compiled(
        of_lark("start: " + " | ".join(f"s{n}" for n in range(9)) + "".join(f'\ns{n}: "{n}"' for n in range(9)))
    )
    constraint = Constraint(shared, 261)
    constraint.allowed([])
    assert not shared.is_slow
    monkeypatch.setattr(grammars, "ANSWER_SECONDS", 0.0)
    monkeypatch.setattr(grammars, "OWED_SECONDS", 1e-6)
    constraint.advance(ord("a") + BYTE_OFFSET)
    assert shared.is_slow


def test_compiled_grammars_are_kept_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Grammars()
    small, other = (of_regex(pattern) for pattern in (b"a", b"b"))
    first = kept.compile(small)
    assert kept.compile(small) is first
    kept.compile(other)
    assert kept.compile(small) is first
    # Large ones take the room of many small ones.
    monkeypatch.setattr(grammars, "KEPT_BYTES", 2 * grammars.BYTES_PER_STATE * grammars.STATES + 1_000_000)
    large = of_regex(b"c" * 10_000)
    third = kept.compile(large)
    assert kept.compile(large) is third and kept.compile(small) is not first


def test_ignoring_eos_goes_on_as_long_as_the_grammar_does(model: Path) -> None:
    out = run(make_engine(model), [request("a", text(5, 1), 33, grammar=of_regex(rb"(ab)*"), ignore_eos=True)])["a"]
    assert out.text == b"ab" * 16 + b"a" and ending(out) == "length"


def test_a_dead_end_says_so(model: Path) -> None:
    grammar = LLMatcher.grammar_from_lark('start: "ab" start')
    out = run(make_engine(model), [request("a", text(5, 1), 4000, grammar=grammar)])["a"]
    assert ending(out) == "dead_end"
    assert set(out.text) <= set(b"ab")
    # Also where an EOS of the model would be one more id: this one only ends the text.
    assert usage(out).completion_tokens == len(out.text)


def test_a_special_id_that_a_grammar_names_is_a_dead_end(model: Path) -> None:
    grammar = LLMatcher.grammar_from_lark('start: "ab" <[0]> "c"')
    out = run(make_engine(model), [request("a", text(5, 1), 30, grammar=grammar, decoder="blt-s")])["a"]
    assert (out.text, ending(out)) == (b"ab", "dead_end")


def test_a_bad_grammar_fails_alone(model: Path) -> None:
    engine = make_engine(model)
    engine.add(Request(id="bad", prompt_ids=[BOS_ID], max_tokens=5, grammar=LLMatcher.grammar_from_regex("(")))
    engine.add(request("good", text(9, 1), 12))
    events = all_events(engine)
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert failed.id == "bad" and failed.code == "invalid" and "unclosed group" in failed.message
    assert [event.id for event in events if isinstance(event, Finished)] == ["good"]
    with pytest.raises(GrammarError):
        compiled(LLMatcher.grammar_from_lark("start: start"))


def test_aborting_a_request_whose_grammar_is_not_ready_ends_it(model: Path) -> None:
    engine = make_engine(model)
    engine.add(request("a", text(9, 1), 12, grammar=GRAMMARS[0]))
    engine.abort("a")
    (event,) = engine.step()
    assert isinstance(event, Finished) and event.reason == "abort"
    assert not engine.has_work


def test_no_grammar_is_compiled_for_requests_that_are_gone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiling, begun, go = list[str](), threading.Event(), threading.Event()

    def slow(grammar: str) -> grammars.Compiled:
        compiling.append(grammar)
        begun.set()
        assert go.wait(60)
        return compiled(grammar)

    monkeypatch.setattr(grammars, "compiled", slow)
    engine = make_engine(model)
    for number, grammar in enumerate(GRAMMARS[:5] * 2):
        engine.add(request(str(number), text(9, 1), 12, grammar=grammar))
    assert begun.wait(60)
    # One of two that wait for the second grammar; both of the first, which is under way, the third and the fourth.
    for number in (1, 0, 5, 2, 7, 3, 8):
        engine.abort(str(number))
    # The fourth is wanted again.
    engine.add(request("again", text(9, 1), 12, grammar=GRAMMARS[3]))
    go.set()
    ended = {event.id: event.reason for event in all_events(engine) if isinstance(event, Finished)}
    assert ended.keys() == {*map(str, range(10)), "again"}
    assert {name for name, reason in ended.items() if reason != "abort"} == {"4", "6", "9", "again"}
    assert compiling == [GRAMMARS[0], GRAMMARS[1], GRAMMARS[4], GRAMMARS[3]]


def test_time_ends_while_a_grammar_is_compiled(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    monkeypatch.setattr(grammars, "compiled", lambda grammar: go.wait(60) and compiled(grammar))
    engine, ids = make_engine(model), to_ids(b"begun th")
    engine.add(request("other", text(9, 1), 5, grammar=GRAMMARS[2]))
    begun = {"stop": [b"the end"], "output_ids": ids, "submitted": time.monotonic() - 2, "timeout": 2.2}
    engine.add(request("late", text(9, 1), 99, grammar=GRAMMARS[0], **begun))
    events = list[Event]()
    while not events:
        events += engine.step()
    (late,) = events
    assert isinstance(late, Finished)
    # An engine that was lost had held the end of its text back.
    assert (late.id, late.reason, late.text) == ("late", "timeout", b"th")
    assert late.usage.prompt_tokens == 9 and late.usage.completion_tokens == len(ids)
    assert late.usage.queue_seconds >= 2.2
    go.set()
    (other,) = (event for event in all_events(engine) if isinstance(event, Finished))
    assert other.id == "other" and other.usage.queue_seconds >= 0.2


def test_random_weights_of_a_preset_write_json(tmp_path: Path) -> None:
    preset = PRESETS["tiny"]
    tensors = random_tensors(preset, 0)
    save(tmp_path, calibrated(preset, tensors), tensors)
    engine: Engine = make_engine(tmp_path)
    out = run(engine, [request("a", text(9, 1), 60, grammar=of_schema(SCHEMAS[1]), decoder="blt-s")])["a"]
    jsonschema.validate(json.loads(out.text), SCHEMAS[1])
