"""Hash n-gram embeddings: the byte's own row plus one row of every n-gram table, a plain sum (BLT 3.2.1)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)
"""The base of hash function f is PRIMES[f]."""


def _powers(base: int, count: int) -> list[int]:
    """base^0 .. base^(count-1) as two's-complement int64."""
    powers = [pow(base, i, 1 << 64) for i in range(count)]
    return [p - (1 << 64) if p >> 63 else p for p in powers]


def ngram_hashes(windows: Tensor, group_sizes: Sequence[int], num_functions: int, rows: int) -> Tensor:
    """Table rows of every n-gram: (R, num_functions * len(group_sizes)) int64 in 0..rows-1, function-major.

    windows (R, W) int64: the last W ids ending at each byte, oldest first, 0 before the text; W >= max(group_sizes).
    The oldest id of a group is weighted by base^0, arithmetic wraps around at 64 bits, the modulus is floored.
    """
    hashes = []
    for function in range(num_functions):
        powers = torch.tensor(_powers(PRIMES[function], max(group_sizes)), device=windows.device)
        for size in group_sizes:
            hashes.append((windows[:, -size:] * powers[:size]).sum(-1).remainder(rows))
    return torch.stack(hashes, dim=1)


def hash_embed(windows: Tensor, embedding: Tensor, tables: Sequence[Tensor], hashes: Tensor) -> Tensor:
    """embedding[id] + sum over tables t of tables[t][hashes[:, t]]: (R, d) in embedding's dtype and device.

    windows as in `ngram_hashes` (its last column is the byte itself); hashes (R, len(tables)). The tables may lie on
    the host and have another dtype: only the rows that are read are moved and converted.
    """
    x = F.embedding(windows[:, -1], embedding)
    for t, table in enumerate(tables):
        x = x + F.embedding(hashes[:, t].to(table.device), table).to(x)
    return x
