"""Whatever is wrong with a checkpoint is said in one sentence that names the file, the thing and both values."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from engine.checkpoint import PRESETS, CheckpointError, load, random_tensors, read_config, save
from engine.checkpoint.base import NotFinite, require_finite
from engine.checkpoint.files import model_name, open_torch
from engine.checkpoint.names import HASHES
from engine.config import EngineConfig, KernelName, StackConfig
from engine.entropies import Entropies
from engine.layout import CONSOLIDATED, WEIGHTS, WEIGHTS_INDEX
from engine.model import Model
from kernels.dispatch import choose_kernels
from tests.engines import make_engine
from tests.test_checkpoint_formats import META_ARGS, META_CONFIG, write_meta

TINY = PRESETS["tiny"]
HEAD = "lm_head.weight"
QUERY = "model.global_transformer.layers.1.self_attn.q_proj.weight"

Tensors = dict[str, torch.Tensor]
Json = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path, TINY, random_tensors(TINY, 0, torch.bfloat16))
    return tmp_path


def refused(path: Path, *words: str) -> str:
    """The message, which names the folder and every one of `words`."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(path), *words):
        assert word in message
    return message


def edit_tensors(folder: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, change: Callable[[Json], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


# Tensors


def test_a_missing_tensor_is_refused_by_name(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.pop(QUERY))
    refused(folder, f"tensor {QUERY} is missing, expected shape [64, 64]")


def test_an_extra_tensor_is_refused_by_name(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.extra.weight": torch.zeros(3, 5)}))
    refused(folder, "tensor model.extra.weight of shape [3, 5] is not part of this model")


def test_a_misshaped_tensor_is_refused_with_both_shapes(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({HEAD: torch.zeros(261, 32)}))
    refused(folder, f"tensor {HEAD} has shape [261, 32], expected [260, 32]")


def test_a_fused_hash_table_that_is_too_short_is_refused(folder: Path) -> None:
    name = "model.encoder_hash_tok_embedding.weight"
    edit_tensors(folder, lambda t: t.update({name: torch.zeros(501, 32)}))
    refused(folder, f"tensor {name} has shape [501, 32], expected [502, 32]")


def test_a_tensor_of_integers_is_refused(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({HEAD: torch.zeros(260, 32, dtype=torch.int8)}))
    refused(folder, f"tensor {HEAD} has dtype I8, expected float32, bfloat16 or float16")


def test_the_first_of_many_tensor_errors_are_listed_and_the_rest_counted(folder: Path) -> None:
    edit_tensors(folder, lambda t: [t.pop(name) for name in [*t][:10]])
    message = refused(folder, "and 6 more")
    assert message.count("is missing") == 4


# Files


def test_a_missing_checkpoint_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such directory")


def test_a_checkpoint_without_a_config_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "there is no config.json or params.json. fastblt reads")


def test_a_checkpoint_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refused(folder, f"{WEIGHTS}: no such file")


@pytest.mark.parametrize("keep", [0, 4, 1000, 100_000, -1])
def test_a_truncated_safetensors_file_is_refused(folder: Path, keep: int) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])
    refused(folder, f"{WEIGHTS}: not a whole safetensors file")


def header_of(*tensors: tuple[str, int, int]) -> str:
    """A header of tensors of 16 numbers of four bytes: name, beginning and end."""
    entries = (f'"{name}":{{"dtype":"F32","shape":[16],"data_offsets":[{at},{end}]}}' for name, at, end in tensors)
    return f"{{{','.join(entries)}}}"


@pytest.mark.parametrize(
    ("header", "data_bytes", "words"),
    [
        (header_of(("a", 0, 64), ("a", 0, 64)), 64, "its header has a twice"),
        (header_of(("a", 0, 64), ("b", 32, 96)), 96, "invalid offset for tensor `b`"),
        (header_of(("a", 0, 64), ("b", 96, 160)), 160, "invalid offset for tensor `b`"),
        (header_of(("a", 0, 60)), 60, "invalid shape, data type, or offset for tensor"),
        (header_of(("a", 0, 1 << 62)), 64, "invalid shape, data type, or offset for tensor"),
        (header_of(("a", 0, 64)), 65, "file not fully covered"),
        ('{"a":' * 100_000, 64, "recursion limit exceeded"),
    ],
    ids=["twice", "overlap", "gap", "too few", "too many", "more bytes", "deep"],
)
def test_a_safetensors_header_that_lies_is_refused(folder: Path, header: str, data_bytes: int, words: str) -> None:
    size = len(header).to_bytes(8, "little")
    (folder / WEIGHTS).write_bytes(size + header.encode() + bytes(data_bytes))
    refused(folder, f"{WEIGHTS}: not a whole safetensors file", words)
    for wrong in (0, 1, len(header) - 1, 1 << 40, (1 << 64) - 1):
        (folder / WEIGHTS).write_bytes(wrong.to_bytes(8, "little") + header.encode() + bytes(data_bytes))
        refused(folder, f"{WEIGHTS}: not a whole safetensors file")


