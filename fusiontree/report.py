"""Goodput, interruptions and losses of a run: ``fusiontree report RUN`` prints text and writes RUN/report.html."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fusiontree.cli.program import run_program
from fusiontree.tracking.console import clock, short
from fusiontree.tracking.curves import task_curves
from fusiontree.tracking.goodput import Goodput, account
from fusiontree.tracking.records import read_records
from fusiontree.tracking.report_page import write_page

_SHOWN = 10
"""Faults listed in the text; the page lists all."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fusiontree.report",
        description="Goodput, interruptions and losses of a run.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--no-html", action="store_true", help="print the text alone; write no RUN/report.html")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def summary(run_dir: Path, goodput: Goodput) -> list[tuple[str, str]]:
    """Return the run in a few named lines."""
    records = read_records(run_dir / "metrics.jsonl")
    train = [r for r in records if "loss" in r]
    validation = [r for r in records if "validation_loss" in r]
    last_session = goodput.sessions[-1] if goodput.sessions else None
    ended = last_session and (last_session.end or last_session.cause)
    lines = [("state", ended or "no end recorded: it is running, or it was killed")]
    if train:
        last = train[-1]
        speeds = sorted(r["tokens_per_s"] for r in train if r.get("tokens_per_s"))
        lines.append(("reached", f"step {last['step']}, loss {_loss(last['loss'])}"))
        lines.append(("training tokens", f"{last.get('tokens', 0):,} seen"))
        if speeds:
            lines.append(("median speed", f"{short(speeds[len(speeds) // 2])} tokens/s"))
    if validation:
        last = validation[-1]
        lines.append(("last validation", f"loss {_loss(last['validation_loss'])} at step {last['step']}"))
        if sizes := _validation_tokens(last):
            lines.append(("validation tokens", sizes))
    if tasks := task_curves(records):
        step, values = tasks[0].steps[-1], ", ".join(f"{t.task} {t.measure} {t.values['mean'][-1]:.4g}" for t in tasks)
        cost = [r["evaluation_share"] for r in records if isinstance(r.get("evaluation_share"), float)]
        lines.append(("last evaluation", f"{values} at step {step}"))
        if cost:
            lines.append(("evaluation cost", f"{statistics.median(cost):.2%} of the step time"))
    lines.append(
        ("goodput", f"{goodput.share:.1%}: {clock(goodput.kept_s)} of {clock(goodput.busy_s)} became kept steps")
    )
    lines += [(name, clock(seconds)) for name, seconds, _ in goodput.shares()[1:]]
    ranks = ", ".join(str(s.world_size) for s in goodput.sessions)
    count = len(goodput.interruptions)
    lines.append(("starts", f"{len(goodput.sessions)} starts on {ranks} ranks, {count} interruptions"))
    return lines


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _validation_tokens(record: dict[str, Any]) -> str:
    """Return the tokens of each validation set; empty for a run of a version that did not record them."""
    prefix = "validation_tokens/"
    named = [f"{key.removeprefix(prefix)} {n:,}" for key, n in record.items() if key.startswith(prefix)]
    unnamed = [f"{record['validation_tokens']:,}"] if "validation_tokens" in record else []
    return ", ".join(named or unnamed)


def text_report(run_dir: Path, goodput: Goodput) -> str:
    """Return the report as lines of text."""
    named = summary(run_dir, goodput)
    width = max(len(name) for name, _ in named)
    lines = [f"run {run_dir}", *(f"  {name:<{width}}  {text}" for name, text in named)]
    lines += [
        f"    went on after step {i.step}, {clock(i.lost_s)} lost: {_in_short(i.cause)}" for i in goodput.interruptions
    ]
    counts = Counter(fault["event"] for fault in goodput.faults)
    lines += [f"  {count} x {kind}" for kind, count in sorted(counts.items())]
    lines += [f"    {f.get('time', '')} {_describe(f)}" for f in goodput.faults[-_SHOWN:]]
    return "\n".join(lines)


def _describe(event: dict[str, Any]) -> str:
    step = f" at step {event['step']}" if "step" in event else ""
    return f"{event['event']}{step}: {_in_short(event.get('reason', event.get('folder', '')))}"


def _in_short(text: str, length: int = 240) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 2] + " …"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and write its page; exit code 2 when there is no run."""
    return run_program(build_parser, report, argv)


def report(args: argparse.Namespace) -> int:
    """Print the report and write its page; return the exit code of :func:`main`."""
    goodput = account(args.run)
    if args.json:
        values = {"run": str(args.run), "summary": dict(summary(args.run, goodput)), "goodput": goodput.share}
        print(json.dumps(values | asdict(goodput)))
    else:
        print(text_report(args.run, goodput))
    if not args.no_html:
        page = write_page(args.run, summary(args.run, goodput), goodput)
        print("" if args.json else f"\n{page}", end="" if args.json else "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
