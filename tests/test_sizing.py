"""What `fastblt size` says, against engines that really run: their tensors, their pools, their accounting."""

import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner

from benchmarks.generate import TEXT
from engine.checkpoint import PRESETS, load, random_tensors
from engine.config import EngineConfig, PatchingRule
from engine.costs.accounting import PaperFormula, StageBytes
from engine.engine import Engine
from engine.memory.caches import longest_draft, plan_caches
from engine.memory.weights import WeightBytes
from engine.types import Finished, Usage
from kernels.stack import StackWeights
from server.cli import app
from server.sizing import Drafting, Load, Sizing, caches_held, engine_for, readings, size
from tests.engines import Output, make_engine, request, run
from tests.models import text
from tests.test_checkpoint_formats import META_CONFIG, write_meta

NANO = Path(__file__).parents[1] / "models" / "nano"
HOWS: list[dict[str, Any]] = [{"decoder": decoder} for decoder in ("blt", "blt-s", "blt-d", "blt-dv")]
runner = CliRunner()


def tensors(held: object, seen: set[int]) -> Iterator[Tensor]:
    """All tensors of numbers that hang on an object of ours; indices are not weights."""
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, Tensor):
        if held.is_floating_point():
            yield held
    elif isinstance(held, (list, tuple)):
        for part in held:
            yield from tensors(part, seen)
    elif isinstance(held, FunctionType):
        # A stack of layers is a function over its weights.
        for cell in held.__closure__ or ():
            yield from tensors(cell.cell_contents, seen)
    elif is_dataclass(held):
        for part in fields(held):
            yield from tensors(getattr(held, part.name), seen)
    elif type(held).__module__.startswith(("engine.", "kernels.")) and hasattr(held, "__dict__"):
        for part in vars(held).values():
            yield from tensors(part, seen)


def num_bytes(held: object) -> int:
    return sum(tensor.nbytes for tensor in tensors(held, set()))


@pytest.fixture(params=["nano", "tiny"])
def model(request: pytest.FixtureRequest, tiny: Path) -> Path:
    return NANO if request.param == "nano" else tiny


def hash_itemsize(folder: Path) -> int:
    return next(t.dtype.itemsize for name, t in load(folder).tensors.items() if "hash" in name)


@pytest.mark.parametrize(
    "choices", [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "weights": "float8"}], ids=["f32", "bf16", "f8"]
)
def test_sized_weights_equal_the_tensors_of_an_engine(model: Path, choices: dict[str, Any]) -> None:
    engine = make_engine(model, kernels="torch", **choices)
    itemsize, fp8 = (4 if not choices else 2), "weights" in choices
    expected = WeightBytes.of(engine.model_config, itemsize, hash_itemsize(model), fp8=fp8)
    held = engine.parts.model
    assert held
    assert num_bytes(held) == expected.total
    assert num_bytes(held.encoder.hashes) == expected.hash_tables
    stacks = [part.stack for part in (held.patcher, held.encoder, held.global_transformer, held.decoder)]
    weights = [
        cell.cell_contents
        for stack in stacks
        if isinstance(stack, FunctionType)
        for cell in stack.__closure__ or ()
        if isinstance(cell.cell_contents, StackWeights)
    ]
    assert num_bytes([w.layers[0].rope for w in weights]) == expected.rotary_tables
    assert num_bytes([held.encoder.embedding, *(w.embedding for w in weights)]) == expected.byte_tables
    assert engine.info().weight_bytes == expected.stages


@pytest.mark.parametrize("choices", [{}, {"cache_bytes": 20 << 20, "dtype": "bfloat16"}, {"max_length": 300}])
def test_page_pools_of_an_engine_equal_the_planned_ones(model: Path, choices: dict[str, Any]) -> None:
    engine = make_engine(model, **choices)
    given = {"cache_bytes": 64 << 20, "page_size": 16} | choices
    plan = plan_caches(engine.model_config, EngineConfig(str(model), **given))
    assert num_bytes(engine.memory.caches) == plan.num_bytes <= given["cache_bytes"]
    # The scratch page belongs to no sequence.
    assert engine.limits.pages == {name: count - 1 for name, count in plan.pages.items()}
    assert {name: pool.total for name, pool in engine.snapshot().pools.items()} == engine.limits.pages
    assert engine.limits.max_length == plan.max_length


def sized(model: Path, **choices: Any) -> Sizing:
    return size(load(model).config, EngineConfig(str(model)), hash_itemsize(model), Drafting(), **choices)