def test_a_file_that_is_not_safetensors_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"<html>" * 10_000)
    refused(folder, f"{WEIGHTS}: not a whole safetensors file")


def shard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Json:
    monkeypatch.setattr("engine.checkpoint.hf.SHARD_BYTES", 100_000)
    save(folder, TINY, random_tensors(TINY, 0))
    index: Json = json.loads((folder / WEIGHTS_INDEX).read_text())
    return index


def test_a_missing_shard_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = shard(folder, monkeypatch)["weight_map"][HEAD]
    (folder / lost).unlink()
    refused(folder, f"{lost}: no such file")


def test_a_shard_without_a_listed_tensor_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = shard(folder, monkeypatch)
    index["weight_map"]["model.more.weight"] = index["weight_map"][HEAD]
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index))
    refused(folder, index["weight_map"][HEAD], "model.more.weight is listed, but not in the file")


@pytest.mark.parametrize(
    "weight_map",
    [None, [], {HEAD: 3}, {HEAD: "../outside.safetensors"}, {HEAD: "/etc/passwd"}, {HEAD: "a\0.safetensors"}],
)
def test_an_index_must_map_tensor_names_to_files_beside_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, weight_map: object
) -> None:
    shard(folder, monkeypatch)
    (folder / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, f"{WEIGHTS_INDEX}: weight_map must map tensor names to files beside it")


# Numbers


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_no_tensor_that_is_read_may_hold_a_nan(folder: Path, kernels: KernelName) -> None:
    """All but the hash tables, which stay in their file: a row of those is first seen when a text needs it."""
    found, cpu = load(folder), torch.device("cpu")
    backend = choose_kernels(kernels, cpu)
    for name, tensor in found.tensors.items():
        broken = tensor.clone()
        broken.view(-1)[-1] = nan
        poisoned = replace(found, tensors=found.tensors | {name: broken})
        if name.startswith(HASHES):
            Model(poisoned.config, poisoned.tensors, torch.float32, cpu, backend)
            continue
        at = [size - 1 for size in tensor.shape]
        with pytest.raises(CheckpointError) as caught, poisoned.reading():
            Model(poisoned.config, poisoned.tensors, torch.float32, cpu, backend)
        assert str(caught.value) == f"{folder / WEIGHTS}: tensor {name} holds nan at {at}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, value: float) -> None:
    """Among the largest and least finite ones, in any lane of the processor and in the rest after them."""
    most = torch.finfo(dtype).max
    for size in (1, 7, 64, 70):
        numbers = torch.linspace(-1, 1, size, dtype=dtype).mul_(most)[None]
        require_finite("a", numbers)
        for at in range(size):
            broken = numbers.clone()
            broken[0, at] = value
            with pytest.raises(NotFinite, match=rf"^holds {value} at \[0, {at}\]$"):
                require_finite("a", broken)


def test_the_first_of_several_numbers_that_are_not_finite_is_named() -> None:
    numbers = torch.zeros(4, 5)
    numbers[1, 3], numbers[2] = inf, nan
    with pytest.raises(NotFinite, match=r"^holds inf at \[1, 3\], the first of 6 numbers that are not finite$"):
        require_finite("a", numbers)


