"""Compares the copies of parameters that several ranks hold, by their hashes, at intervals.

Copies drift apart when a gradient is summed over too few ranks, when a device computes wrongly, or when memory flips a
bit; the loss does not show it for days. Every rank hashes its shards; shards with the same name, offset and shape are
copies of each other in every layout.
"""

from __future__ import annotations

import base64
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from fusiontree.engines.base import Engine
from fusiontree.utils.hashing import stable_hash

_CHUNK = 1 << 24
"""Elements hashed at a time; bounds the memory for their 64-bit copies."""
_MULTIPLIER = -7046029254386353131  # 2^64 over the golden ratio, as a signed number
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def hash_values(values: Tensor) -> int:
    """Return a 64-bit hash of a tensor's bits; one element changed always changes it. Exact on every device."""
    flat = values.contiguous().view(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(start, start + part.numel(), device=part.device)
        # An odd factor a place: a change of one element is never lost modulo 2^64.
        total += (part * ((places * _MULTIPLIER) | 1)).sum()
    return int(total)


def find_differences(engine: Engine) -> list[str]:
    """Compare all copies of parameters; all ranks call this together.

    Returns:
        One sentence per parameter whose copies differ, naming the ranks that are in the minority (all of them where
        there is none); the same on every rank. Empty when all is well.
    """
    held: dict[int, str] = {}
    pairs = []
    for name, offset, values in engine.parameter_pieces():
        if values.numel():
            key = _signed(stable_hash("piece", name, str(offset), str(tuple(values.shape))))
            held[key] = name if not any(offset) else f"{name} from {list(offset)}"
            pairs.append((key, hash_values(values)))
    mine = np.array(pairs, np.int64).reshape(-1, 2)
    texts = engine.gather_text(base64.b64encode(mine.tobytes()).decode())
    hashes: dict[int, dict[int, int]] = {}  # piece -> rank -> hash
    for rank, text in enumerate(texts):
        for key, value in np.frombuffer(base64.b64decode(text), np.int64).reshape(-1, 2).tolist():
            hashes.setdefault(key, {})[rank] = value
    different = sorted(key for key, by_rank in hashes.items() if len(set(by_rank.values())) > 1)
    if not different:
        return []
    # A rank knows the names of what it holds itself; here they are put together.
    names: dict[int, str] = {}
    for text in engine.gather_text("\n".join(f"{key} {held[key]}" for key in different if key in held)):
        names |= {int(line.split(" ", 1)[0]): line.split(" ", 1)[1] for line in text.splitlines()}
    return [f"{names[key]} differs on {_minority(hashes[key])}" for key in different]


def _minority(by_rank: dict[int, int]) -> str:
    (common, count), *others = Counter(by_rank.values()).most_common()
    ranks = sorted(by_rank)
    if count > others[0][1]:
        odd = [rank for rank in ranks if by_rank[rank] != common]
        return f"rank {', '.join(map(str, odd))} from the other {count}"
    return f"ranks {', '.join(map(str, ranks))}, and no majority tells which is right"


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
