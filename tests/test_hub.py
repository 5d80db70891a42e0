"""Models by their names on the hub: the library `huggingface_hub` against a hub of this machine (tests/hub.py)."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.checkpoint import load, random_tensors
from engine.config import BOS_ID, BYTE_OFFSET, EngineConfig
from engine.hub import HubError, local_folder, localised, pinned, pinned_names
from engine.hub.files import check_is_blt
from engine.hub.reference import Reference
from tests import reference
from tests.conftest import ROOT
from tests.hub import TOKEN, WITHOUT_ACCESS, Hub, running_hub
from tests.models import HF_MODELS
from tests.serving import running_server
from tests.test_checkpoint_formats import ENTROPY_ARGS, META_CONFIG, assert_same_tensors, meta_name, write_meta
from tests.test_cli import fails, runner

SHARDED = "org/blt-1b-hf-sharded"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """The layouts of the released repositories, and some that hold no BLT, with files that no model needs."""
    root = tmp_path_factory.mktemp("hub")
    org = root / "org"
    tensors = random_tensors(META_CONFIG, 0, torch.bfloat16)
    write_meta(org / "blt-1b", tensors, hub=True, beside=False)
    write_meta(org / "blt" / "blt_1b", tensors, hub=False, beside=True)
    shutil.copy(org / "blt" / "blt_1b" / "consolidated.pth", org / "blt-1b")
    shutil.copytree(org / "blt" / "blt_1b", org / "blt" / "blt_7b")
    (org / "blt-entropy").mkdir()
    (org / "blt-entropy" / "config.json").write_text(json.dumps({"args": ENTROPY_ARGS}))
    apart = {meta_name(name): torch.zeros_like(tensor) for name, tensor in tensors.items() if "patcher" in name}
    save_file(apart, org / "blt-entropy" / "model.safetensors")
    HF_MODELS["k2"]().save_pretrained(org / "blt-1b-hf")
    HF_MODELS["k2"]().save_pretrained(root / SHARDED, max_shard_size="100kB")
    (root / SHARDED / "not-listed.safetensors").write_bytes(b"x")
    shutil.copytree(tiny, org / "tiny")
    (org / "llama").mkdir()
    (org / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (org / "llama" / "model.safetensors").write_bytes(b"gigabytes")
    (org / "gguf").mkdir()
    for folder in (*org.iterdir(), org / "blt" / "blt_1b", org / "blt" / "entropy_model"):
        (folder / "original").mkdir()
        for name in ("README.md", "model.gguf", "optimizer.pt", "pytorch_model.bin", "original/consolidated.00.pth"):
            (folder / name).write_text("not needed")
        (folder / "tokenizer.json").write_text("{}")
    return root


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "home" / "hub"


@pytest.fixture
def hub(repositories: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub and an empty cache, for this process and those that it starts."""
    with running_hub(repositories) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_HOME", str(cache.parent))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
            monkeypatch.delenv(name, raising=False)
        # The library has read them when it was imported.
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache.parent / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield running


def error(given: str, **options: bool) -> str:
    with pytest.raises(HubError) as caught:
        local_folder(given, **options)
    message = str(caught.value)
    assert "\n" not in message and TOKEN not in message and WITHOUT_ACCESS not in message
    return message


# What is downloaded


NEEDED = {
    "org/blt-1b": {
        "config.json",
        "model.safetensors",
        "train_args.json",
        "entropy_model/params.json",
        "entropy_model/consolidated.pth",
    },
    "org/blt/blt_1b": {
        "blt_1b/params.json",
        "blt_1b/consolidated.pth",
        "entropy_model/params.json",
        "entropy_model/consolidated.pth",
    },
    "org/blt-entropy": {"config.json", "model.safetensors"},
    "org/blt-1b-hf": {"config.json", "model.safetensors"},
    "org/tiny": {"config.json", "model.safetensors"},
}


