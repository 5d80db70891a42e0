"""The checkpoint reader: a folder with one odd file is a checkpoint that fits its configuration, or one clear error.

An input is the name of a file of a sound checkpoint, a line feed, and what the file holds instead. `header` is the
header of `model.safetensors`, whose length and numbers are added.
"""

import resource
import struct
import tempfile
from functools import cache
from pathlib import Path
from unittest import mock

import torch

from engine.checkpoint import PRESETS, CheckpointError, expected_shapes, files, hf, load, random_tensors, save
from engine.layout import CONFIG, CONSOLIDATED, ENTROPY_FOLDER, PARAMS, TRAIN_ARGS, WEIGHTS, WEIGHTS_INDEX
from tests.fuzz.target import Target
from tests.test_checkpoint_formats import META_CONFIG, write_meta

HEADER, HUB_CONFIG = "header", "args.json"
PLACES = {
    CONFIG: f"ours/{CONFIG}",
    WEIGHTS: f"ours/{WEIGHTS}",
    HEADER: f"ours/{WEIGHTS}",
    WEIGHTS_INDEX: f"sharded/{WEIGHTS_INDEX}",
    HUB_CONFIG: f"hub/{CONFIG}",
    TRAIN_ARGS: f"hub/{TRAIN_ARGS}",
    PARAMS: f"trained/{PARAMS}",
    ENTROPY_FOLDER: f"trained/{ENTROPY_FOLDER}/{PARAMS}",
    CONSOLIDATED: f"trained/{CONSOLIDATED}",
}
"""Which file an input replaces. Names in other layouts are told apart by names of their own."""
MESSAGE = 4000
"""Most characters of an error's message."""
MEGABYTES = 512
"""By which an input may raise the memory that the process has ever had."""


def one(data: bytes) -> None:
    first, _, content = data.partition(b"\n")
    name = first.decode(errors="replace")
    if name not in PLACES:
        return
    root, sound = _sound()
    place = root / PLACES[name]
    if name == HEADER:
        (size,) = struct.unpack("<Q", sound[WEIGHTS][:8])
        content = struct.pack("<Q", len(content)) + content + sound[WEIGHTS][8 + size :]
    place.write_bytes(content)
    try:
        _check(root / PLACES[name].partition("/")[0])
    finally:
        place.write_bytes(sound[WEIGHTS if name == HEADER else name])


def _check(folder: Path) -> None:
    before = _peak()
    try:
        found = load(folder)
    except CheckpointError as error:
        message = str(error)
        assert str(folder) in message and message.isprintable() and len(message) <= MESSAGE, message
    else:
        shapes = {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}
        assert shapes == dict(expected_shapes(found.config))
        for tensor in found.tensors.values():
            assert tensor.dtype in files.DTYPES.values()
            tensor.view(-1)[-1:].item()
    assert _peak() - before < MEGABYTES


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


_folders: list[tempfile.TemporaryDirectory[str]] = []


@cache
def _sound() -> tuple[Path, dict[str, bytes]]:
    """A folder of sound checkpoints, and the files that are replaced."""
    _folders.append(tempfile.TemporaryDirectory(prefix="fuzz-"))
    root, config = Path(_folders[0].name), PRESETS["tiny"]
    save(root / "ours", config, random_tensors(config, 0, torch.bfloat16))
    with mock.patch.object(hf, "SHARD_BYTES", 64 << 10):
        save(root / "sharded", config, random_tensors(config, 0, torch.bfloat16))
    metas = random_tensors(META_CONFIG, 0, torch.bfloat16)
    write_meta(root / "hub", metas, hub=True, beside=False)
    write_meta(root / "trained", metas, hub=False, beside=False)
    return root, {name: (root / place).read_bytes() for name, place in PLACES.items()}


def _seeds() -> list[bytes]:
    _, sound = _sound()
    (size,) = struct.unpack("<Q", sound[WEIGHTS][:8])
    contents = sound | {HEADER: sound[WEIGHTS][8 : 8 + size], WEIGHTS: sound[WEIGHTS][: 8 + size]}
    contents[CONSOLIDATED] = contents[CONSOLIDATED][:2000]
    return [f"{name}\n".encode() + content for name, content in contents.items()]


def _no_check_of_shapes(*_: object) -> None:
    """Names, shapes and dtypes are taken as they are."""


TARGET = Target(
    one,
    seeds=_seeds(),
    faults={
        "does not check tensors": lambda: mock.patch.object(hf, "check", _no_check_of_shapes),
        "does not look for errors of JSON": lambda: mock.patch.object(
            files, "ValueError", ZeroDivisionError, create=True
        ),
    },
    words=[
        *(
            b"-1",
            b"0",
            b"1e400",
            b"1000000000",
            b"9223372036854775807",
            b"null",
            b"true",
            b"[]",
            b"{}",
            b'""',
            b"[" * 2000,
        ),
        *(b"BF16", b"F32", b"I64", b'"shape":', b'"data_offsets":', b"NaN", b"\\u0000", b"\\ud800", b"\xff"),
    ],
)
