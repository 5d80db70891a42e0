"""The names of ids in answers."""

from functools import cache

from engine.config import BYTE_OFFSET, SPECIAL_NAMES, is_byte

ASCII_END = 0x80


@cache
def token_name(token: int) -> str:
    r"""An ASCII byte is its character, any other byte `bytes:\xNN`, a special id its name, any other id `<ID>`."""
    if not is_byte(token):
        return SPECIAL_NAMES.get(token, f"<{token}>")
    byte = token - BYTE_OFFSET
    return chr(byte) if byte < ASCII_END else f"bytes:\\x{byte:02x}"