def test_an_engine_names_the_file_and_its_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are spelled there: in a shard, and in Meta's layout."""
    patcher = "model.patcher.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda t: t[patcher].fill_(inf))
    for start in (make_engine, lambda path: Entropies(EngineConfig(str(path)))):
        with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: tensor {patcher} holds inf at \[0, 0\], the first of"):
            start(folder)
    file = shard(folder, monkeypatch)["weight_map"][QUERY]
    tensors = load_file(folder / file)
    tensors[QUERY][3, 4] = -inf
    save_file(tensors, folder / file)
    with pytest.raises(CheckpointError, match=rf"{file}: tensor {QUERY} holds -inf at \[3, 4\]$"):
        make_engine(folder)
    tensors = random_tensors(META_CONFIG, 0)
    tensors[QUERY][0, 1] = nan
    write_meta(folder / "meta", tensors, hub=False, beside=False)
    with pytest.raises(CheckpointError) as caught:
        make_engine(folder / "meta")
    name = "global_transformer.layers.1.attention.wq.weight"
    assert str(caught.value) == f"{folder / 'meta' / CONSOLIDATED}: tensor {name} holds nan at [0, 1]"


# Configurations


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "blt",}', "\0", "nul"])
def test_a_config_that_is_not_json_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(folder, "config.json: not JSON")


def test_a_config_that_is_not_text_is_refused(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\xfa")
    refused(folder, "config.json: not JSON")


def test_a_config_that_is_not_a_json_object_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")
    refused(folder, "config.json: expected a JSON object, found list")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(model_type="llama"), ["this is a model of the kind 'llama'. fastblt reads"]),
        (lambda c: c.pop("model_type"), ["this is a model of no known kind: it has no model_type"]),
        (lambda c: c["fastblt"].update(version=2), ["fastblt.version = 2", "should be 1"]),
        (lambda c: c["fastblt"].update(colour="red"), ["fastblt.colour = red"]),
        (lambda c: c["fastblt"].pop("block_size"), ["fastblt.block_size", "required"]),
        (lambda c: c["fastblt"].update(block_size=None), ["mask_id", "block_size None: both must be set, or neither"]),
        (
            lambda c: (
                [c.update(vocab_size=256)]
                + [c[stage].update(vocab_size=256) for stage in ("encoder_config", "decoder_config", "patcher_config")]
            ),
            ["vocab_size 256 must be at least 260"],
        ),
        (lambda c: c["fastblt"].update(mask_id=3), ["mask_id 3", "260"]),
        (lambda c: c["encoder_config"].update(hidden_size="wide"), ["encoder_config.hidden_size = wide", "integer"]),
        (lambda c: c["encoder_config"].update(hidden_size=30), ["dim 30", "4 heads"]),
        (lambda c: c["global_config"].update(num_hidden_layers=0), ["global_config.num_hidden_layers = 0"]),
        (lambda c: c["global_config"].update(num_hidden_layers=10**9), ["num_hidden_layers = 1000000000", "1000"]),
        (lambda c: c["global_config"].update(max_position_embeddings=10**400), ["max_position_embeddings = 1000"]),
        (lambda c: c["global_config"].update(num_key_value_heads=3), ["num_kv_heads 3"]),
        (lambda c: c["global_config"].update(head_dim=10), ["head_dim 10", "16"]),
        (lambda c: c["decoder_config"].update(hidden_act="gelu"), ["decoder_config.hidden_act = gelu"]),
        (lambda c: c["decoder_config"].update(hidden_size_global=65), ["decoder_config.hidden_size_global 65", "64"]),
        (lambda c: c["decoder_config"].update(cross_attn_k=3), ["decoder_config.cross_attn_k 3", "2"]),
        (
            lambda c: c["patcher_config"].update(rope_scaling={"rope_type": "yarn", "factor": 4}),
            ["patcher_config.rope_scaling.rope_type = yarn"],
        ),
        (lambda c: c["patcher_config"].update(vocab_size=256), ["patcher_config.vocab_size 256", "260"]),
        (lambda c: c["decoder_config"].update(rope_theta=1e-300), ["decoder_config.rope_theta = 1e-300", "equal to 1"]),
        (lambda c: c["patcher_config"].update(rms_norm_eps=-1.0), ["patcher_config.rms_norm_eps = -1.0"]),
        (lambda c: c.update(encoder_hash_byte_group_size=[3, 0]), ["encoder_hash_byte_group_size.1 = 0"]),
        (lambda c: c.update(encoder_hash_byte_group_size=[10**9]), ["encoder_hash_byte_group_size.0 = 1000000000"]),
        (lambda c: c.update(encoder_hash_byte_group_nb_functions=12), ["encoder_hash_byte_group_nb_functions = 12"]),
        (lambda c: c.update(patching_threshold=float("nan")), ["patching_threshold = nan"]),
        (lambda c: c.update(patch_in_forward=False), ["patch_in_forward = False"]),
        (lambda c: c.update(tie_word_embeddings=True), ["tie_word_embeddings = True"]),
        (lambda c: c.update(global_config=7), ["global_config = 7"]),
    ],
)
def test_a_bad_config_field_is_refused_with_its_value(
    folder: Path, change: Callable[[Json], Any], words: list[str]
) -> None:
    edit_config(folder, change)
    message = refused(folder, "config.json", *words)
    with pytest.raises(CheckpointError) as caught:
        read_config(folder)
    assert str(caught.value) == message


