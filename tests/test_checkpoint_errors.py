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
FUSED = "model.encoder_hash_tok_embedding.weight"

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


def test_the_first_of_many_tensor_errors_are_listed_and_the_rest_counted(folder: Path) -> None:
    edit_tensors(folder, lambda t: [t.pop(name) for name in [*t][:10]])
    message = refused(folder, "and 6 more")
    assert message.count("is missing") == 4


# Files


def test_a_missing_checkpoint_folder_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such directory")


def shard(folder: Path) -> Json:
    """In several files; returns their index."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.checkpoint.hf.SHARD_BYTES", 100_000)
        save(folder, TINY, random_tensors(TINY, 0))
    index: Json = json.loads((folder / WEIGHTS_INDEX).read_text())
    return index


Break = Callable[[Path], Any]
ENTRY = '{"a":{"dtype":%s,"shape":%s,"data_offsets":%s}}'


def written(name: str, data: bytes | str) -> Break:
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def cut(name: str, keep: int) -> Break:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def header(text: str | bytes, data_bytes: int = 64, size: int | None = None) -> Break:
    """Weights that begin with this header. size: what the file says of its length."""
    raw = text if isinstance(text, bytes) else text.encode()
    return written(WEIGHTS, (len(raw) if size is None else size).to_bytes(8, "little") + raw + bytes(data_bytes))


def tensors_at(*tensors: tuple[str, int, int]) -> str:
    """A header of tensors of 16 numbers of four bytes: name, beginning and end."""
    entries = (f'"{name}":{{"dtype":"F32","shape":[16],"data_offsets":[{at},{end}]}}' for name, at, end in tensors)
    return f"{{{','.join(entries)}}}"


def tensors(change: Callable[[Tensors], Any]) -> Break:
    return lambda folder: edit_tensors(folder, change)


def head(tensor: torch.Tensor) -> Break:
    return tensors(lambda t: t.update({HEAD: tensor}))


def instead(name: str, make: Break) -> Break:
    """Something else in place of a file."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def link(target: str) -> Break:
    return lambda path: path.symlink_to(target)


def sharded(change: Callable[[Path, str], Any]) -> Break:
    """Of the folder, and the name of the file that holds HEAD."""
    return lambda folder: change(folder, shard(folder)["weight_map"][HEAD])


def in_shard(make: Break) -> Break:
    return sharded(lambda folder, name: instead(name, make)(folder))


def listed(change: Callable[[Json], Any]) -> Break:
    """Changes the index of several files."""

    def apply(folder: Path) -> None:
        index = shard(folder)
        change(index)
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index))

    return apply


def mapped(weight_map: object) -> Break:
    return listed(lambda index: index.update(weight_map=weight_map))


def pickled(path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, path)


CUT = f"{WEIGHTS}: not a whole safetensors file"
SHARD = "-of-00011.safetensors: "
OTHER = "not a regular file, but a pipe, a socket or a device"
DEEP = "JSON is nested more than 32 deep"
LOOP = "too many levels of symbolic links"
MAP = f"{WEIGHTS_INDEX}: weight_map must map tensor names to files beside it"
PLACES = ("config.json", WEIGHTS, WEIGHTS_INDEX)