def engine_of(model: Path, sizing: Sizing, **choices: Any) -> Engine:
    """With the flags that are advised."""
    flags = {name: getattr(sizing, name) for name in ("max_sequences", "max_step_rows", "cache_bytes")}
    return Engine(EngineConfig(str(model), **(flags | choices)))


def crowd(engine: Engine, count: int, context: int) -> tuple[int, dict[str, int]]:
    """Runs `count` sequences of `context` ids, of all decoders; most that ran at once, most pages in use."""
    # So many bytes that nobody ends before the last has begun.
    output = min(context // 2, 400)
    # Pages are looked at after every byte.
    engine.stepper.ahead.policy = "never"
    for i in range(count):
        engine.add(request(str(i), text(context - output, i, specials=False), output, **HOWS[i % len(HOWS)]))
    running, used = 0, dict.fromkeys(engine.memory.caches.pools, 0)
    while engine.has_work:
        engine.step()
        running = max(running, len(engine.running))
        used = {name: max(count, engine.memory.caches.pools[name].num_used) for name, count in used.items()}
    return running, used


@pytest.mark.parametrize("context", [200, 1000, 3000])
def test_as_many_sequences_as_sized_run_at_once_without_preemption(tiny: Path, context: int) -> None:
    sizing = sized(tiny, context=context, patch=3.5, sequences=8)
    engine = engine_of(tiny, sizing)
    running, used = crowd(engine, 8, context)
    assert running == 8
    assert engine.snapshot().preemptions == 0
    # And no sequence is said to hold much more than it does.
    for name, spec in engine.memory.caches.specs.items():
        draft = longest_draft(engine.model_config)
        assert used[name] <= 8 * sizing.caches[name].pages + spec.pages_between(sizing.max_step_rows, draft)
    assert sum(used[name] * engine.memory.caches.page_bytes[name] for name in used) > 0.6 * 8 * sizing.sequence_bytes


def test_twice_as_many_sequences_as_sized_do_not_run_at_once(tiny: Path) -> None:
    sizing = sized(tiny, context=2500, patch=3.5, sequences=4)
    engine = engine_of(tiny, sizing, max_sequences=8)
    running, _ = crowd(engine, 8, 2500)
    assert running < 8 or engine.snapshot().preemptions > 0


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("context", [1, 700, 9000])
def test_the_suggested_flags_are_the_least_that_hold_the_load(preset: str, context: int) -> None:
    config = PRESETS[preset]
    context = min(context, config.max_length)
    load_of = Load(5, context, 4.5)
    chosen = engine_for(config, EngineConfig("x", dtype="bfloat16"), load_of, Drafting())
    plan = plan_caches(config, chosen)
    held = caches_held(config, chosen, load_of)
    assert all(plan.pages[name] > 5 * cache.pages for name, cache in held.items())
    assert plan.max_length >= context and plan.max_patches >= load_of.patches
    assert plan.num_bytes == chosen.cache_bytes
    less = plan_caches(config, replace(chosen, cache_bytes=chosen.cache_bytes - 1))
    assert any(less.pages[name] < plan.pages[name] for name in held)


def test_memory_holds_exactly_the_number_of_sequences_stated() -> None:
    def of(**choices: Any) -> Sizing:
        drafting = Drafting(8, 0.9, 0.8, 3)
        config = EngineConfig("x", dtype="bfloat16")
        return size(PRESETS["3b"], config, 2, drafting, context=2048, patch=4.5, **choices)

    most = of(memory=40 << 30).sequences_fitting
    assert most and most > 64
    assert of(memory=40 << 30, sequences=most).memory_needed <= 40 << 30
    assert of(memory=40 << 30, sequences=most + 1).memory_needed > 40 << 30
    assert of(memory=40 << 30).sequences == 64
    assert of(memory=14 << 30).sequences == of(memory=14 << 30).sequences_fitting < 64
    assert of(memory=8 << 30).sequences_fitting == 0


def usages(outputs: dict[str, Output]) -> list[Usage]:
    return [output.end.usage for output in outputs.values() if isinstance(output.end, Finished)]


@pytest.mark.parametrize("how", HOWS, ids=lambda how: how["decoder"])
@pytest.mark.parametrize("count", [1, 4])
def test_estimated_bytes_read_equal_the_accounting_of_real_generation(how: dict[str, Any], count: int) -> None:
    source = TEXT.read_bytes()
    length, output = 1200, 160
    prompts = [[1, *(byte + 4 for byte in source[i * 3000 :][: length - 1])] for i in range(count)]
    engine = Engine(EngineConfig(str(NANO), kernels="torch", max_step_rows=count * length, cache_bytes=2 << 30))
    found = usages(run(engine, [request(str(i), prompt, output, **how) for i, prompt in enumerate(prompts)]))
    counts, decoder = engine.snapshot().decoders[how["decoder"]], how["decoder"]
    # As an operator reads them off the metrics.
    acceptance = counts.accepted / counts.drafted if counts.drafted else 1.0
    passes = counts.calls["decoder"] / counts.rounds if decoder == "blt-d" else 1.0
    patch = counts.committed / engine.ledger.decoders[decoder].patches
    config = engine.model_config
    reading = {
        reading.decoder: reading
        for reading in readings(
            config,
            StageBytes.of(config, 4, hash_itemsize(NANO)),
            PaperFormula.of(config, 4),
            Load(count, length + output // 2, patch),
            Drafting(8, acceptance, acceptance, passes),
        )
    }[decoder]
    committed = sum(usage.completion_tokens for usage in found)
    assert committed == count * output

    def per_byte(field: str) -> float:
        return float(sum(getattr(usage, field) for usage in found)) / committed

    # The first byte and the last draft, which is shorter, are rounds too.
    assert reading.committed == pytest.approx(committed / counts.rounds, rel=0.1)
    assert reading.decoder_calls == pytest.approx(per_byte("decoder_calls"), rel=0.06)
    assert reading.global_calls == pytest.approx(per_byte("global_calls"), rel=0.1)
    assert reading.estimated_bytes == pytest.approx(per_byte("estimated_bytes"), rel=0.05)
    if count == 1:
        assert reading.shared_bytes_read == reading.bytes_read == pytest.approx(per_byte("bytes_read"), rel=0.04)
    else:
        # Real sequences fall out of step, blocks most, as they take different numbers of passes.
        assert 0.65 * per_byte("bytes_read") < reading.shared_bytes_read < 1.02 * per_byte("bytes_read")
        assert reading.shared_bytes_read < 0.7 * reading.bytes_read


def test_the_bound_on_speed_is_bandwidth_divided_by_bytes_read() -> None:
    config = PRESETS["nano"]
    found = readings(
        config, StageBytes.of(config, 4, 2), PaperFormula.of(config, 4), Load(3, 900, 4), Drafting(block_passes=5), 1e9
    )
    for reading in found:
        assert reading.bytes_per_second == pytest.approx(1e9 / reading.bytes_read)
        assert reading.shared_bytes_per_second == pytest.approx(1e9 / reading.shared_bytes_read)
        assert reading.shared_bytes_read < reading.bytes_read


# The command.


def shown(*arguments: object) -> str:
    result = runner.invoke(app, ["size", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object) -> str:
    result = runner.invoke(app, ["size", *map(str, arguments)])
    assert result.exit_code in (1, 2)
    return " ".join(result.stderr.split())


def test_size_json_has_the_sizes_and_the_sources_of_their_numbers() -> None:
    found = json.loads(shown("--model", NANO, "--json", "--acceptance", "0.5", "--memory", "1GiB"))
    assert found["sources"] == {
        "patch_size": "measured",
        "acceptance": "given",
        "block_acceptance": "measured",
        "block_passes": "measured",
    }
    assert found["drafting"]["acceptance"] == 0.5
    card = {row["name"]: row for row in json.loads((NANO / "decoders.json").read_text())["rows"]}
    assert found["drafting"]["block_acceptance"] == card["BLT-DV-8 one step"]["real_acceptance"]
    assert found["weights"]["total"] == WeightBytes.of(load(NANO).config, 4, 2).total
    assert {reading["decoder"] for reading in found["decoders"]} == {"blt", "blt-s", "blt-d", "blt-dv"}


def test_size_of_a_preset_equals_that_of_its_folder(tiny: Path) -> None:
    flags = ("--patch-size", 4, "--sequences", 3, "--json")
    folder, preset = (json.loads(shown(*which, *flags)) for which in (("--model", tiny), ("--config", "tiny")))
    # The fixture's tables are written in float32.
    assert folder["weights"].pop("hash_tables") == 2 * preset["weights"].pop("hash_tables")
    assert folder["weights"].pop("stages") == preset["weights"].pop("stages")
    assert folder["cache_bytes"] == preset["cache_bytes"]


@pytest.mark.parametrize("preset", PRESETS)
def test_size_tables_fit_into_120_columns_and_name_the_flags(preset: str) -> None:
    flags = ["--config", preset, "--dtype", "bfloat16", "--memory", "640GiB", "--bandwidth", "8TB/s"]
    out, found = shown(*flags), json.loads(shown(*flags, "--json"))
    assert max(map(len, out.splitlines())) <= 120
    for name in ("max_sequences", "max_step_rows", "cache_bytes"):
        assert f"--{name.replace('_', '-')} {found[name]}" in out
    assert f"{found['weights']['total']:,}" in out and f"{found['sequence_bytes']:,}" in out
    for reading in found["decoders"]:
        assert f"{reading['shared_bytes_per_second']:,.0f}" in out
    assert "assumed" in out


def test_size_reports_too_little_memory() -> None:
    assert "too little for the weights" in shown("--config", "1b", "--memory", "1GiB")
    assert "too little for one sequence" in shown("--config", "1b", "--memory", "13GiB")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --model or --config"),
        (["--config", "tiny", "--model", "x"], "give either --model or --config"),
        (["--model", "/nowhere"], "no such directory"),
        (["--config", "tiny", "--context", "5000"], "--context: must be from 1 to 4096 bytes"),
        (["--config", "tiny", "--context", "0"], "--context: must be from 1 to 4096 bytes"),
        (
            ["--config", "1b", "--context", "20000", "--patch-size", "2"],
            "are 10000 patches; a sequence of 1b has at most 4096",
        ),
        (["--config", "tiny", "--patch-size", "9"], "--patch-size: must be from 1 to 8 bytes for tiny, not 9"),
        (["--config", "tiny", "--patch-size", "nan"], "--patch-size: must be from 1 to 8 bytes for tiny, not nan"),
        (["--config", "tiny", "--patch-size", "-3", "--training"], "--patch-size: must be from 1 to 8 bytes for tiny"),
        (["--config", "tiny", "--patch-size", "0", "--simulate"], "--patch-size: must be from 1 to 8 bytes for tiny"),
        (["--config", "tiny", "--acceptance", "91"], "--acceptance: must be a share of the drafted bytes"),
        (["--config", "tiny", "--block-acceptance", "-1"], "--block-acceptance: must be a share"),
        (
            ["--config", "tiny", "--block-passes", "9"],
            "--block-passes: must be from 1 to 8 for blocks of 8 bytes, not 9",
        ),
        (["--config", "1b", "--block-passes", "3"], "--block-passes: 1b was not trained with block diffusion"),
        (
            ["--config", "tiny", "--draft-length", "12"],
            "--acceptance is needed for --draft-length 12; it is known only for 4, 8, 16",
        ),
        (["--config", "tiny", "--memory", "80GB!"], "'80GB!' is not a number of bytes"),
        (["--config", "tiny", "--memory", "80 quux"], "'80 quux' is not a number of bytes"),
        (["--config", "tiny", "--reserve", "1"], "--reserve: must be a share of the memory"),
        (["--config", "tiny", "--bandwidth", "0"], "--bandwidth: must be above 0"),
    ],
)
def test_size_refuses_impossible_numbers(arguments: list[str], message: str) -> None:
    assert message in refused(*arguments)


def test_size_names_a_decoders_json_that_is_not_valid(tmp_path: Path) -> None:
    for file in NANO.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "decoders.json").unlink()
    assert "assumed" in shown("--model", tmp_path)
    (tmp_path / "decoders.json").write_text("[]")
    assert "decoders.json: expected a JSON object, found list" in refused("--model", tmp_path)
    (tmp_path / "decoders.json").write_text('{"rows": [{"name": "BLT"}]}')
    assert "decoders.json: must be as `fastblt compare --write` writes it" in refused("--model", tmp_path)
    (tmp_path / "decoders.json").write_text("{}")
    assert "decoders.json: must be as `fastblt compare --write` writes it" in refused("--model", tmp_path)


def test_size_of_a_config_takes_its_patcher_or_refuses_one(tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", random_tensors(META_CONFIG, 0), hub=True, beside=False)
    of_whole = shown("--config", tmp_path / "meta", "--json")
    (tmp_path / "meta" / "entropy_model").rename(tmp_path / "apart")
    assert "--patcher" in refused("--config", tmp_path / "meta")
    assert shown("--config", tmp_path / "meta", "--patcher", tmp_path / "apart", "--json") == of_whole
    for own in ("tiny", NANO / "config.json"):
        said = refused("--config", own, "--patcher", tmp_path / "apart")
        assert f"--patcher {tmp_path / 'apart'}: {own} has its own" in said
    assert "contains its own" in refused("--config", NANO, "--patcher", tmp_path / "apart")


def test_size_of_a_model_with_single_byte_patches_needs_no_patch_size() -> None:
    config = replace(PRESETS["tiny"], patching=PatchingRule(mode="bytes"))
    sizing = size(config, EngineConfig("x"), 2, Drafting(block_passes=2), context=500, patch=1.0, sequences=2)
    assert sizing.caches["global"].rows == 500
    assert sizing.decoders[0].global_calls == 1.0
