"""Rectangles as rows of numpy records: a checkpoint of many ranks has millions of them.

A row's ``offset`` and ``shape`` have as many axes as the tensor with most of them; further axes of the others have
offset 0 and length 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

Tensors = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of every tensor of a checkpoint, in order."""

Place = tuple[int, tuple[int, ...], tuple[int, ...]]
"""A rectangle: number of the tensor, offset in it, shape."""


def place_type(shapes: Iterable[Sequence[int]]) -> np.dtype:
    """Return the record type of rectangles of tensors of these shapes: which tensor, and where in it."""
    shapes = list(shapes)
    axes = max([1, *map(len, shapes)])
    number = "<u4" if all(size < 1 << 31 for shape in shapes for size in shape) else "<i8"
    return np.dtype([("tensor", "<u4"), ("offset", number, (axes,)), ("shape", number, (axes,))])


def row_type(shapes: Iterable[Sequence[int]]) -> np.dtype:
    """Return the record type of saved rectangles: :func:`place_type`, the place in a file, and the SHA-256."""
    return np.dtype(
        [
            *((name, *_plain(field)) for name, field in (place_type(shapes).fields or {}).items()),
            ("file", "<u4"),
            ("start", "<i8"),
            ("length", "<i8"),
            ("digest", "u1", (32,)),
        ]
    )


def _plain(field: tuple) -> tuple:
    kind = field[0]
    return (kind.base, kind.shape) if kind.shape else (kind,)


def rows_of(places: Sequence[Place], kind: np.dtype) -> np.ndarray:
    """Return rectangles as rows of ``kind``; fields besides the place are zero."""
    rows = np.zeros(len(places), kind)
    axes = kind["offset"].shape[0]
    if places:
        rows["tensor"] = [tensor for tensor, _, _ in places]
        rows["offset"] = [(*offset, *(0,) * (axes - len(offset))) for _, offset, _ in places]
        rows["shape"] = [(*shape, *(1,) * (axes - len(shape))) for _, _, shape in places]
    return rows


def volumes(rows: np.ndarray) -> np.ndarray:
    """Return the number of values of each rectangle."""
    return rows["shape"].astype(np.int64).prod(axis=1)


def in_order(rows: np.ndarray) -> np.ndarray:
    """Return the order of rows by tensor, offset and shape."""
    axes = range(rows.dtype["offset"].shape[0] - 1, -1, -1)
    keys = [rows[field][:, axis] for field in ("shape", "offset") for axis in axes]
    return np.lexsort([*keys, rows["tensor"]])
