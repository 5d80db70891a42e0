"""A row of the table of decoders is all that the rest of the project needs to know of one."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.decoders import table
from engine.decoders.table import DECODERS, available, register
from engine.types import Request
from server.options import OPTIONS
from server.schemas import CompletionRequest
from tests.serving import TINY_NAMES, RunningServer, running_server

BODY = {"prompt": "abcdabcdabcd", "max_tokens": 100, "ignore_eos": True}
DRAFTING = [*OPTIONS["draft_length"], "look-up"]


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Both of its processes have the row of tests/look_up.py; this one does not."""
    assert "look-up" not in DECODERS
    with running_server(tiny, tmp_path_factory.mktemp("log") / "log", program="tests.look_up") as running:
        yield running


def complete(server: RunningServer, status: int = 200, **fields: Any) -> Any:
    with server.client() as http:
        answer = http.post("/v1/completions", json=BODY | fields)
    assert answer.status_code == status, answer.text
    return answer.json()


@pytest.mark.parametrize("temperature", [0, 0.5])
def test_a_registered_decoder_is_served_and_equals_blt(server: RunningServer, temperature: float) -> None:
    sampling = {"temperature": temperature, "seed": 3, "logprobs": 1}
    wanted = complete(server, decoder="blt", **sampling)
    found = complete(server, decoder="look-up", draft_length=6, **sampling)
    assert found["choices"] == wanted["choices"]
    cost = found["usage"]["fastblt"]
    assert cost["decoder"] == "look-up" and cost["drafted"] > 0


def test_drafts_of_a_registered_decoder_are_counted_under_its_name(server: RunningServer) -> None:
    label = '{decoder="look-up"}'
    before = server.metrics("fastblt_accepted_bytes_total")[f"fastblt_accepted_bytes_total{label}"]
    cost = complete(server, model="tiny:look-up", temperature=0)["usage"]["fastblt"]
    assert cost["accepted"] > 0 and cost["rounds"] + cost["accepted"] == 100
    after = server.metrics("fastblt_accepted_bytes_total")[f"fastblt_accepted_bytes_total{label}"]
    assert after - before == cost["accepted"]
    assert server.metrics("fastblt_end_to_end_seconds_count")[f"fastblt_end_to_end_seconds_count{label}"] > 0


def test_models_page_and_schema_list_a_registered_decoder(server: RunningServer) -> None:
    with server.client() as http:
        models = {card["id"]: card["decoders"] for card in http.get("/v1/models").json()["data"]}
        script = http.get("/page/table.js").text
        schema = http.get("/openapi.json").json()["components"]["schemas"]["CompletionRequest"]["properties"]
    assert [*models] == [*TINY_NAMES, "tiny:look-up"] and models["tiny:look-up"] == ["look-up"]
    rows = json.loads(script.removeprefix("export const DECODERS = ").removesuffix(";\n"))
    assert list(rows) == models["tiny"] and rows["look-up"]["options"] == ["draft_length"]
    assert schema["decoder"]["anyOf"][0]["enum"] == models["tiny"]
    assert f"Extension, {' and '.join(DRAFTING)}: " in schema["draft_length"]["description"]


def test_errors_about_options_name_the_registered_decoder(server: RunningServer) -> None:
    error = complete(server, 400, decoder="look-up", block_size=4)["error"]
    assert error["param"] == "block_size"
    assert error["message"] == "block_size is an option of blt-d and blt-dv, not of look-up"
    error = complete(server, 400, decoder="blt", draft_length=4)["error"]
    assert error["message"] == f"draft_length is an option of {' and '.join(DRAFTING)}, not of blt"
    error = complete(server, 400, decoder="lookup")["error"]
    assert error["param"] == "decoder" and "'blt-s'" in error["message"] and " or 'look-up'" in error["message"]


def test_generate_help_lists_a_registered_decoder() -> None:
    command = [sys.executable, "-m", "tests.look_up", "generate", "--help"]
    told = " ".join(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert "|look-up>" in told and f"{', '.join(DRAFTING)}: most bytes to draft" in told


def test_a_model_without_mask_id_offers_only_decoders_without_mask() -> None:
    assert available(mask=True) == tuple(DECODERS)
    assert set(DECODERS) - set(available(mask=False)) == {"blt-d", "blt-dv"}


def test_register_refuses_invalid_and_duplicate_decoder_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "DECODERS", dict(DECODERS))
    row = replace(DECODERS["blt"], name="a-row-2")
    register(row)
    assert table.DECODERS["a-row-2"] is row and "a-row-2" not in DECODERS
    for name in ("", "Mine", "a b", "a:b", "a--b", 'a"'):
        with pytest.raises(ValueError, match="lower-case letters"):
            register(replace(row, name=name))
    with pytest.raises(ValueError, match="'a-row-2' is in the table already"):
        register(row)
    with pytest.raises(ValueError, match="'other': a Request has no field 'depth'"):
        register(replace(row, name="other", options=("exact", "depth")))


def test_options_of_every_decoder_are_request_fields() -> None:
    for spec in DECODERS.values():
        assert set(spec.options) <= set(CompletionRequest.model_fields)
        assert (spec.rule is None) == ("unmask" not in spec.options)


def test_only_decoders_without_verification_are_inexact() -> None:
    def exact(decoder: str, *, asked: bool) -> bool:
        request = Request(id="a", prompt_ids=[1], max_tokens=1, decoder=decoder, exact=asked)
        return DECODERS[decoder].is_exact(request)

    assert [name for name in DECODERS if not exact(name, asked=True)] == ["blt-d"]
    assert [name for name in DECODERS if not exact(name, asked=False)] == ["blt-d", "auto"]
