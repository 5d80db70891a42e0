"""The 1B shape in its other forms: float8 weights, and as the released models are. See `shape_1b`."""

from .piece import Piece
from .setting import Setting
from .shape_1b import compare


def measure(setting: Setting, piece: Piece) -> None:
    float8 = (True,) if setting.has_float8() else ()
    compare(setting, piece, "released", (False, *float8))
    compare(setting, piece, "fast", float8)
