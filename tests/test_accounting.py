"""Bytes: the paper's by its tables, the engine's by counting weights."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint import PRESETS, count_parameters
from engine.costs.accounting import PaperFormula, StageBytes
from engine.types import Finished, UnmaskRule
from tests.engines import make_engine, request, run
from tests.models import text

NANO = Path(__file__).parents[1] / "models" / "nano"

# decoder NFE, encoder/global NFE, GB, percent saved against the first row of its table (Fast BLT, tables 3 to 10).
TABLES = {
    "1b fr-en": [(512, 250, 814.95, 0), (526, 212, 719.45, 11.72), (558, 125, 504.08, 38.15), (77, 32, 107.92, 86.76)],
    "1b de-en": [(512, 269, 864.76, 0), (534, 215, 729.53, 15.64), (188, 135, 414.05, 52.12), (86, 86, 252.74, 70.77)],
    "1b humaneval": [(512, 210, 711.20, 0), (517, 208, 707.67, 0.50), (574, 69, 362.77, 48.99)],
    "3b fr-en": [(512, 308, 1920.99, 0), (534, 215, 1395.99, 27.33), (162, 32, 233.87, 87.83), (99, 99, 598.66, 68.84)],
    "3b de-en": [(512, 283, 1776.54, 0), (721, 86, 724.53, 59.22), (146, 64, 411.05, 76.86), (88, 88, 529.76, 70.18)],
    "3b humaneval": [
        (512, 250, 1590.45, 0),
        (532, 120, 853.11, 46.36),
        (62, 32, 201.98, 87.30),
        (75, 75, 453.15, 71.51),
    ],
    "3b mbpp": [(256, 222, 1349.34, 0), (302, 37, 310.63, 76.98), (39, 16, 103.64, 92.32), (42, 42, 255.40, 81.07)],
}


def formula(preset: str) -> PaperFormula:
    of = PaperFormula.of(PRESETS[preset], 2)
    # The paper's figures leave the byte table of the 3B's decoder out, as those of the 1B, which has none.
    own_table = 261 * PRESETS[preset].decoder.dim if PRESETS[preset].decoder_input == "embedding" else 0
    return replace(of, decoder=of.decoder - own_table)


@pytest.mark.parametrize("name", TABLES)
def test_the_formula_reproduces_the_papers_tables(name: str) -> None:
    """The printed calls are means rounded down, so a row's gigabytes lie within one call of each."""
    of = formula(name.split()[0])
    reference = TABLES[name][0][2]
    for decoder, encoder_and_global, gigabytes, saved in TABLES[name]:
        low, high = of.bytes(decoder, encoder_and_global), of.bytes(decoder + 1, encoder_and_global + 1)
        assert low / 1e9 - 0.1 <= gigabytes <= high / 1e9 + 0.1
        assert 100 * (1 - gigabytes / reference) == pytest.approx(saved, abs=0.006)


@pytest.mark.parametrize("preset", PRESETS)
def test_stage_weights_are_all_parameters_but_the_embedding_tables(preset: str) -> None:
    config = PRESETS[preset]
    counts = count_parameters(config)
    weights = StageBytes.of(config, 1, 1).weights
    tables = counts["hash tables"] + config.vocab_size * (config.encoder.dim + config.patcher.dim)
    if config.decoder_input == "embedding":
        tables += (config.vocab_size + 1) * config.decoder.dim
    assert sum(weights.values()) == counts["total"] - tables


def test_a_request_alone_pays_for_every_call() -> None:
    engine = make_engine(NANO)
    config = engine.model_config
    # Its matrices are stored in bfloat16, and read so.
    weights = StageBytes.of(config, 4, 2, matrix_itemsize=2).weights
    for fields in ({}, {"decoder": "blt-s"}, {"decoder": "blt-dv", "unmask": UnmaskRule(rule="confidence", alpha=0.5)}):
        calls, read = dict(engine.ledger.total.calls), dict(engine.ledger.total.bytes_read)
        # A prompt of one id: all of its pass belongs to the first byte.
        end = run(engine, [request("a", [1], 60, **fields)])["a"].end
        assert isinstance(end, Finished)
        usage = end.usage
        counts = engine.ledger.total
        assert usage.decoder_calls == counts.calls["decoder"] - calls["decoder"]
        assert usage.global_calls == counts.calls["global"] - calls["global"]
        spent = sum(counts.bytes_read[stage] - read[stage] for stage in read)
        assert usage.bytes_read == pytest.approx(spent, rel=1e-9)
        least = sum((counts.calls[stage] - calls[stage]) * weights[stage] for stage in weights)
        assert least < usage.bytes_read < 1.6 * least


def test_a_batch_divides_the_bytes_read_among_its_requests() -> None:
    engine = make_engine(NANO)
    before = sum(engine.ledger.total.bytes_read.values())
    outs = run(engine, [request(str(i), [1], 40, decoder="blt-s" if i % 2 else "blt") for i in range(8)])
    usages = [out.end.usage for out in outs.values() if isinstance(out.end, Finished)]
    spent = sum(engine.ledger.total.bytes_read.values()) - before
    assert sum(usage.bytes_read for usage in usages) == pytest.approx(spent, rel=1e-6)
    snapshot = engine.snapshot()
    assert snapshot.decoders["blt"].committed == snapshot.decoders["blt-s"].committed == 160
    counted = [sum(counts.bytes_read.values()) for counts in snapshot.decoders.values()]
    assert sum(counted) == pytest.approx(spent, rel=1e-6)
    # Every row of this batch generates, so that nothing of the time is left over.
    for stage, seconds in snapshot.stage_seconds.items():
        assert sum(counts.seconds[stage] for counts in snapshot.decoders.values()) == pytest.approx(seconds)
    assert sum(snapshot.stage_seconds.values()) < snapshot.step_seconds


def test_estimated_blt_bytes_equal_the_formula_for_plain_blt() -> None:
    """The formula for blt's own calls, whatever decoder wrote the text; the prompt costs nothing."""
    engine = make_engine(NANO)
    ways: dict[str, dict[str, Any]] = {
        "blt": {},
        "blt-s": {"decoder": "blt-s"},
        "blt-dv": {"decoder": "blt-dv"},
    }
    prompts = [text(n, n) for n in (1, 17, 40)]
    for fields in ways.values():
        run(engine, [request(str(i), prompt, 64, ignore_eos=True, **fields) for i, prompt in enumerate(prompts)])
    decoders = engine.snapshot().decoders
    own = sum(decoders["blt"].estimated_bytes.values())
    assert decoders["blt"].calls["decoder"] == decoders["blt"].committed == 3 * 64
    assert own > 0
    for way in ways:
        assert decoders[way].blt_estimated_bytes == pytest.approx(own, abs=2), way
    assert sum(decoders["blt-s"].estimated_bytes.values()) < own
    assert sum(decoders["blt-dv"].estimated_bytes.values()) < own


def test_calls_of_blt_equal_a_count_by_hand() -> None:
    engine = make_engine(NANO)
    prompt = text(30, 3)
    end = run(engine, [request("a", prompt, 50)])["a"].end
    assert isinstance(end, Finished)
    usage = end.usage
    assert (usage.rounds, usage.decoder_calls, usage.rows["decoder"], usage.rows["patcher"]) == (50, 50, 50, 50)
    assert 50 / 8 <= usage.global_calls <= 50
    assert usage.rows["global"] >= usage.global_calls
    of = PaperFormula.of(engine.model_config, 4)
    assert usage.estimated_bytes == math.floor(of.bytes(50, usage.global_calls))