BILLION = 10**9
SECTIONS = ("encoder_config", "global_config", "decoder_config", "patcher_config")


def everywhere(config: Json, **changes: int) -> None:
    """Sets fields in the whole configuration and in all sections that have them."""
    for part in (config, config["fastblt"], *(config[name] for name in SECTIONS)):
        part.update({name: value for name, value in changes.items() if name in part})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *(
            (
                lambda c, section=section: c[section].update(max_position_embeddings=BILLION),
                [f"config.json: {section}.max_position_embeddings = 1000000000: ", "16777216"],
            )
            for section in SECTIONS
        ),
        *(
            (
                lambda c, section=section: c[section].update(num_hidden_layers=900),
                [f"(config.json: {section}.num_hidden_layers = 900, the file has {count}"],
            )
            for section, count in zip(SECTIONS, (1, 2, 2, 2), strict=True)
        ),
        (
            lambda c: c["global_config"].update(num_hidden_layers=1),
            ["is not part of this model (config.json: global_config.num_hidden_layers = 1, the file has 2)"],
        ),
        (
            lambda c: c["global_config"].update(intermediate_size=BILLION),
            ["mlp.gate_proj.weight has shape [192, 64]", "(config.json: global_config.intermediate_size = 1000000000)"],
        ),
        (
            lambda c: everywhere(c, vocab_size=BILLION, mask_id=BILLION),
            ["lm_head.weight has shape [260, 32], expected [1000000000, 32] (config.json: vocab_size = 1000000000)"],
        ),
        (
            lambda c: everywhere(c, hidden_size=BILLION, hidden_size_global=BILLION),
            ["expected [1000000000] (config.json: encoder_config.hidden_size = 1000000000)"],
        ),
        (
            lambda c: c.update(encoder_hash_byte_group_vocab=BILLION),
            ["expected [2000000000, 32] (config.json: encoder_hash_byte_group_vocab = 1000000000)"],
        ),
        (lambda c: everywhere(c, cross_attn_k=BILLION), ["has shape [64, 32], expected [32000000000, 32]"]),
        (lambda c: c["fastblt"].update(block_size=BILLION), ["config.json: fastblt.block_size = 1000000000", "1000"]),
        (lambda c: c["patcher_config"].update(num_attention_heads=BILLION), ["dim 32 must split into 1000000000"]),
        (lambda c: c.update(encoder_hash_byte_group_size=[3] * 65), ["encoder_hash_byte_group_size", "64 items"]),
        (lambda c: c.update(local_attention_window_len=1 << 40), ["local_attention_window_len = 1099511627776"]),
    ],
)
def test_huge_numbers_are_held_against_the_tensors_or_a_bound(
    folder: Path, change: Callable[[Json], Any], words: list[str]
) -> None:
    edit_config(folder, change)
    began = time.monotonic()
    refused(folder, *words)
    assert time.monotonic() - began < 2


# Meta's layout


def test_a_meta_folder_without_a_patcher_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps({"model": {}}))
    refused(folder, "no folder entropy_model with the patcher inside or beside it")


