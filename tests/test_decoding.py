"""What `fastblt compare` and `fastblt generate --show` tell about decoding."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from engine.config import BYTE_OFFSET, EngineConfig
from engine.decoders import Decoder, Round, SharedPrior, make_decoder
from engine.engine import Engine
from engine.sequence import Sequence
from engine.types import Delta, Request, SamplingParams, Trace
from server import offline
from server.cli import app
from server.terminal_view import PATCHES, Show
from tests.engines import make_engine, request, run
from tests.models import text
from tests.test_cli import fails, runner
from training import decoding

NANO = Path(__file__).parents[1] / "models" / "nano"
OWN_SOURCE = Path(__file__).parents[1] / "engine" / "engine.py"


@pytest.fixture
def result() -> dict[str, object]:
    with pytest.MonkeyPatch.context() as patch:
        # Walks take as many steps as they are long, and run side by side. The first stride of each makes no round.
        patch.setattr(decoding, "WALK_BYTES", 128)
        return decoding.measure(NANO, [OWN_SOURCE.read_bytes()], num_prompts=2, num_bytes=24, num_prefixes=70)


def test_figures_of_compare_show_exact_decoders_agreeing_with_blt(result: dict[str, object]) -> None:
    rows = {row["name"]: row for row in result["rows"]}  # type: ignore[attr-defined]
    for row in rows.values():
        if row["decoder"] != "blt-d":
            assert row["agreement"] == row["same_prompts"] == 1
        if row["decoder"] not in ("blt", "auto"):
            assert row["real_rounds"] == rows["BLT-S k=4"]["real_rounds"] >= 60
            assert 0 < row["real_acceptance"] <= 1
    assert rows["BLT"]["decoder_calls"] == 1
    for k in (4, 8, 16):
        assert 1 <= rows[f"BLT-S k={k}"]["real_bytes_per_round"] <= k + 1
    # Most rounds only commit the next byte of an open patch.
    finished = rows["BLT-D-8 conf 0.7, patch finished first"]
    assert 1 < finished["real_bytes_per_round"] < 1 + 8 * finished["real_acceptance"] / 2
    assert 1 <= rows["BLT-DV-8 one step"]["real_bytes_per_round"] <= 9
    assert rows["BLT-D-8 conf 0.7"]["global_calls"] <= 1 / 8
    stored = json.loads((NANO / "decoders.json").read_text())
    assert result.keys() == stored.keys()
    assert all(row.keys() == stored["rows"][0].keys() for row in rows.values())


def test_block_acceptance_counts_from_the_first_byte_of_a_block() -> None:
    """Along real text: as many first bytes of blocks are right as blt itself confirms from the same prefix."""
    engine = make_engine(NANO)
    source = [1, *(byte + BYTE_OFFSET for byte in OWN_SOURCE.read_bytes()[2000:2512])]
    walk = decoding.Walk(make_decoder_of(engine, decoder="blt-d"), source, decoding.STRIDE)
    blocks: list[tuple[int, list[int], int]] = []
    inner = walk._inner.round

    def watched(sequence: Sequence, room: int) -> Round:
        outcome = yield from inner(sequence, room)
        blocks.append((len(sequence.ids), outcome.ids, walk.accepted))
        return outcome

    walk._inner.round = watched  # type: ignore[method-assign]
    engine.add(request("a", source[:16], len(source) - 16, decoder="blt-d"), walk)
    while engine.has_work:
        engine.step()
    accepted = [after[2] - before[2] for before, after in zip(blocks, blocks[1:], strict=False)]
    for (end, block, _), count in zip(blocks[:10], accepted, strict=False):
        text_of_blt = run(engine, [request("b", source[:end], len(block))])["b"].ids
        right = next((i for i, (a, b) in enumerate(zip(block, text_of_blt, strict=True)) if a != b), len(block))
        assert count == right


def test_walks_that_draft_nothing_have_no_acceptance() -> None:
    engine = make_engine(NANO)
    source = [1, *(byte + BYTE_OFFSET for byte in OWN_SOURCE.read_bytes()[: 4 * decoding.STRIDE - 1])]
    setting = decoding.Setting("BLT", {"decoder": "blt"})
    figures, short = (decoding.Figures("BLT", "blt", None, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0) for _ in range(2))
    decoding._walk(engine, [source], setting, figures)
    decoding._walk(engine, [source[: 2 * decoding.STRIDE]], setting, short)
    assert (figures.real_acceptance, figures.real_bytes_per_round, figures.real_rounds) == (None, 1.0, 2)
    assert (short.real_acceptance, short.real_bytes_per_round, short.real_rounds) == (None, None, 0)


def test_compare_refuses_files_that_are_too_short(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x" * 576)
    assert "at least one must have 577 bytes" in fails("compare", "--model", tiny, tmp_path / "short")


def make_decoder_of(engine: Engine, **fields: Any) -> Decoder:
    return make_decoder(
        request("a", [1], 1, **fields), engine.model_config.block_size, engine.ledger.latency, SharedPrior()
    )


def test_compare_writes_its_table_into_the_card_and_keeps_the_rest(tmp_path: Path) -> None:
    # Measured once, in a form that a test above holds fresh figures to.
    result = json.loads((NANO / "decoders.json").read_text())
    (tmp_path / "README.md").write_text(f"# before\n\n{decoding.BEGIN}\nold\n{decoding.END}\n\n# behind\n")
    for _ in range(2):
        decoding.write(result, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# before") and card.endswith("# behind\n")
    assert card.count(decoding.table(result)) == 1 and "old" not in card
    assert json.loads((tmp_path / "decoders.json").read_text()) == result
    assert (tmp_path / "decoders.png").stat().st_size > 10_000
    assert "\n`fastblt compare` measures it again.\n" in card
    decoding.write(result, tmp_path, "Other text was used.")
    card = (tmp_path / "README.md").read_text()
    assert "\nOther text was used.\n" in card and "measures it again" not in card


def test_the_card_names_the_files_that_compare_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = json.loads((NANO / "decoders.json").read_text())
    monkeypatch.setattr(decoding, "measure", lambda *arguments: result)
    (tmp_path / "README.md").write_text(f"{decoding.BEGIN}{decoding.END}")
    (tmp_path / "a text").write_text("words")
    given = ["compare", "--model", str(tmp_path), "--write"]
    for files, told in (([], "fastblt compare"), ([str(tmp_path / "a text")], f"fastblt compare '{tmp_path}/a text'")):
        assert runner.invoke(app, [*given, *files]).exit_code == 0
        assert f"\n`{told}` measures it again.\n" in (tmp_path / "README.md").read_text()


def test_the_embedded_models_card_shows_the_measured_table() -> None:
    measured = json.loads((NANO / "decoders.json").read_text())
    assert decoding.table(measured) in (NANO / "README.md").read_text()


def rendered(parts: list[object]) -> str:
    out = io.StringIO()
    console = Console(file=out, width=10_000, color_system=None, soft_wrap=True)
    for part in parts:
        console.print(part, end="")
    return out.getvalue()


@pytest.mark.parametrize("decoder", ["blt", "blt-s", "blt-d", "blt-dv", "auto"])
def test_shown_traces_add_up_to_the_text(decoder: str) -> None:
    engine = make_engine(NANO)
    sampling = SamplingParams(temperature=0.9, seed=2)
    prompt = text(40, 1, specials=False)
    wanted = Request(id="a", prompt_ids=prompt, max_tokens=70, sampling=sampling, decoder=decoder, trace=True)  # type: ignore[arg-type]
    engine.add(wanted)
    ids: list[int] = []
    traces: list[Trace] = []
    show, parts = Show(), []
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Delta):
                parts.append(show.feed(event.ids, event.traces))
                ids += event.ids
                traces += event.traces
    parts.append(show.finish())
    assert sum(trace.num_ids for trace in traces) == len(ids)
    at = 0
    for trace in traces:
        kept = min(trace.accepted, trace.num_ids)
        assert trace.drafts[:kept] == ids[at : at + kept]
        assert not trace.passes or len(trace.passes) == len(trace.drafts)
        at += trace.num_ids
    starts = [start for trace in traces for start in trace.patch_starts]
    assert starts == sorted(set(starts)) and starts[-1] > 50
    again = run(engine, [Request(id="b", prompt_ids=prompt, max_tokens=70, sampling=sampling, decoder=decoder)])["b"]  # type: ignore[arg-type]
    assert again.ids == ids
    if not any(trace.accepted < len(trace.drafts) for trace in traces):
        data = bytes(token - BYTE_OFFSET for token in ids if token >= BYTE_OFFSET)
        assert rendered(list(parts)).replace("\n", "") == data.decode(errors="replace").replace("\n", "")


@pytest.mark.parametrize("decoder", ["blt", "blt-d"])
def test_generate_show_prints_the_prompt_in_its_patches(decoder: Any) -> None:
    prompt, show = "naïve = [".encode(), Show(offline.prompt_ids("naïve = [".encode()))
    config, sampling = EngineConfig(str(NANO)), SamplingParams(temperature=0)
    given: dict[str, Any] = {"max_tokens": 20, "sampling": sampling, "stop": [], "ignore_eos": True, "options": {}}
    pieces = list(offline.generate(config, [prompt], decoder=decoder, trace=True, patches=True, **given))
    shown = [show.feed(piece.ids, piece.traces, piece.patches) for piece in pieces]
    shown.append(show.finish())
    output = b"".join(piece.data for piece in pieces)
    assert rendered(list(shown)) == (prompt + output).decode(errors="replace")
    told = [piece.patches for piece in pieces if piece.patches]
    starts = {start for patches in told for start in patches.starts if start < told[0].output_start}
    assert len(starts) > 3 and told[0].output_start == 1 + len(prompt)
    # A span per byte, in one of two backgrounds by its patch; a character stands with its last byte.
    spans = [span.style for text in shown for span in text.spans][: len(prompt) - 1]
    places = [place for place in range(1, 1 + len(prompt)) if place != 3]
    numbers = [sum(start <= place for start in starts) for place in places]
    backgrounds = [style.bgcolor.name for style in spans]
    assert [PATCHES.index(name) for name in backgrounds] == [number % 2 for number in numbers]
    assert all(style.dim for style in spans)


def test_generate_show_prints_a_rejected_draft_where_it_was_rejected() -> None:
    show = Show()
    ids = [byte + BYTE_OFFSET for byte in b"abX"]
    drafts = [byte + BYTE_OFFSET for byte in b"abcd"]
    part = show.feed(ids, [Trace(num_ids=3, drafts=drafts, accepted=2, patch_starts=[0])])
    assert rendered([part, show.finish()]) == "abcdX"
