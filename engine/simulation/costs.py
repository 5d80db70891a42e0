"""What a replica's steps cost, as it was measured on a server: for one decoder, at about the lengths of the load."""

from bisect import bisect_left
from pathlib import Path

import msgspec

from ..config import DtypeName


class RoundCost(msgspec.Struct, frozen=True):
    """Of so many sequences that generate side by side: seconds of a step, and bytes that each gets from it, more than
    one where the engine drafts or runs ahead."""

    sequences: int
    seconds: float
    num_bytes: float

    @property
    def byte_seconds(self) -> float:
        """Until each has one more byte."""
        return self.seconds / self.num_bytes


class PromptCost(msgspec.Struct, frozen=True):
    """Of a prompt of so many rows: what they add to the steps that run them."""

    rows: int
    seconds: float


class ReplicaCosts(msgspec.Struct, frozen=True, kw_only=True):
    """of: what was measured, for people. rounds: ascending by sequences, at least one. prompts: ascending by rows, at
    least one; later rows cost more, as they look back at more. request_seconds: of a request outside of the engine. The
    others are of that engine: its dtype, which sets how many rows `cache_bytes` hold, and its limits."""

    of: dict[str, str | int]
    decoder: str
    rounds: list[RoundCost]
    prompts: list[PromptCost]
    request_seconds: float
    dtype: DtypeName
    prompt_rows: int
    max_step_rows: int
    max_sequences: int
    cache_bytes: int
    page_size: int

    def round(self, sequences: int) -> RoundCost:
        """On straight lines between what was measured; fewer than measured cost what the fewest do. Beyond the last, a
        step gives as many bytes as there, and the seconds of a byte grow as between the last two, if they do."""
        rounds = self.rounds
        if len(rounds) == 1:
            return rounds[0]
        after = min(max(bisect_left([one.sequences for one in rounds], sequences), 1), len(rounds) - 1)
        low, high = rounds[after - 1], rounds[after]
        share = max((sequences - low.sequences) / (high.sequences - low.sequences), 0.0)
        if share > 1:
            # Not the seconds of a step: with more sequences it has fewer bytes, and may so take less time.
            growth = max(high.byte_seconds - low.byte_seconds, 0.0)
            byte_seconds = high.byte_seconds + (share - 1) * growth
            return RoundCost(sequences, byte_seconds * high.num_bytes, high.num_bytes)
        seconds = low.seconds + share * (high.seconds - low.seconds)
        return RoundCost(sequences, seconds, low.num_bytes + share * (high.num_bytes - low.num_bytes))

    def rows_seconds(self, start: int, end: int) -> float:
        """Of the rows start..end-1 of a prompt."""
        return self._prompt(end) - self._prompt(start)

    def _prompt(self, rows: float) -> float:
        points = [PromptCost(0, 0.0), *self.prompts]
        after = min(max(bisect_left([one.rows for one in points], rows), 1), len(points) - 1)
        low, high = points[after - 1], points[after]
        return low.seconds + (rows - low.rows) * (high.seconds - low.seconds) / (high.rows - low.rows)

    def most_requests_per_second(self, prompt_bytes: float, output_bytes: float) -> float:
        """That a replica can serve for long: with as many sequences as it has places for, and their prompts between
        their steps."""
        full = self.round(self.max_sequences)
        each = output_bytes * full.byte_seconds / self.max_sequences + self._prompt(prompt_bytes)
        return 1 / each


def read(path: Path) -> ReplicaCosts:
    """Raises ValueError, with the path, for a file that does not hold costs; OSError for one that cannot be read."""
    try:
        costs = msgspec.json.decode(path.read_bytes(), type=ReplicaCosts)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} holds no costs as `fastblt size --simulate` writes them: {error}") from error
    counts = [one.sequences for one in costs.rounds]
    wrong = any(one.seconds <= 0 or one.num_bytes < 1 for one in costs.rounds)
    if not counts or counts != sorted(set(counts)) or counts[0] < 1 or wrong:
        raise ValueError(
            f"{path}: `rounds` must have entries with ascending `sequences`, `seconds` above 0 and `num_bytes` of at "
            "least 1"
        )
    rows, seconds = [one.rows for one in costs.prompts], [one.seconds for one in costs.prompts]
    if not rows or rows != sorted(set(rows)) or rows[0] < 1 or seconds != sorted(seconds) or seconds[0] <= 0:
        raise ValueError(f"{path}: `prompts` must have entries with ascending `rows` and `seconds` above 0")
    return costs


def write(path: Path, costs: ReplicaCosts) -> None:
    """Raises OSError."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(costs), indent=2) + b"\n")