def test_missing_and_unsupported_meta_arguments_are_refused(tmp_path: Path) -> None:
    (tmp_path / "entropy_model").mkdir()
    entropy = tmp_path / "entropy_model" / "params.json"
    entropy.write_text(json.dumps({"entropy_model": {"dim": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 260}}))
    (tmp_path / "params.json").write_text(json.dumps({"model": {"cross_attn_encoder": False}}))
    refused(tmp_path, "params.json: vocab_size: Field required")
    (tmp_path / "params.json").write_text(json.dumps({"model": None, "data": {}}))
    refused(tmp_path, "params.json: model = None must be an object")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_layers_global": 10**9}, ["n_layers_global = 1000000000", "1000"]),
        ({"dim_global": 10**400}, ["dim_global = 1000"]),
        ({"dim_global": 10**8}, ["(config.json: dim_global = 100000000)"]),
        ({"n_layers_local_decoder": 900}, ["(config.json: n_layers_local_decoder = 900, the file has 2)"]),
        ({"max_seqlen": 10**9}, ["max_seqlen = 1000000000", "16777216"]),
        ({"max_encoder_seq_length": 10**9}, ["max_encoder_seq_length = 1000000000", "16777216"]),
        ({"encoder_hash_byte_group_size": ""}, ["encoder_hash_byte_group_size", "at least 1 item"]),
        ({"ffn_dim_multiplier": 1e308}, ["ffn_dim_multiplier = 1e+308", "1000"]),
    ],
)
def test_impossible_numbers_in_meta_arguments_are_refused(change: Json, words: list[str], tmp_path: Path) -> None:
    write_meta(tmp_path / "m", random_tensors(META_CONFIG, 0), hub=True, beside=False)
    (tmp_path / "m" / "config.json").write_text(json.dumps({"args": META_ARGS | change}))
    refused(tmp_path / "m", "config.json", *words)


def test_a_pth_file_that_is_truncated_or_holds_more_than_tensors_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "consolidated.pth"
    torch.save({"model": {"a": torch.zeros(100)}}, file)
    whole = file.read_bytes()
    for keep in (0, 10, 700, len(whole) - 1):
        file.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"consolidated\.pth: not a whole file of tensors"):
            open_torch(file)
    torch.save({"model": {"a": test_a_missing_tensor_is_refused_by_name}}, file)
    with pytest.raises(CheckpointError, match=r"consolidated\.pth"):
        open_torch(file)
    torch.save({"model": {"a": 3}}, file)
    with pytest.raises(CheckpointError, match="expected a state dict of tensors"):
        open_torch(file)


@pytest.mark.parametrize(
    "state",
    [
        {"model": {3: torch.zeros(1)}},
        {(1, 2): torch.zeros(1)},
        {"a": torch.eye(2).to_sparse()},
        {"a": torch.empty(2, device="meta")},
    ],
    ids=["a number as a name", "a pair as a name", "sparse", "without numbers"],
)
def test_a_state_dict_with_anything_but_named_tensors_is_refused(state: object, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "consolidated.pth")
    with pytest.raises(CheckpointError, match="expected a state dict of tensors"):
        open_torch(tmp_path / "consolidated.pth")


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore")
def test_a_broken_pickle_raises_only_checkpoint_errors(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    whole, file = tmp_path / "whole.pth", tmp_path / "consolidated.pth"
    if not whole.exists():
        torch.save({"model": {f"layer.{i}": torch.zeros(2, 3) for i in range(3)}}, whole)
    with ZipFile(whole) as old, ZipFile(file, "w") as new:
        for name in old.namelist():
            data = bytearray(old.read(name))
            if name.endswith("data.pkl"):
                for at, value in changes:
                    data[at % len(data)] = value
            new.writestr(name, bytes(data))
    with suppress(CheckpointError):
        open_torch(file)


# Anything


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_fifo_or_folder_in_place_of_a_file_is_refused_at_once(name: str, folder: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, f"{name}: not a regular file, but a pipe")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    refused(folder, f"{name}: not a regular file, but a pipe, a socket or a device")
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder, f"{name}: is a directory")


@pytest.mark.parametrize("depth", [33, 900, 100_000])
@pytest.mark.parametrize(("opened", "closed"), [('{"a":', "}"), ("[", "]")])
def test_json_that_is_nested_too_deep_is_refused(opened: str, closed: str, depth: int, folder: Path) -> None:
    """Also where the JSON library has no trouble, but what reads the values next would have."""
    (folder / "config.json").write_text(opened * depth + "1" + closed * depth)
    refused(folder, "config.json: JSON is nested more than 32 deep")


