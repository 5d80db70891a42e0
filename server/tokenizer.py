"""Texts as ids and back, and what programs ask about a tokenizer.

There is nothing to look up: byte b has the id b + 4. Within a text the name of a special id is just text, as in the
prompt of a completion.
"""

from collections.abc import Iterable

from engine.config import BOS_ID, BYTE_OFFSET, EOS_ID, PAD_ID, SPECIAL_NAMES, is_byte

from .token_names import token_name

CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": SPECIAL_NAMES[BOS_ID],
    "eos_token": SPECIAL_NAMES[EOS_ID],
    "pad_token": SPECIAL_NAMES[PAD_ID],
    "add_bos_token": True,
    "split_special_tokens": True,
    "clean_up_tokenization_spaces": False,
}
"""tokenizer_config.json, as Hugging Face means it."""
_SPECIAL_IDS = {name: token for token, name in SPECIAL_NAMES.items()}


def ids_of(text: str) -> list[int]:
    """The ids of a text's UTF-8 bytes. A text that is nothing but the name of a special id is that id: programs learn
    the ids of begin and end of sequence so."""
    if text in _SPECIAL_IDS:
        return [_SPECIAL_IDS[text]]
    return [byte + BYTE_OFFSET for byte in text.encode()]


def text_of(ids: Iterable[int]) -> str:
    """Bytes that are not UTF-8 become U+FFFD. Ids that are no bytes become their names."""
    parts = [bytes((i - BYTE_OFFSET,)) if is_byte(i) else token_name(i).encode() for i in ids]
    return b"".join(parts).decode(errors="replace")
