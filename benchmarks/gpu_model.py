"""Predicts bytes a second on a GPU from what the code launches and reads.

`python -m benchmarks.gpu_model` takes the launches of each call from `benchmarks.launches` and its bytes from the
engine's own accounting. A call takes the time to stream its bytes at the speed of a plain copy, and for each launch a
time in which the memory is idle: until the launch's first loads arrive, and after its last. With one such time for each
stage, and the share of a round in which the device waits for the host, this reproduced four decoders on an H200 within
2 % (691, 1,379, 2,413 and 2,087 bytes a second against 692, 1,379, 2,397 and 2,087 measured, of the kernels of then).
Kernels that are made otherwise have other exposed times: a prediction for them is what would follow if they had not.
"""

import argparse
import json
import os
from typing import NamedTuple

os.environ.setdefault("TRITON_INTERPRET", "1")  # Nothing is computed.

from engine.checkpoint import PRESETS
from engine.config import ModelConfig
from engine.costs.accounting import StageBytes

from .launches import RATES, Rates, calls
from .models import shaped

COPY_GB_S = 4240.0
"""A plain copy on an H200, bytes read and written."""
EXPOSED_US = {"local": 2.05, "global": 3.42, "decoder": 2.38}
"""Per launch, solved from the speeds of four decoders on an H200."""
HOST_SHARE = {"blt": 0.19, "blt-s k=8": 0.16, "blt-d B=8": 0.16, "blt-dv B=8": 0.33}
"""Of a round, as measured there."""
LENGTH = 260
"""Bytes of text before, as in those measurements."""
PATCH = 1 / RATES["blt"].global_


class Launches(NamedTuple):
    """Of a call of patcher and encoder together, of the global stage, of a pass over a byte, and over a block."""

    local: float
    global_: float
    decoder: float
    blocks: float


class Prediction(NamedTuple):
    """Microseconds of each call; for a committed byte launches, megabytes and microseconds; the share of the copy's
    speed."""

    local_us: float
    global_us: float
    pass_us: float
    launches: float
    megabytes: float
    us: float
    use: float

    @property
    def bytes_per_second(self) -> float:
        return 1e6 / self.us


def launches(config: ModelConfig) -> Launches:
    """As the code is now; the copies around a recording are left to the host's share."""
    counts = {name: found.total() for name, found in calls(config).items()}
    return Launches(counts["patcher"] + counts["encoder"], counts["global"], counts["decoder"], counts["blocks"])


def predict(
    config: ModelConfig,
    of: Launches,
    rates: Rates,
    host_share: float,
    *,
    batch: int = 1,
    length: int = LENGTH,
    copy_gb_s: float = COPY_GB_S,
    exposed_us: dict[str, float] = EXPOSED_US,
) -> Prediction:
    """So many requests at a time of a decoder with these rates, in bfloat16. A launch exposes as much with up to 16
    rows; more are not predicted well."""
    read = StageBytes.of(config, 2, 2)
    # One call of the global stage serves all that close a patch.
    rounds = rates._replace(global_=1 - (1 - rates.global_) ** batch, bytes=batch * rates.bytes)
    closing = batch * rates.global_ / rounds.global_

    def megabytes(*stages: str, rows: int = 1) -> float:
        def seen(stage: str) -> float:
            window = getattr(config, stage).window if stage != "global" else None
            before = length / PATCH if stage == "global" else min(length, window or length)
            served = closing if stage == "global" else batch
            return read.weights[stage] + served * (read.kv_row[stage] * before + read.row[stage] * rows)

        return sum(map(seen, stages)) / 1e6

    def us(data: float, number: float, stage: str) -> float:
        return data / copy_gb_s * 1e3 + number * exposed_us[stage]

    data = [megabytes("patcher", "encoder"), megabytes("global"), megabytes("decoder"), megabytes("decoder", rows=8)]
    took = [us(mb, n, stage) for mb, n, stage in zip(data, of, ("local", "global", "decoder", "decoder"), strict=True)]

    def of_byte(each: "list[float] | Launches") -> float:
        return sum(rate * cost for rate, cost in zip(rounds[:4], each, strict=True)) / rounds.bytes

    per_byte = of_byte(took) / (1 - host_share)
    moved = of_byte(data)
    use = moved / per_byte * 1e3 / copy_gb_s
    return Prediction(took[0], took[1], took[2 if rates.drafts else 3], of_byte(of), moved, per_byte, use)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model", description=__doc__)
    parser.add_argument("--model", choices=PRESETS, default="1b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="how many requests at a time")
    parser.add_argument("--length", type=int, default=LENGTH, help="bytes of text before")
    parser.add_argument("--copy-gb-s", type=float, default=COPY_GB_S, help="speed of a plain copy, read and written")
    parser.add_argument("--exposed-us", type=float, help="of each launch, in all stages; by default as measured")
    parser.add_argument("--host-share", type=float, help="of a round; by default as measured for each decoder")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    config = shaped(options.model, "fast")
    exposed = EXPOSED_US if options.exposed_us is None else dict.fromkeys(EXPOSED_US, options.exposed_us)
    of, found = launches(config), {}
    for batch in options.batch:
        for name, rates in RATES.items():
            host = HOST_SHARE[name] if options.host_share is None else options.host_share
            found[batch, name] = predict(
                config, of, rates, host,
                batch=batch, length=options.length, copy_gb_s=options.copy_gb_s, exposed_us=exposed,
            )  # fmt: skip
    if options.json:
        rows = [
            {"concurrency": batch, "decoder": name, **p._asdict(), "bytes_per_second": p.bytes_per_second}
            for (batch, name), p in found.items()
        ]
        print(json.dumps(rows))
        return
    print(
        "| decoder | batch | patcher, encoder us | global us | pass us | launches a byte | MB a byte | bytes/s | use |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for (batch, name), p in found.items():
        print(
            f"| {name} | {batch} | {p.local_us:.0f} | {p.global_us:.0f} | {p.pass_us:.0f} | {p.launches:.0f} | "
            f"{p.megabytes:,.0f} | {p.bytes_per_second:,.0f} | {p.use:.2f} |"
        )


if __name__ == "__main__":
    main()