def test_unknown_fields_may_be_nested_as_deep_as_is_read(folder: Path) -> None:
    deep = json.loads("[" * 31 + "]" * 31)
    edit_config(folder, lambda c: c.update(more=deep))
    assert load(folder).notes


def test_json_that_is_too_large_is_refused_before_it_is_read(folder: Path) -> None:
    with (folder / "config.json").open("r+b") as file:
        file.truncate(1 << 40)
    refused(folder, "config.json: larger than 16 MiB")


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, WEIGHTS_INDEX, "params.json"])
def test_a_link_that_leads_to_itself_or_through_a_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink(missing_ok=True)
    if name == WEIGHTS_INDEX:
        (folder / WEIGHTS).unlink()
    (folder / name).symlink_to(name)
    refused(folder, f"{name}: too many levels of symbolic links")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/null/file")
    refused(folder, f"{name}: not a directory")


def test_a_folder_that_is_a_looping_link_or_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", "too many levels of symbolic links")
    (tmp_path / "file").write_text("{}")
    refused(tmp_path / "file", "not a directory")
    refused(tmp_path / "file" / "inside", "not a directory")


@contextmanager
def another_user() -> Iterator[None]:
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can read as another user")
def test_files_that_may_not_be_read_are_refused_by_their_reason() -> None:
    """Pytest's own folders are closed to other users."""
    with TemporaryDirectory() as name:
        folder, closed = Path(name), Path(name) / "closed"
        save(folder, TINY, random_tensors(TINY, 0, torch.bfloat16))
        folder.chmod(0o755)
        closed.mkdir(0o700)
        with another_user():
            load(folder)
            refused(closed, "params.json: permission denied")
        for file in ("config.json", WEIGHTS):
            (folder / file).chmod(0o600)
            with another_user():
                refused(folder, f"{file}: permission denied")
            (folder / file).rename(closed / file)
            (folder / file).symlink_to(closed / file)
            with another_user():
                refused(folder, f"{file}: permission denied")
            (closed / file).chmod(0o644)
            (closed / file).rename(folder / file)


def test_a_shard_name_that_is_too_long_for_a_file_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = shard(folder, monkeypatch)
    index["weight_map"] = dict.fromkeys(index["weight_map"], "x" * 300 + ".safetensors")
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index))
    refused(folder, ".safetensors: file name too long")


def test_checkpoint_error_messages_are_one_line_whatever_the_files_hold(folder: Path) -> None:
    edit_config(folder, lambda c: c.update({"a\nb": "c\x1b[31m"}))
    (note,) = load(folder).notes
    assert r"a\nb = c\x1b[31m" in note
    edit_tensors(folder, lambda t: t.update({"more\nand more": torch.zeros(1)}))
    refused(folder, r"tensor more\nand more of shape [1]")
    edit_config(folder, lambda c: c.update(vocab_size="2\r60"))
    refused(folder, r"vocab_size = 2\r60")


def test_model_names_are_escaped_to_valid_unicode(folder: Path) -> None:
    edit_config(folder, lambda c: c["fastblt"].update(name="tiny\ud800\n"))
    assert load(folder).config.name == r"tiny\ud800\n"
    assert model_name(Path("/models/tiny\udcff")) == r"tiny\udcff"


# Writing


def test_saving_tensors_of_wrong_shapes_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.checkpoint.hf.SHARD_BYTES", 100_000)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    tensors = random_tensors(TINY, 1)
    for changed in (
        {n: t for n, t in tensors.items() if n != HEAD},
        tensors | {"more": torch.zeros(1)},
        tensors | {HEAD: torch.zeros(1, 32)},
    ):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight|more"):
            save(folder, TINY, changed)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_saving_a_config_that_the_format_cannot_express_is_refused(tmp_path: Path) -> None:
    config = replace(TINY, decoder=replace(TINY.decoder, window=13))
    with pytest.raises(CheckpointError, match="encoder.window 64 must equal decoder.window 13"):
        save(tmp_path / "new", config, random_tensors(config, 0))
    config = replace(TINY, global_=StackConfig(64, 2, 4, 4, 192, 500000.0, 2048, window=5))
    with pytest.raises(CheckpointError, match="global_.window 5 must be None"):
        save(tmp_path / "new", config, random_tensors(config, 0))
    assert not (tmp_path / "new").exists()
