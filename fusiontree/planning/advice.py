"""What a plan says in words: idle ranks, the recommended layout, and why the configured one is slower."""

from __future__ import annotations

import math
import re
from typing import Any

from fusiontree.utils.errors import UserError

_EQUAL = 1.03
"""Estimates that differ by less than this factor count as equal."""


def parse_tokens(text: str) -> float:
    """Return a number of tokens from a text such as ``300B``, ``1.5T`` or ``2e12``.

    Raises:
        UserError: the text is no positive number.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?(?:[eE]\+?\d+)?)([KMBGT]?)", text.strip().replace("_", ""), re.ASCII)
    value = float(match.group(1)) * 1000.0 ** " KMBT".index((match.group(2) or " ").replace("G", "B")) if match else 0.0
    if not 1 <= value < math.inf:
        raise UserError(f"--tokens '{text}' is no number of tokens; write for example 300B or 1.5T")
    return value


def days(tokens: float, layout: dict[str, Any]) -> float:
    """Return the days that an estimated layout needs for ``tokens``."""
    return float(tokens / layout["tokens_per_s"] / 86400)


def idle_ranks(layout: dict[str, Any], global_batch_size: int) -> int:
    """Return the number of data parallel ranks that get no row of a batch."""
    rows = -(-global_batch_size // layout["dp"])
    return int(layout["dp"] - -(-global_batch_size // rows))


def idle_note(layout: dict[str, Any], global_batch_size: int) -> str | None:
    """Return a sentence if data parallel ranks idle."""
    idle, per_row = idle_ranks(layout, global_batch_size), layout["cp"] * layout["tp"]
    if not idle:
        return None
    what = f"{idle} of {layout['dp']} data parallel ranks ({idle * per_row} GPUs) idle: "
    if layout["dp"] <= global_batch_size:
        return f"{what}training.global_batch_size {global_batch_size} does not divide evenly among them"
    return (
        f"{what}training.global_batch_size is {global_batch_size}; use at most {global_batch_size * per_row} GPUs, a "
        f"batch of {layout['dp']} or more rows, or more tp or cp"
    )


def overrides(layout: dict[str, Any]) -> str:
    """Return the settings of an estimated layout as a command line takes them."""
    return (
        f"parallel.tp={layout['tp']} parallel.cp={layout['cp']} "
        f"training.activation_checkpointing={layout['activation_checkpointing']}"
    )


def recommendation(
    own: dict[str, Any], fitting: list[dict[str, Any]], global_batch_size: int
) -> tuple[dict[str, Any], str]:
    """Return the recommended layout and the line that says so.

    Args:
        own: the configured layout.
        fitting: other layouts that fit, the fastest first.
        global_batch_size: rows of a step.
    """
    if not fitting and not own["fits"]:
        return own, "recommended: none; no layout fits these GPUs: use more of them, or a smaller micro_batch_size"
    best = fitting[0] if fitting else own
    gain = best["tokens_per_s"] / own["tokens_per_s"]
    if own["fits"] and gain < _EQUAL:
        return own, "recommended: the configured layout"
    if not own["fits"]:
        why = f"the configured layout needs {own['total_gib']:.1f} GiB"
    else:
        why = f"{(gain - 1) * 100:.0f}% faster than the configured layout: {_reasons(own, best, global_batch_size)}"
    return best, f"recommended: {overrides(best)} ({why})"


def _reasons(own: dict[str, Any], best: dict[str, Any], global_batch_size: int) -> str:
    """Return why the layout ``own`` is slower than ``best``."""
    reasons = []
    if idle := idle_ranks(own, global_batch_size):
        reasons.append(f"{idle} of its {own['dp']} data parallel ranks idle")
    if own["communication_s"] > _EQUAL * best["communication_s"]:
        reasons.append(
            f"its steps communicate for {own['communication_s']:.2f} s (tp {own['tp']}, cp {own['cp']}) instead of "
            f"{best['communication_s']:.2f} s"
        )
    if own["compute_s"] > _EQUAL * best["compute_s"]:
        recomputes = own["activation_checkpointing"]
        again = f" (recomputing: {recomputes})" if recomputes != best["activation_checkpointing"] else ""
        reasons.append(f"its steps compute for {own['compute_s']:.2f} s{again} instead of {best['compute_s']:.2f} s")
    return ", ".join(reasons) or "small differences add up"
