"""What the host costs: the share of a step in which the device idles, and what the host launches and copies for every
byte that is committed. Each decoder at the 1B shape, alone and with 16 at a time; the most exposed are named first.
"""

from benchmarks.models import random_model
from benchmarks.replay import replayed

from .piece import Piece
from .profiling import WAYS, profile_steps
from .setting import Setting
from .shape_1b import shape_of

CONCURRENCY = (1, 16)
MOST_EXPOSED = 0.03


def measure(setting: Setting, piece: Piece) -> None:
    shape, cache_bytes = shape_of(setting)
    model = random_model(setting.work, shape, "fast", device=setting.device)
    numbers = (1, 2) if setting.quick else CONCURRENCY
    engine = setting.engine(model, dtype="bfloat16", max_sequences=max(numbers), cache_bytes=cache_bytes)
    wrap, exposed = replayed(engine), {}
    for number in numbers:
        for way, how in WAYS.items():
            steps = profile_steps(engine, how, wrap, setting, number=number)
            committed = max(steps["bytes_per_step"], 1 / steps["steps"])
            copies = sum(count for name, count in steps["launches_per_step"].items() if "Memcpy" in name)
            launches = sum(steps["launches_per_step"].values()) - copies
            exposed[f"{way}, {number} at a time"] = steps["host_gap"]
            piece.row(
                "host",
                {
                    "concurrency": number,
                    "decoder": way,
                    "host_gap": steps["host_gap"],
                    "host_us_per_byte": 1000 * steps["ms_per_step"] * steps["host_gap"] / committed,
                    "launches_per_byte": launches / committed,
                    "copies_per_byte": copies / committed,
                    "bytes_per_step": committed,
                },
            )
    ranked = sorted(exposed.items(), key=lambda item: -item[1])
    over = [f"{name} {gap:.0%}" for name, gap in ranked if gap > MOST_EXPOSED]
    said = f"above {MOST_EXPOSED:.0%}: {', '.join(over)}" if over else f"at most {MOST_EXPOSED:.0%} everywhere"
    piece.put(decided={"exposed host time, the most first": said})
