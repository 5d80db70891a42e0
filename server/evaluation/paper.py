"""What the paper reports of its models: Fast BLT, arXiv 2605.08044, tables 3 to 6 (1B) and 7 to 10 (3B)."""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

PaperModel = Literal["1b", "3b"]
PAPER_MODELS: tuple[PaperModel, ...] = get_args(PaperModel)
TABLES = Path(__file__).with_name("paper.csv")


@dataclass(frozen=True, slots=True)
class PaperRow:
    """A row of its tables. score: pass@1 or BLEU, in percent. acceptance: percent of the drafted bytes; None where
    nothing is checked. Calls are per problem, rounded down. gigabytes: weights read per problem, two bytes a parameter.
    saved: percent of BLT's gigabytes; None for BLT itself."""

    score: float
    acceptance: float | None
    decoder_calls: float
    global_calls: float
    gigabytes: float
    saved: float | None


@cache
def paper_rows(model: PaperModel, task: str) -> dict[str, PaperRow]:
    """By the names of `settings.py`. Empty for a task that is not in the paper."""
    with TABLES.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["model"], row["task"]) == (model, task)]
    return {
        row["setting"]: PaperRow(
            float(row["score"]),
            _number(row["acceptance"]),
            float(row["decoder_calls"]),
            float(row["global_calls"]),
            float(row["gigabytes"]),
            _number(row["saved"]),
        )
        for row in rows
    }


def _number(text: str) -> float | None:
    return float(text) if text else None
