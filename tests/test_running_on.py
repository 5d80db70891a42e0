"""Whatever is asked of an engine, and whenever: running ahead gives the bytes and the usage of never running ahead."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config import EOS_ID, PatchingRule
from engine.engine import Engine
from engine.step import ahead
from engine.types import Finished, Request, SamplingParams, UnmaskRule
from tests.engines import Output, crowded_engine, make_engine, request, save_ours
from tests.models import our_config, our_model, text

LONGEST, BLOCK = 128, 6
ROOMY = 512
"""Rows of a step that all these requests fit into."""
RULES = {
    "threshold": PatchingRule(max_patch_length=5),
    "rise": PatchingRule(threshold_add=0.1, max_patch_length=6),
    "monotonic": PatchingRule(monotonic=True),
    "bytes": PatchingRule(mode="bytes"),
    # Never reached: patches end with the longest length alone.
    "long": PatchingRule(threshold=9.0, max_patch_length=20),
}
SAMPLINGS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.8, seed=3),
    SamplingParams(temperature=1.0, top_p=0.9, seed=1),
    SamplingParams(temperature=1.0, seed=2, logit_bias={EOS_ID: 3.0, 100: -2.0}),
    SamplingParams(temperature=0.7, top_k=5, min_p=0.05, seed=5, presence_penalty=0.5, frequency_penalty=0.2),
    SamplingParams(temperature=0, frequency_penalty=-0.1, repetition_penalty=1.2, logit_bias={EOS_ID: 2.0, 100: 1.0}),
]
WAYS: list[dict[str, Any]] = [
    {},
    {"decoder": "blt-s", "draft_length": 4},
    {"decoder": "auto"},
    {"decoder": "blt-d", "unmask": UnmaskRule(rule="confidence", alpha=0.03)},
    {"decoder": "blt-d", "finish_patch": True},
    {"decoder": "blt-dv", "unmask": UnmaskRule(rule="entropy", gamma=1.0)},
]
Models = Callable[[str, str, int], Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """By patching rule, what the decoder reads, and the most patches of a text."""
    folder = tmp_path_factory.mktemp("models")

    def model(rule: str, reads: str, patches: int) -> Path:
        path = folder / f"{rule}-{reads}-{patches}"
        if not path.exists():
            blocks = {"mask_id": 260, "block_size": BLOCK} if reads == "embedding" else {}
            forms = {"decoder_input": reads, "isolate_documents": rule != "monotonic", **blocks}
            config, tensors = our_model(our_config(patching=RULES[rule], **forms), len(rule))
            patching = config.patching if rule != "long" else RULES[rule]
            stack = replace(config.global_, max_positions=patches)
            save_ours(path, (replace(config, patching=patching, global_=stack), tensors))
        return path

    return model


@dataclass(frozen=True)
class Asked:
    """A request, after how many steps it comes, and after how many ids it is aborted."""

    request: Request
    step: int
    abort: int | None


@st.composite
def lists(draw: st.DrawFn, ways: Sequence[dict[str, Any]]) -> list[Asked]:
    """What is asked of an engine: often of one kind, so that there are steps in which all sequences do the same."""
    ways = draw(st.sampled_from([ways[:1], *([way] for way in ways), *([ways[0], way] for way in ways)]))
    scored, ends = draw(st.booleans()), draw(st.booleans())
    asked = []
    for number in range(draw(st.integers(1, 8))):
        # Prompts that begin alike find each other's prefixes.
        prompt, tokens = text(draw(st.integers(1, 80)), draw(st.integers(0, 3))), draw(st.integers(0, LONGEST - 80))
        how = draw(st.sampled_from(ways)) | {
            "sampling": draw(st.sampled_from(SAMPLINGS)),
            "min_tokens": min(draw(st.sampled_from([0, 0, 0, 9])), tokens),
            "ignore_eos": not ends,
            "stop": draw(st.sampled_from([[], [b"e"], [b"th", b"o"]])) if ends else [],
            "logprobs": draw(st.sampled_from([None, 2])) if scored else None,
            "prompt_logprobs": draw(st.sampled_from([False, False, True])),
            "priority": draw(st.integers(0, 1)),
            "output_ids": text(10, number)[1 : 1 + tokens] if draw(st.integers(0, 5)) == 5 else [],
            "trace": True,
        }
        if how.get("decoder") in ("blt-d", "auto"):
            tokens = max(tokens - BLOCK, 0)
            how["output_ids"] = how["output_ids"][:tokens]
        step = draw(st.integers(0, 20)) if number % 2 else 0
        asked.append(
            Asked(
                request(str(number), prompt, tokens, **how),
                step,
                draw(st.none() | st.integers(0, 20)) if ends else None,
            )
        )
    return asked


SETTINGS = st.fixed_dictionaries(
    {
        "page_size": st.sampled_from([4, 16, 64]),
        "prefix_cache": st.booleans(),
        "max_step_rows": st.sampled_from([ROOMY, 3, 17]),
        "max_sequences": st.sampled_from([2, 8]),
        "graphs": st.booleans(),
        "kernels": st.sampled_from(["native", "torch"]),
        "dtype": st.sampled_from(["float32", "float32", "bfloat16"]),
    }
)


def forgetting(engine: Engine) -> Engine:
    """What a stage gave is gone once the stage has run again, as with a recorded graph."""
    launch = engine.stepper.executor.run
    last: dict[str, Tensor] = {}

    def run(name: str, *rest: Any) -> Tensor:
        out = launch(name, *rest)
        if name in last:
            last[name].zero_()
        last[name] = out
        return out

    engine.stepper.executor.run = run  # type: ignore[method-assign]
    return engine


def run(engine: Engine, asked: Sequence[Asked]) -> dict[str, Output]:
    """What it says of each; holds it to no page left."""
    outputs = {a.request.id: Output() for a in asked}
    step = 0
    while engine.has_work or any(a.step >= step for a in asked):
        for a in asked:
            if a.step == step:
                engine.add(a.request)
            if a.step <= step and a.abort is not None and len(outputs[a.request.id].ids) >= a.abort:
                engine.abort(a.request.id)
        for event in engine.step():
            outputs[event.id].take(event)
        step += 1
    assert all(output.end for output in outputs.values())
    assert not any(pool.used for pool in engine.snapshot().pools.values())
    engine.memory.caches.check_integrity()
    return outputs


def said(output: Output) -> tuple[Any, ...]:
    end = output.end
    # Behind a stop in the middle of a draft more may have been decided.
    starts = [start for start in output.patch_starts if start < len(output.ids)]
    ended = end.reason if isinstance(end, Finished) else end
    return output.ids, output.text, output.logprobs, output.prompt_logprobs, starts, ended


def bill(a: Asked, output: Output, *, full_steps: bool) -> tuple[Any, ...] | None:
    """None if it depends on company: what ran behind a stop did run, a preempted round runs twice, ids of an engine
    that died run in chunks, and auto goes by the clock."""
    end = output.end
    if not isinstance(end, Finished) or end.reason != "length" or end.usage.preemptions:
        return None
    if a.request.decoder == "auto" or a.request.output_ids:
        return None
    if a.request.decoder == "blt-s" and (EOS_ID in output.ids or EOS_ID in a.request.sampling.logit_bias):
        return None  # A draft in one launch goes on after an EOS, whether or not that is accepted.
    u = end.usage
    # A step that is full runs the bytes of a block before the next block, in a call of their own.
    calls = () if full_steps and a.request.decoder == "blt-d" else (u.decoder_calls, u.global_calls)
    return u.completion_tokens, u.rounds, u.drafted, u.accepted, *calls, u.rows


MODELS = {
    "rule": st.sampled_from(list(RULES)),
    "reads": st.sampled_from(["embedding", "encoder"]),
    "patches": st.sampled_from([4096, 4096, 16]),
    "most_bytes": st.integers(1, 8),
}


def check(models: Models, rule: str, reads: str, patches: int, most_bytes: int, crowded: bool, **given: Any) -> None:
    """given: what is asked, and the settings."""
    model, asked = models(rule, reads, patches), given.pop("asked")
    make = crowded_engine if crowded else make_engine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ahead, "MOST_LAUNCHED", most_bytes)
        wanted, found = (
            run(forgetting(make(model, max_length=LONGEST, run_ahead=policy, **given)), asked)
            for policy in ("never", "always")
        )
    for a in asked:
        one, other = wanted[a.request.id], found[a.request.id]
        if a.abort is None:
            assert said(other) == said(one)
            full_steps = given.get("max_step_rows", ROOMY) < ROOMY
            bills = bill(a, one, full_steps=full_steps), bill(a, other, full_steps=full_steps)
            assert None in bills or bills[0] == bills[1]
        else:
            assert all(x == y for x, y in zip(one.ids, other.ids, strict=False))


@pytest.mark.parametrize("examples", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_running_ahead_changes_neither_text_nor_usage(models: Models, examples: int) -> None:
    @settings(max_examples=examples)
    @given(choices=SETTINGS, crowded=st.booleans(), data=st.data(), **MODELS)
    def holds(reads: str, choices: dict[str, Any], data: st.DataObject, **how: Any) -> None:
        asked = data.draw(lists(WAYS if reads == "embedding" else WAYS[:3]))
        check(models, reads=reads, asked=asked, **how, **choices)

    holds()


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(page_size=st.sampled_from([4, 16]), crowded=st.booleans(), data=st.data(), **MODELS)
def test_running_ahead_in_tritons_interpreter_changes_neither_text_nor_usage(
    models: Models, reads: str, data: st.DataObject, **how: Any
) -> None:
    """A few requests of a few bytes: the interpreter takes about a second for each."""
    ways = data.draw(st.sampled_from([WAYS[:1], WAYS[:1], WAYS[1:2], WAYS[3:4] if reads == "embedding" else WAYS[:1]]))
    asked = [
        Asked(
            request(
                str(number), text(data.draw(st.integers(1, 12)), number), data.draw(st.integers(1, 12)), trace=True,
                sampling=data.draw(st.sampled_from(SAMPLINGS)), ignore_eos=data.draw(st.booleans()), **ways[0],
            ),
            data.draw(st.integers(0, 3)),
            data.draw(st.none() | st.integers(0, 5)),
        )
        for number in range(data.draw(st.integers(1, 2)))
    ]  # fmt: skip
    check(models, reads=reads, asked=asked, kernels="triton", prefix_cache=False, **how)
