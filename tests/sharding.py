"""Splits the slow suite into shards, one of which CI runs for each landing."""

from __future__ import annotations

import zlib

SHARDS = 4


def shard_of(test_id: str, shards: int = SHARDS) -> int:
    """Return the shard of a test: a hash of its id, the same on every machine and in every order of collection."""
    return zlib.crc32(test_id.encode()) % shards


def parse_shard(text: str) -> tuple[int, int]:
    """Read ``K/N``, shard K of N, counted from 0.

    Raises:
        ValueError: it is none.
    """
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"'{text}' is no shard; write K/N with K from 0 to N-1, for example 0/{SHARDS}")
    return int(index), int(count)