@pytest.mark.parametrize("given", [*NEEDED, SHARDED])
def test_only_the_files_that_a_layout_needs_are_downloaded(
    given: str, hub: Hub, cache: Path, repositories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {file.name for file in (repositories / SHARDED).glob("model-*")}
    assert len(shards) > 2
    needed = NEEDED.get(given, {"config.json", "model.safetensors.index.json", *shards})
    folder = local_folder(given)
    assert hub.fetched() == needed
    if given != "org/blt-entropy":
        assert_same_tensors(load(folder).tensors, load(repositories / given).tensors)

    # Again: the hub is asked which commit it is, and for no file.
    hub.requests.clear()
    assert local_folder(given) == folder
    assert hub.requests and not any("/resolve/" in path or "/cdn/" in path for _, path, *_ in hub.requests)

    # Offline it is not asked at all.
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_folder(given) == folder and not hub.requests


@pytest.mark.parametrize("given", ["org/blt-1b", "org/blt/blt_1b"])
def test_a_downloaded_model_lies_at_its_place_in_the_hub_cache(given: str, hub: Hub, cache: Path) -> None:
    repository, _, inside = given.partition("/blt_1b")
    commit = hub.commit(repository)
    expected = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / commit
    folder = local_folder(given)
    assert folder == (expected / "blt_1b" if given.endswith("blt_1b") else expected)
    assert all(file.is_symlink() for file in folder.glob("*.json"))


@pytest.mark.parametrize("revision", ["main", "v1", "COMMIT"])
def test_a_revision_is_a_branch_a_tag_or_a_commit(revision: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.commit("org/blt-1b-hf")
    given = f"org/blt-1b-hf@{commit if revision == 'COMMIT' else revision}"
    folder = local_folder(given)
    assert folder.name == commit
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_folder(given) == folder


def test_a_local_folder_is_preferred_to_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/blt-1b").mkdir(parents=True)
    assert local_folder("org/blt-1b") == Path("org/blt-1b")
    here = str(tmp_path / "org" / "blt-1b")
    assert pinned(EngineConfig("org/blt-1b", patcher="org/blt-1b")) == EngineConfig(here, patcher=here)
    assert not hub.requests


def test_a_pinned_model_name_has_the_commit(hub: Hub) -> None:
    name, apart = f"org/blt/blt_1b@{hub.commit('org/blt')}", f"org/blt-entropy@{hub.commit('org/blt-entropy')}"
    given = EngineConfig("org/blt/blt_1b@v1", patcher="org/blt-entropy", dtype="bfloat16")
    found = pinned(given)
    assert found == EngineConfig(name, patcher=apart, dtype="bfloat16")
    assert localised(found) == localised(given)


def test_names_are_pinned_without_weights_and_whatever_other_machines_have(hub: Hub) -> None:
    given = EngineConfig("org/blt/blt_1b@v1", patcher="/of/another/machine")
    name = f"org/blt/blt_1b@{hub.commit('org/blt')}"
    assert pinned_names(given) == EngineConfig(name, patcher="/of/another/machine")
    assert not any(path.endswith((".pth", ".safetensors")) for path in hub.fetched())


def test_the_patcher_may_be_a_repository_of_its_own(hub: Hub) -> None:
    config = localised(EngineConfig("org/blt/blt_1b", patcher="org/blt-entropy"))
    assert config.patcher == str(local_folder("org/blt-entropy"))
    apart, inside = load(config.model, patcher=config.patcher), load(config.model)
    assert (apart.config, inside.config) == (inside.config, replace(META_CONFIG, name="org/blt/blt_1b"))
    assert all(apart.tensors[name].sum() == 0 for name in apart.tensors if "patcher" in name)
    assert_same_tensors(*({n: t for n, t in c.tensors.items() if "patcher" not in n} for c in (apart, inside)))


def test_a_broken_download_is_resumed(hub: Hub, repositories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.break_after = 50_000
    folder = local_folder("org/blt-1b-hf")
    got, wanted = (path / "model.safetensors" for path in (folder, repositories / "org/blt-1b-hf"))
    assert got.read_bytes() == wanted.read_bytes()
    assert [found for *_, found in hub.requests if found] == ["bytes=50000-"]


# The token


def test_a_hub_token_opens_gated_and_private_models_and_is_sent_only_to_the_hub(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.gated, hub.private = {"org/blt-1b-hf"}, {"org/tiny"}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    local_folder("org/blt-1b-hf")
    monkeypatch.delenv("HF_TOKEN")
    # As `hf auth login` leaves it.
    (cache.parent / "token").write_text(TOKEN)
    local_folder("org/tiny")
    sent = {(path.startswith("/cdn/"), token) for _, path, token, _ in hub.requests if "harness" not in path}
    assert sent == {(False, f"Bearer {TOKEN}"), (True, None)}
    assert "downloading org/tiny" in caplog.text and TOKEN not in caplog.text


def test_an_invalid_hub_token_is_not_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_bro\x01ken")
    assert "ken" not in error("org/tiny").replace("token", "")


# What can go wrong


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("org/none", "no such directory, and no such repository at {hub}, unless it is private and needs a token"),
        ("org/blt-1b@v9", "org/blt-1b@v9: the repository has no revision v9; name a branch, a tag or a commit"),
        ("org/blt", "no BLT is in it; its models are org/blt/blt_1b, org/blt/blt_7b"),
        ("org/blt/blt_3b", "has no folder blt_3b; its models are org/blt/blt_1b, org/blt/blt_7b"),
        ("org/gguf", "org/gguf: this is a model in the GGUF format (model.gguf), which is llama.cpp's. fastblt reads"),
        ("org/llama", "org/llama: this is a model of the kind 'llama'. fastblt reads byte-latent transformers (BLT)"),
        ("org/blt-1b/", "no such directory; give the folder of a checkpoint, or the name of a model on the Hugging"),
        ("./org/blt-1b", "no such directory; give"),
        ("blt-1b", "no such directory; give"),
        ("org/../x", "no such directory; give"),
        ("pyproject.toml", "pyproject.toml: not a directory; give"),
        ("org/x--y", "no name that the hub allows"),
    ],
)
def test_an_error_about_a_missing_hub_model_says_what_there_is(given: str, message: str, hub: Hub) -> None:
    assert message.format(hub=hub.url) in error(given)
    assert not any(name.endswith((".safetensors", ".pth", ".gguf")) for name in hub.fetched())


def test_a_gated_repository_names_the_page_of_its_licence(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated = {"org/blt-1b"}
    page = f"accept the licence at {hub.url}/org/blt-1b"
    assert f"gated: {page}, then give a token of that account (HF_TOKEN or `hf auth login`)" in error("org/blt-1b")
    monkeypatch.setenv("HF_TOKEN", WITHOUT_ACCESS)
    assert f"gated, and the token given has no access: {page}" in error("org/blt-1b")


def test_errors_blame_a_hub_token_without_access_or_unknown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.private = {"org/tiny"}
    monkeypatch.setenv("HF_TOKEN", WITHOUT_ACCESS)
    assert "no such repository" in error("org/tiny") and "unless the token given may not read it" in error("org/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped")
    assert "refuses the token given (HF_TOKEN or `hf auth login`): it may be mistyped or expired" in error("org/tiny")


def test_offline_only_models_wholly_in_the_cache_are_used(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    local_folder("org/tiny", weights=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert local_folder("org/tiny", weights=False).name == hub.commit("org/tiny")
    for name in ("org/tiny", "org/blt-1b", "org/tiny@v9"):
        assert re.search(r"not \(wholly\) in the cache \S+; HF_HUB_OFFLINE forbids downloading it", error(name))
    assert not hub.requests


@pytest.mark.parametrize("how", ["no network", "the hub is down"])
def test_an_unreachable_hub_means_the_cache_is_used_with_a_warning(
    how: str, hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = local_folder("org/tiny")
    if how == "no network":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        hub.down = True
    assert local_folder("org/tiny") == folder
    assert "org/tiny: " in caplog.text and "; using what is in the cache" in caplog.text
    expected = "no such directory, and cannot be downloaded from http://127.0.0.1:9: [Errno 111] Connection refused"
    assert (expected if how == "no network" else "answers with status 500") in error("org/blt-1b-hf")


def test_a_disk_that_is_too_small_is_reported_before_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 0, 10))
    assert re.search(r"0\.\d MB to download, but \S+ has room for 0\.0 MB; set HF_HOME", error("org/blt-1b-hf"))
    assert hub.fetched() == {"config.json"}


# The command line


def test_every_command_accepts_a_hub_name(hub: Hub, tmp_path: Path, repositories: Path) -> None:
    name = "org/blt-1b"
    result = runner.invoke(sys.modules["server.cli"].app, ["size", "--config", name, "--json"])
    assert result.exit_code == 0, result.output
    assert hub.fetched() == {file for file in NEEDED[name] if file.endswith(".json")}
    for arguments in (
        ["inspect", name, "--json"],
        ["size", "--model", name],
        ["generate", "--model", name, "--prompt=a", "--max-tokens=2", "--json"],
        ["init", "--config", name, str(tmp_path / "new")],
    ):
        result = runner.invoke(sys.modules["server.cli"].app, arguments)
        assert result.exit_code == 0, result.output
        if arguments[0] == "size":
            assert f"fastblt serve --model {name} " in result.stdout
    apart = ["--model", "org/blt/blt_1b", "--patcher", "org/blt-entropy"]
    result = runner.invoke(sys.modules["server.cli"].app, ["size", *apart])
    assert f"fastblt serve {' '.join(apart)} " in result.stdout
    for arguments in (
        ["inspect", "org/none"],
        ["size", "--config", "org/none"],
        ["size", "--model", "org/none"],
        ["generate", "--model", "org/none", "--prompt=a"],
        ["eval", "--model", "org/none", __file__],
        ["calibrate", "--model", "org/none", "--patch-size=4", __file__],
        ["compare", "--model", "org/none"],
        ["init", "--config", "org/none", str(tmp_path / "none")],
    ):
        assert "org/none: no such directory, and no such repository at" in fails(*arguments)
    assert "--write needs a folder" in fails("compare", "--model", name, "--write")


def test_serve_with_a_hub_name_answers_as_with_a_folder(hub: Hub, repositories: Path, tmp_path: Path) -> None:
    """Under the name that it has on the hub, with its slash."""
    name = "org/blt-1b-hf"
    checkpoint = load(repositories / name)
    ids = reference.greedy(checkpoint.config, checkpoint.tensors, [BOS_ID, *(b + BYTE_OFFSET for b in b"def ")], 12)
    expected = bytes(i - BYTE_OFFSET for i in ids if i >= BYTE_OFFSET).decode(errors="replace")
    with (
        running_server(Path(f"{name}@v1"), tmp_path / "log") as server,
        server.client() as http,
    ):
        for offered in (name, f"{name}:blt-s"):
            body = {"model": offered, "prompt": "def ", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
            answer = http.post("/v1/completions", json=body).json()
            assert (answer["choices"][0]["text"], answer["model"]) == (expected, offered)
            assert http.get(f"/v1/models/{offered}").json()["id"] == offered
            assert http.get(f"/v1/models/{offered.replace('/', '%2F')}").json()["id"] == offered
        assert f"{name}:auto" in [model["id"] for model in http.get("/v1/models").json()["data"]]
        assert httpx.get(server.url).status_code == 200
    assert hub.fetched() == NEEDED[name]
    assert re.search(rf"downloading {name}@v1: \d\.\d MB into ", server.log.read_text())


SMALL_PIECES = """
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 1 << 10
from server.cli import main
main()
"""
"""The command line, whose downloads notice signals with each kilobyte instead of each ten megabytes."""


def test_a_signal_ends_a_download_without_a_traceback(hub: Hub, cache: Path) -> None:
    hub.pause = 0.1
    command = [sys.executable, "-c", SMALL_PIECES, "serve", "--model", "org/blt-1b-hf", "--port", "0"]
    processes = []
    for number in (signal.SIGINT, signal.SIGTERM):
        hub.requests.clear()
        environment = os.environ | {"HF_HOME": str(cache.parent / number.name)}
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
        processes.append((number, process))
    wait_for(lambda: [path for _, path, *_ in hub.requests].count("/cdn/org/blt-1b-hf/model.safetensors") == 2)
    for number, process in processes:
        process.send_signal(number)
    for number, process in processes:
        log = process.communicate(timeout=30)[1]
        assert process.returncode == 130, log
        assert "Traceback" not in log and "downloading org/blt-1b-hf" in log
        assert not list((cache.parent / number.name).rglob("*.incomplete"))


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# Names


PART = st.builds("".join, st.tuples(st.sampled_from("aZ0_"), st.text("aZ0_-", max_size=3), st.sampled_from(["", ".b"])))


@given(PART, PART, st.lists(PART, max_size=2), st.none() | PART | st.just("refs/pr/1"))
def test_a_hub_reference_is_parsed_from_its_text(org: str, name: str, inside: list[str], revision: str | None) -> None:
    found = Reference(f"{org}/{name}", "/".join(inside), revision)
    assert Reference.parse(str(found)) == found


@given(st.text("ab./@~:\\ \n-", max_size=12))
def test_a_hub_reference_never_leaves_the_cache(text: str) -> None:
    if found := Reference.parse(text):
        assert str(found) == text
        for path in (found.repository, found.folder, found.revision or ""):
            assert not path.startswith(("/", ".", "~")) and ".." not in path and "\\" not in path and "\n" not in path


def test_hub_json_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(HubError, match=r"config\.json: not JSON"):
        check_is_blt(Reference("org/name"), tmp_path)
