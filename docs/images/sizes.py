"""The table of docs/speed.md over sizes, layouts and row lengths, and its figures in data/sizes.csv.

python -m fusiontree.benchmark --config FILE --one-document --peers llama … | tee OUT
python docs/images/sizes.py OUT …     # adds the results, or replaces those of the same size, row, layout and device
python docs/images/sizes.py           # writes the table again
python docs/images/make.py            # draws sizes.png from the same figures
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FIGURES = HERE / "data" / "sizes.csv"
PAGE = HERE.parent / "speed.md"
BEGIN, END = "<!-- sizes.py writes this table -->\n", "<!-- end of the table -->\n"
ONE_GPU = "one GPU"
COLUMNS = (
    *("parameters", "row", "gpus", "layout", "device"),
    *("step_ms", "tokens_per_s_per_gpu", "mfu", "memory_gib", "idle_ms", "llama_tokens_per_s_per_gpu"),
)
KEYS = COLUMNS[:5]
FORMATS = {"parameters": ".0f", "gpus": ".0f"} | dict.fromkeys(COLUMNS[5:], ".6g")

Row = dict[str, Any]


def read() -> list[Row]:
    """Return the figures: numbers, None where one was not measured."""
    with FIGURES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    words = ("row", "layout", "device")
    return [{k: v if k in words else (float(v) if v else None) for k, v in row.items()} for row in rows]


def write(rows: Sequence[Row]) -> None:
    """Write the figures, sorted by size, row length, GPUs and layout."""

    def order(row: Row) -> tuple[Any, ...]:
        count, _, length = row["row"].replace(",", "").rpartition(" × ")
        return row["parameters"], int(length.split()[0]), -int(count or 1), row["gpus"], row["layout"], row["device"]

    with FIGURES.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in sorted(rows, key=order):
            writer.writerow("" if row[k] is None else f"{row[k]:{FORMATS.get(k, '')}}" for k in COLUMNS)


def row_of(result: Row) -> Row:
    """Return the figures of a result of the benchmark, the JSON object in its last line."""
    sizes, gpus = result["layout"], result["world_size"]
    split = " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    rows, length = result["rows_per_pass"], result["seq_len"]
    packed = "" if result["documents_per_row"] == 1 else f" in {result['documents_per_row']:.0f} documents"
    return {
        "parameters": result["parameters"],
        "row": f"{rows} × {length:,}{packed}" if rows > 1 else f"{length:,}{packed}",
        "gpus": gpus,
        "layout": f"{result['engine']}, {split}" if gpus > 1 else ONE_GPU,
        "device": result["device"].removeprefix("NVIDIA "),
        "step_ms": result["step_time_s"] * 1e3,
        "tokens_per_s_per_gpu": result["tokens_per_s_per_gpu"],
        "mfu": result["mfu"],
        "memory_gib": result.get("peak_memory_gib"),
        "idle_ms": result.get("breakdown_ms", {}).get("idle"),
        "llama_tokens_per_s_per_gpu": result.get("others", {}).get("llama", {}).get("tokens_per_s_per_gpu"),
    }


def merged(rows: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Return ``rows`` with ``new``, which replace those of equal size, row, GPUs, layout and device."""
    found = {tuple(row[key] for key in KEYS): row for row in (*rows, *new)}
    return list(found.values())


def one_gpu_of(row: Row, rows: Sequence[Row]) -> Row | None:
    """Return the figures of the same model and row on one GPU of the same kind; None if they were not measured."""
    same = ("parameters", "row", "device")
    return next((r for r in rows if r["layout"] == ONE_GPU and all(r[k] == row[k] for k in same)), None)


def size_name(parameters: float) -> str:
    """Return such as ``165M`` or ``1.57B``."""
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e9 else f"{parameters / 1e6:.0f}M"


def table(rows: Sequence[Row]) -> str:
    """Return the table in Markdown."""
    heads = [
        *("parameters", "row", "GPUs", "layout", "step", "tokens per second per GPU", "MFU", "idle", "peak memory"),
        *("relative to one GPU", "plain Llama: tokens per second per GPU", "ratio"),
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        speed, one, llama = row["tokens_per_s_per_gpu"], one_gpu_of(row, rows), row["llama_tokens_per_s_per_gpu"]
        idle = None if row["idle_ms"] is None else f"{row['idle_ms']:.0f} ms, {row['idle_ms'] / row['step_ms']:.1%}"
        cells = [
            *(size_name(row["parameters"]), row["row"], f"{row['gpus']:.0f} × {row['device']}", row["layout"]),
            *(f"{row['step_ms']:,.0f} ms", f"{speed:,.0f}"),
            "" if row["mfu"] is None else f"{row['mfu']:.1%}",
            idle or "",
            "" if row["memory_gib"] is None else f"{row['memory_gib']:.1f} GiB",
            "" if one is None or one is row else f"{speed / one['tokens_per_s_per_gpu']:.1%}",
            *(("", "") if llama is None else (f"{llama:,.0f}", f"{speed / llama:.2f}")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(page: str, rows: Sequence[Row]) -> str:
    """Return the text of docs/speed.md with the table of ``rows``."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table(rows)}{END}{after}"


def main(files: Sequence[str]) -> None:
    """Add the results in ``files``, outputs of the benchmark, and write the table."""
    new = [row_of(json.loads(Path(file).read_text(encoding="utf-8").splitlines()[-1])) for file in files]
    write(merged(read(), new))
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
