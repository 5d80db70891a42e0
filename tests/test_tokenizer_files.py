"""`fastblt tokenizer`: a Hugging Face tokenizer has the ids of the server."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from typer.testing import CliRunner

from engine.config import BOS_ID, BYTE_OFFSET, EOS_ID, PAD_ID, SPECIAL_NAMES
from server.cli import app
from server.tokenizer import text_of

FILES = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("written") / "some" / "folder"
    done = CliRunner().invoke(app, ["tokenizer", str(out)])
    assert done.exit_code == 0, done.output
    assert done.output.split() == [str(out / name) for name in FILES]
    return out


@pytest.fixture(scope="module")
def auto(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def bare(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def ids(data: bytes) -> list[int]:
    return [byte + BYTE_OFFSET for byte in data]


pieces = st.sampled_from([*SPECIAL_NAMES.values(), " ", "é", "Ā", "\n\n", "a"])
texts = st.one_of(st.text(), st.lists(pieces).map("".join))


@given(text=texts)
def test_a_text_has_the_ids_of_its_bytes_and_comes_back(auto: Any, bare: Tokenizer, text: str) -> None:
    expected = ids(text.encode())
    assert auto(text, add_special_tokens=False).input_ids == bare.encode(text, add_special_tokens=False).ids == expected
    assert auto(text).input_ids == bare.encode(text).ids == [BOS_ID, *expected]
    assert auto.decode(expected) == bare.decode(expected) == text


@given(data=st.lists(st.integers(0, 259)))
def test_ids_become_the_text_that_the_server_makes_of_them(auto: Any, bare: Tokenizer, data: list[int]) -> None:
    assert auto.decode(data) == text_of(data)
    assert bare.decode(data, skip_special_tokens=False) == text_of(data)


def test_special_ids_have_their_roles(auto: Any) -> None:
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (BOS_ID, EOS_ID, PAD_ID)
    assert len(auto) == 260 and auto.convert_ids_to_tokens(list(SPECIAL_NAMES)) == list(SPECIAL_NAMES.values())
    assert auto.decode([BOS_ID, *ids(b"a"), EOS_ID, PAD_ID], skip_special_tokens=True) == "a"
    assert auto(["a", "bcd"], padding=True).input_ids == [[1, 101, 3, 3], [1, 102, 103, 104]]


def test_it_stays_the_same_when_hugging_face_writes_it_again(auto: Any, tmp_path: Path) -> None:
    auto.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("<s>é").input_ids == auto("<s>é").input_ids == [BOS_ID, *ids("<s>é".encode())]


def test_a_tokenizer_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / FILES[1]).write_text("{}")
    for out, name in ((folder, FILES[0]), (tmp_path, FILES[1])):
        done = CliRunner().invoke(app, ["tokenizer", str(out)])
        assert done.exit_code == 1 and f"{out / name} exists: choose another folder, or delete it" in done.output
    assert [path.name for path in tmp_path.iterdir()] == [FILES[1]]
    assert json.loads((folder / FILES[2]).read_text()) == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
    }
    within = CliRunner().invoke(app, ["tokenizer", str(folder / FILES[0])])
    assert within.exit_code == 1 and "File exists" in within.output