BAD: dict[str, tuple[Break, str]] = {
    # Weights that are cut, or say of themselves what is not so.
    **{f"weights cut at {keep}": (cut(WEIGHTS, keep), CUT) for keep in (0, 4, 8, 1000, 100_000, -1)},
    **{
        f"header length {size}": (header(tensors_at(("a", 0, 64)), size=size), CUT)
        for size in (0, 1, 50, 1 << 40, (1 << 64) - 1)
    },
    "tensor twice": (header(tensors_at(("a", 0, 64), ("a", 0, 64))), f"{CUT}: its header has a twice"),
    "tensors overlap": (header(tensors_at(("a", 0, 64), ("b", 32, 96)), 96), "invalid offset for tensor `b`"),
    "gap between tensors": (header(tensors_at(("a", 0, 64), ("b", 96, 160)), 160), "invalid offset for tensor `b`"),
    "too few bytes": (header(tensors_at(("a", 0, 60))), "invalid shape, data type, or offset for tensor"),
    "bytes after the end": (header(tensors_at(("a", 0, 1 << 62))), "invalid shape, data type, or offset for tensor"),
    "bytes of no tensor": (header(tensors_at(("a", 0, 64)), 65), "file not fully covered"),
    "offset -64": (header(tensors_at(("a", -64, 0))), f"{CUT}: "),
    "offsets swapped": (header(tensors_at(("a", 64, 0))), "invalid offset for tensor `a`"),
    "offset 64.5": (header(ENTRY % ('"F32"', "[16]", "[0,64.5]")), "floating point `64.5`"),
    "offset 1e30": (header(ENTRY % ('"F32"', "[16]", "[0,1e30]")), "floating point `1e+30`"),
    "one offset": (header(ENTRY % ('"F32"', "[16]", "[0]")), "invalid length 1"),
    "shape -16": (header(ENTRY % ('"F32"', "[-16]", "[0,64]")), "integer `-16`"),
    "shape 2^96": (header(ENTRY % ('"F32"', f"[{1 << 32},{1 << 32},{1 << 32}]", "[0,64]")), "overflow"),
    "dtype unknown": (header(ENTRY % ('"F99"', "[16]", "[0,64]")), "unknown variant `F99`"),
    "dtype 7": (header(ENTRY % ("7", "[16]", "[0,64]")), "integer `7`"),
    "dtype missing": (header('{"a":{"shape":[16],"data_offsets":[0,64]}}'), "missing field `dtype`"),
    "header nested 100,000 deep": (header('{"a":' * 100_000), "recursion limit exceeded"),
    "header a list": (header("[1]"), f"{CUT}: "),
    "header null": (header("null"), f"{CUT}: "),
    "header not JSON": (header("{"), "EOF while parsing"),
    "header not UTF-8": (header(b'{"\xff":1}'), "invalid UTF-8"),
    "entry a text": (header('{"a":"b"}'), f"{CUT}: "),
    "no tensors": (header("{}", 0), "tensor model.local_encoder.embed_tokens.weight is missing"),
    "weights pickled": (instead(WEIGHTS, pickled), CUT),
    "weights HTML": (written(WEIGHTS, b"<html>" * 10_000), CUT),
    "weights GGUF": (written(WEIGHTS, b"GGUF" + bytes(1000)), CUT),
    # Tensors that do not fit the configuration.
    "tensor missing": (tensors(lambda t: t.pop(QUERY)), f"tensor {QUERY} is missing, expected shape [64, 64]"),
    "tensor too many": (
        tensors(lambda t: t.update({"model.extra.weight": torch.zeros(3, 5)})),
        "tensor model.extra.weight of shape [3, 5] is not part of this model",
    ),
    "tensor of wrong shape": (head(torch.zeros(261, 32)), f"tensor {HEAD} has shape [261, 32], expected [260, 32]"),
    "tensor transposed": (head(torch.zeros(32, 260)), f"tensor {HEAD} has shape [32, 260], expected [260, 32]"),
    "tensor empty": (head(torch.zeros(0, 32)), f"tensor {HEAD} has shape [0, 32], expected [260, 32]"),
    "tensor scalar": (head(torch.tensor(1.0)), f"tensor {HEAD} has shape [], expected [260, 32]"),
    "hash table too short": (
        tensors(lambda t: t.update({FUSED: torch.zeros(501, 32)})),
        f"tensor {FUSED} has shape [501, 32], expected [502, 32]",
    ),
    **{
        f"tensor of {name}": (
            head(torch.zeros(260, 32).to(dtype)),
            f"tensor {HEAD} has dtype {name}, expected float32, bfloat16 or float16",
        )
        for name, dtype in {
            "I8": torch.int8,
            "I64": torch.int64,
            "BOOL": torch.bool,
            "F64": torch.float64,
            "C64": torch.complex64,
            "F8_E4M3": torch.float8_e4m3fn,
        }.items()
    },
    # Files that are none.
    "no config": (lambda f: (f / "config.json").unlink(), "there is no config.json or params.json. fastblt reads"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS}: no such file"),
    **{f"{name} a pipe": (instead(name, os.mkfifo), f"{name}: {OTHER}") for name in PLACES[:2]},
    **{f"{name} a device": (instead(name, link("/dev/zero")), f"{name}: {OTHER}") for name in PLACES[:2]},
    **{f"{name} a folder": (instead(name, Path.mkdir), f"{name}: is a directory") for name in PLACES[:2]},
    **{f"{name} a loop": (instead(name, link(name)), f"{name}: {LOOP}") for name in (*PLACES[:2], "params.json")},
    **{f"{name} below a file": (instead(name, link("/dev/null/a")), f"{name}: not a directory") for name in PLACES[:2]},
    **{f"{name} a broken link": (instead(name, link("gone")), f"{name}: a broken link") for name in PLACES[:2]},
    "index a pipe": (sharded(lambda f, _: instead(WEIGHTS_INDEX, os.mkfifo)(f)), f"{WEIGHTS_INDEX}: {OTHER}"),
    "index a folder": (sharded(lambda f, _: instead(WEIGHTS_INDEX, Path.mkdir)(f)), f"{WEIGHTS_INDEX}: is a directory"),
    "index a loop": (sharded(lambda f, _: instead(WEIGHTS_INDEX, link(WEIGHTS_INDEX))(f)), f"{WEIGHTS_INDEX}: {LOOP}"),
    "shard missing": (sharded(lambda f, name: (f / name).unlink()), f"{SHARD}no such file"),
    "shard a pipe": (in_shard(os.mkfifo), f"{SHARD}{OTHER}"),
    "shard a folder": (in_shard(Path.mkdir), f"{SHARD}is a directory"),
    "shard a loop": (in_shard(lambda path: path.symlink_to(path.name)), f"{SHARD}{LOOP}"),
    "shard cut": (sharded(lambda f, name: cut(name, -1)(f)), f"{SHARD}not a whole safetensors file"),
    "shard empty": (sharded(lambda f, name: cut(name, 0)(f)), f"{SHARD}not a whole safetensors file"),
    "shard pickled": (in_shard(pickled), f"{SHARD}not a whole safetensors file"),
    # An index that does not fit its files.
    "tensor not in its shard": (
        listed(lambda index: index["weight_map"].update(more=index["weight_map"][HEAD])),
        "more is listed, but not in the file",
    ),
    "tensor not in the index": (
        listed(lambda index: index["weight_map"].pop(HEAD)),
        f"does not match {WEIGHTS_INDEX}: {HEAD} is in the file, but not listed",
    ),
    "index without a map": (listed(lambda index: index.pop("weight_map")), MAP),
    **{
        f"map {number}": (mapped(weight_map), MAP)
        for number, weight_map in enumerate(
            [None, [], {HEAD: 3}, {HEAD: "../outside.safetensors"}, {HEAD: "/etc/passwd"}, {HEAD: "a\0.safetensors"}]
        )
    },
    "shard's name too long": (mapped({HEAD: "x" * 300 + ".safetensors"}), ".safetensors: file name too long"),
    "index empty": (sharded(lambda f, _: cut(WEIGHTS_INDEX, 0)(f)), f"{WEIGHTS_INDEX}: not JSON"),
    "index a list": (
        sharded(lambda f, _: written(WEIGHTS_INDEX, "[]")(f)),
        f"{WEIGHTS_INDEX}: expected a JSON object, found list",
    ),
    "index nested 100,000 deep": (
        sharded(lambda f, _: written(WEIGHTS_INDEX, "[" * 100_000 + "]" * 100_000)(f)),
        f"{WEIGHTS_INDEX}: {DEEP}",
    ),
    # A config that is no JSON object.
    **{
        f"config {text!r}": (written("config.json", text), "config.json: not JSON")
        for text in ("", "{", '{"model_type": "blt",}', "\0", "nul", b"\xff\xfe\xfa", b"\xef\xbb\xbf{}")
    },
    "config in UTF-16": (written("config.json", "{}".encode("utf-16")), "config.json: not JSON"),
    "config that is weights": (lambda f: (f / WEIGHTS).replace(f / "config.json"), "config.json: not JSON"),
    "config of 100,000 digits": (written("config.json", '{"a":' + "9" * 100_000 + "}"), "config.json: not JSON"),
    "config a list": (written("config.json", "[1]"), "config.json: expected a JSON object, found list"),
    "config of 1 TB": (lambda f: os.truncate(f / "config.json", 1 << 40), "config.json: larger than 16 MiB"),
    **{
        f"config nested {depth} deep in {opened[0]}": (
            written("config.json", opened * depth + "1" + closed * depth),
            f"config.json: {DEEP}",
        )
        # Also where the JSON library has no trouble, but what reads the values next would have.
        for depth in (33, 900, 100_000)
        for opened, closed in (('{"a":', "}"), ("[", "]"))
    },
}
"""What is wrong: how a good checkpoint is broken, and what must be said beside the folder. What fields of a config may
hold, and numbers that are not finite, follow below."""


@pytest.mark.parametrize(("broken", "words"), BAD.values(), ids=BAD)
def test_a_bad_checkpoint_is_refused_by_the_name_of_its_file_or_tensor(folder: Path, broken: Break, words: str) -> None:
    broken(folder)
    began = time.monotonic()
    refused(folder, words)
    assert time.monotonic() - began < 2


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


def test_an_engine_names_the_file_and_its_tensor(folder: Path) -> None:
    """As they are spelled there: in a shard, and in Meta's layout."""
    patcher = "model.patcher.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda t: t[patcher].fill_(inf))
    for start in (make_engine, lambda path: Entropies(EngineConfig(str(path)))):
        with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: tensor {patcher} holds inf at \[0, 0\], the first of"):
            start(folder)
    file = shard(folder)["weight_map"][QUERY]
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
        (lambda c: everywhere(c, cross_attn_k=BILLION), ["slots (cross_attn_k) 1000000000 must be at most 16"]),
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
    torch.save({"model": {"a": refused}}, file)
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


def test_unknown_fields_may_be_nested_as_deep_as_is_read(folder: Path) -> None:
    deep = json.loads("[" * 31 + "]" * 31)
    edit_config(folder, lambda c: c.update(more=deep))
    assert load(folder).notes


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
