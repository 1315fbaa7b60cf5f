"""Statistics of a dataset: counted per shard, then merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_COUNTED_AT_ONCE = 1 << 18
"""Tokens to collect before counting: a count costs time proportional to the table size, too much per document."""


class ShardStatistics:
    """Counts documents and tokens of one shard; for byte tokens also pairs of neighbouring bytes."""

    def __init__(self, vocab_size: int, count_pairs: bool) -> None:
        self._size = vocab_size
        self._lengths: list[int] = []
        self._text_bytes = self._text_tokens = 0
        self.unknown = 0
        """Tokens or characters of text that the tokenizer lacks."""
        self._pairs = np.zeros(vocab_size**2, np.int64) if count_pairs else None
        self._codes: list[np.ndarray] = []
        self._waiting = 0

    def add(self, tokens: np.ndarray, text_bytes: int, unknown: int = 0) -> None:
        """Count a document; ``text_bytes`` is 0 if the document was given as tokens."""
        self.unknown += unknown
        self._lengths.append(len(tokens))
        self._text_bytes += text_bytes
        self._text_tokens += len(tokens) if text_bytes else 0
        if self._pairs is not None:
            for begin in range(0, len(tokens) - 1, _COUNTED_AT_ONCE):  # a pair takes eight bytes
                part = tokens[begin : begin + _COUNTED_AT_ONCE + 1]
                self._codes.append(part[:-1].astype(np.int64) * self._size + part[1:])
                self._waiting += len(part)
                if self._waiting > _COUNTED_AT_ONCE:
                    self._count_pairs(self._pairs)

    def _count_pairs(self, pairs: np.ndarray) -> None:
        pairs += np.bincount(np.concatenate(self._codes), minlength=len(pairs))
        self._codes, self._waiting = [], 0

    def result(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        lengths = self._lengths
        values: dict[str, Any] = {
            "documents": len(lengths),
            "tokens": sum(lengths),
            "text_bytes": self._text_bytes,
            "text_tokens": self._text_tokens,
            "unknown": self.unknown,
            "longest_document": max(lengths),
            "length_histogram": np.bincount([n.bit_length() for n in lengths], minlength=1).tolist(),
        }
        if self._pairs is not None:
            if self._codes:
                self._count_pairs(self._pairs)
            used = np.flatnonzero(self._pairs)
            values["pairs"] = [used.tolist(), self._pairs[used].tolist()]
        return values


def merge_statistics(shards: Sequence[dict[str, Any]], vocab_size: int) -> dict[str, Any]:
    """Merge the statistics of shards; for byte tokens, add the entropy of a byte given the previous byte."""
    width = max(len(s["length_histogram"]) for s in shards)
    histogram = np.zeros(width, np.int64)
    for shard in shards:
        histogram[: len(shard["length_histogram"])] += shard["length_histogram"]
    merged: dict[str, Any] = {key: sum(s[key] for s in shards) for key in ("documents", "tokens", "text_bytes")}
    if merged["text_bytes"]:  # 0 for a corpus of tokens
        # Of the documents given as text; records of an older, interrupted build lack the number of their tokens.
        merged["bytes_per_token"] = merged["text_bytes"] / sum(s.get("text_tokens", s["tokens"]) for s in shards)
    if unknown := sum(s.get("unknown", 0) for s in shards):
        merged["unknown"] = unknown
    merged["longest_document"] = max(s["longest_document"] for s in shards)
    # Entry i counts documents of 2^(i-1) to 2^i - 1 tokens.
    merged["length_histogram_log2"] = histogram.tolist()
    if all("pairs" in s for s in shards):
        counts = np.zeros(vocab_size * vocab_size, np.int64)
        for shard in shards:
            counts[shard["pairs"][0]] += shard["pairs"][1]
        merged["bigram_entropy_nats"] = bigram_entropy(counts.reshape(vocab_size, vocab_size))
    return merged


def bigram_entropy(counts_VV: np.ndarray) -> float:
    """Return the conditional entropy H(next | token) in nats of pair counts ``[token, next]``."""
    joint = counts_VV / counts_VV.sum()
    marginal = joint.sum(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(joint > 0, joint * np.log(joint / marginal), 0.0)
    return float(-terms.sum())
