"""Ranks the parts of a trained model by the loss that the removal of each costs alone.

fusiontree checkpoint analyze RUN
fusiontree checkpoint analyze RUN --data DIR --rows 64 --plot parts.png --output parts.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusiontree.cli.program import add_device_options, check_output_folders, run_program
from fusiontree.data.format import ShardDamage
from fusiontree.tracking.json_lines import finite
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import write_output

if TYPE_CHECKING:
    from fusiontree.models.config import ModelConfig
    from fusiontree.pruning.analysis import Analysis


_COLUMNS = (("layer", ""), ("branch", "mamba2"), ("branch", "attention"))
"""Parts in the table of layers."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Measure what each layer, branch, head, group of state space heads and part of an MLP is worth: "
        "the model computes held-out rows without each of them.",
        allow_abbrev=False,
    )
    parser.add_argument("path", type=Path, metavar="RUN", help="run folder (its newest checkpoint) or checkpoint")
    add_measurement_options(parser)
    parser.add_argument("--top", type=int, default=20, metavar="N", help="parts in the table (default 20; 0: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON object to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw gates and losses as PNG")
    return parser


def add_measurement_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a measurement on held-out rows."""
    add = parser.add_argument
    add("--data", metavar="DIR", help="held-out dataset (default: the run's data.validation)")
    add("--rows", type=int, default=16, metavar="N", help="rows to measure on (default 16)")
    add("--batch-size", type=int, default=4, metavar="N", help="rows per forward pass (default 4)")
    add("--seq-len", type=int, metavar="N", help="tokens of a row (default: the run's training.seq_len)")
    add_device_options(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0 done, 2 user error or damaged checkpoint."""
    return run_program(build_parser, command, argv, errors=(UserError, ShardDamage))


def command(args: argparse.Namespace) -> int:
    """Measure and print; return the exit code of :func:`main`.

    Raises:
        UserError: the checkpoint, the dataset or an option is wrong.
    """
    from fusiontree.checkpoint.load import find_checkpoint

    check_output_folders(args, "output", "plot")
    folder = find_checkpoint(args.path)
    analysis, config = measured(args, folder)
    values = finite({"checkpoint": str(folder), "rows": args.rows, **analysis.values()})
    if args.json:
        print(json.dumps(values))
    else:
        print(tables(analysis, config, args.top))
    if args.output:
        write_output(args.output, json.dumps(values, indent=1) + "\n")
    if args.plot:
        from fusiontree.pruning.pictures import plot_analysis

        plot_analysis(analysis, args.plot)
        print(f"picture: {args.plot}", file=sys.stderr)
    return 0


def measured(args: argparse.Namespace, folder: Path) -> tuple[Analysis, ModelConfig]:
    """Return the analysis of a checkpoint by the options of :func:`add_measurement_options`."""
    from fusiontree.pruning.run import analyze_checkpoint
    from fusiontree.utils.device import choose_device, choose_dtype

    for option in ("rows", "batch_size"):
        if getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} is {getattr(args, option)}; it must be at least 1")
    device = choose_device(args.device)
    return analyze_checkpoint(
        folder,
        device=device,
        dtype=choose_dtype(args.dtype, device),
        data=args.data,
        rows=args.rows,
        batch_size=args.batch_size,
        seq_len=args.seq_len,
        report=progress(),
    )


def progress(every_s: float = 10.0) -> Callable[[int, int], None]:
    """Return a function that prints how many parts are measured, every few seconds, to standard error."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= every_s:
            last = time.monotonic()
            print(f"measured {done} of {total} parts", file=sys.stderr, flush=True)

    return report


def tables(analysis: Analysis, config: ModelConfig, top: int) -> str:
    """Return the table of layers and the table of the cheapest removals."""
    lines = [f"loss {analysis.loss:.4f} nats per token; below, what it grows by without a part", ""]
    lines.append(f"{'layer':>5} {'letter':>6} {'gate':>6} {'without layer':>14} {'mamba2':>9} {'attention':>10}")
    by_place = {(part.layer, part.kind, part.mixer): part.loss for part in analysis.parts}
    for layer, statistics in enumerate(analysis.statistics):
        cells = [by_place.get((layer, *place)) for place in _COLUMNS]
        shown = ["" if cell is None else f"{cell:+.4f}" for cell in cells]
        lines.append(
            f"{layer:>5} {config.pattern[layer]:>6} {statistics.gate:6.3f} {shown[0]:>14} {shown[1]:>9} {shown[2]:>10}"
        )
    ranked = analysis.ranked()
    ranked = ranked[:top] if top else ranked
    lines += [
        "",
        f"{'loss':>9} {'layer':>5}  part ({len(ranked)} of {len(analysis.parts)}, cheapest removal first)",
    ]
    lines += [f"{part.loss:+9.4f} {part.layer:>5}  {part.name}" for part in ranked]
    return "\n".join(lines)
