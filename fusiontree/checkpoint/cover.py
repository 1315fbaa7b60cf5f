"""Checks that a tensor's rectangles are apart: if they overlap, they can have its volume and yet leave holes."""

from __future__ import annotations

from collections.abc import Sequence

Place = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and shape of a rectangle."""


def first_overlap(places: Sequence[Place]) -> tuple[int, int] | None:
    """Return the indices of two rectangles that overlap, or None.

    Sorts along the axis with the most different offsets and compares neighbours only, so a grid of n rectangles costs
    about n^1.5 comparisons and a row of them n.
    """
    if len(places) < 2:
        return None
    axes = range(len(places[0][0]))
    if not axes:
        return 0, 1
    axis = max(axes, key=lambda a: len({offset[a] for offset, _ in places}))
    reached: list[int] = []
    for index in sorted(range(len(places)), key=lambda i: places[i][0][axis]):
        begin = places[index][0][axis]
        reached = [other for other in reached if places[other][0][axis] + places[other][1][axis] > begin]
        for other in reached:
            if _overlap(places[index], places[other]):
                return other, index
        reached.append(index)
    return None


def _overlap(left: Place, right: Place) -> bool:
    sides = zip(*left, *right, strict=True)
    return all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in sides)
