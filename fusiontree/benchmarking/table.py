"""Prints the benchmark's figures as a table, with a histogram of the timed documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_OPERATION_COLUMNS = ("forward_ms", "least_forward_ms", "backward_ms", "least_backward_ms")


def length_histogram(lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Count documents by the power of two at or below their length.

    Args:
        lengths: tokens of each document, as the rows cut them; at least one.

    Returns:
        For each power of two that occurs, ascending: ``at_least`` and ``below`` (tokens), how many ``documents``, and
        their ``token_share``, the part of all tokens that lies in them.
    """
    found: dict[int, list[int]] = {}
    for length in lengths:
        found.setdefault(length.bit_length() - 1, []).append(length)
    total = sum(lengths)
    return [
        {
            "at_least": 1 << power,
            "below": 2 << power,
            "documents": len(found[power]),
            "token_share": sum(found[power]) / total,
        }
        for power in sorted(found)
    ]


def spread(values: Sequence[int]) -> dict[str, int]:
    """Return the least, some quantiles and the greatest of ``values``."""
    ordered = sorted(values)
    shares = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
    return {name: ordered[round(share * (len(ordered) - 1))] for name, share in shares.items()}


def print_table(result: dict[str, Any]) -> None:
    """Print the figures of our own training."""
    print(f"\n{result['device']}, {result['world_size']} x, torch {result['torch']}, {result['engine']}")
    each = "per process" if result["device"] == "cpu" else "per GPU"
    packed = f"{result['documents_per_row']:.1f} documents" if result["documents_per_row"] > 1 else "one document"
    of_bf16 = " of the bf16 peak" if result["matmul_precision"] == "fp8" else ""
    rows = [
        ("parameters", _with_unit(result["parameters"])),
        ("row", f"{result['seq_len']:,} tokens, {packed}"),
        ("data", ", ".join(result["data"])),
        ("step", f"{result['step_time_s'] * 1e3:,.1f} ms"),
        ("throughput", f"{result['tokens_per_s_per_gpu']:,.0f} tokens/s {each}"),
        ("useful work", f"{_with_unit(result['model_tflops_per_gpu'] * 1e12)}FLOP/s {each}"),
        ("products", result["matmul_precision"]),
        ("MFU", "peak of this device not known" if result["mfu"] is None else f"{result['mfu']:.1%}{of_bf16}"),
    ]
    if result.get("teacher"):
        rows.append(("teacher", f"{result['teacher']}; useful work and MFU count the trained model alone"))
    if "peak_memory_gib" in result:
        rows.append(("memory", f"{result['peak_memory_gib']:.1f} GiB peak"))
    for name, value in rows:
        print(f"  {name:<14}{value}")
    _print_documents(result)
    for name, spent in result.get("breakdown_ms", {}).items():
        print(f"    {name:<32}{spent:>10.2f} ms")
    for name, size in result.get("memory_gib", {}).items():
        print(f"    {name:<52}{size:>8.2f} GiB")


def print_operations(operations: Sequence[dict[str, Any]]) -> None:
    """Print the times of operations alone, one line each."""
    print(f"    {'one row, milliseconds':<36}{'forward':>9}{'least':>9}{'backward':>9}{'least':>9}")
    for row in operations:
        times = "".join(f"{'-' if row[k] is None else f'{row[k]:.2f}':>9}" for k in _OPERATION_COLUMNS)
        print(f"    {row['operation']:<24}{row['backend']:<12}{times}")


def print_others(others: dict[str, dict[str, Any]]) -> None:
    """Print the figures of decoding and of peers, one line each."""
    for name, figures in others.items():
        values = (f"{k} {v:,.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())
        print(f"  {name}: {', '.join(values)}")


def _print_documents(result: dict[str, Any]) -> None:
    if result["documents_per_row"] == 1:
        return
    print(f"    {'tokens, as rows cut them':<28}{'documents':>12}{'of all tokens':>16}")
    for group in result["document_histogram"]:
        first, last = group["at_least"], min(group["below"] - 1, result["seq_len"])
        reach = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        print(f"    {reach:<28}{group['documents']:>12,}{group['token_share']:>16.1%}")


def _with_unit(value: float) -> str:
    """Write a number in thousands, millions, …: ``1.57 G``."""
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.1f} T"
