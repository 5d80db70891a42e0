"""`fastblt tokenizer`: our ids as a tokenizer in Hugging Face's format, for programs that insist on one.

It is BPE without merges, so every byte stays a token of its own. BPE writes bytes as printable characters: a byte's own
Latin-1 character if that is printable, else the next unused one from U+0100 on. The special ids are in the vocabulary,
but not among the added tokens, whose names would be cut out of texts.
"""

import json
from pathlib import Path
from typing import Any

from engine.config import BOS_ID, BYTE_OFFSET, SPECIAL_NAMES

from .tokenizer import CONFIG

PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
"""The bytes that stand for themselves; a soft hyphen is invisible."""
BEGIN = SPECIAL_NAMES[BOS_ID]


def write(folder: Path) -> list[Path]:
    """Writes the files of the tokenizer into a folder, which is made if it is missing, and returns their paths. Raises
    FileExistsError if there is a tokenizer already, and OSError."""
    files: dict[str, Any] = {
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": CONFIG,
        "special_tokens_map.json": {name: CONFIG[name] for name in ("bos_token", "eos_token", "pad_token")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in files]
    if present := next((path for path in paths if path.exists()), None):
        raise FileExistsError(f"{present} exists: choose another folder, or delete it")
    for path, content in zip(paths, files.values(), strict=True):
        path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    return paths


def byte_names() -> list[str]:
    """The character that stands for each byte."""
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in PRINTABLE else next(others)) for byte in range(256)]


def _tokenizer() -> dict[str, Any]:
    vocabulary = {name: token for token, name in SPECIAL_NAMES.items()}
    vocabulary |= {name: byte + BYTE_OFFSET for byte, name in enumerate(byte_names())}
    begin = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    bytewise = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": bytewise,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, second],
            "special_tokens": {BEGIN: {"id": BEGIN, "ids": [BOS_ID], "tokens": [BEGIN]}},
        },
        "decoder": bytewise,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }
