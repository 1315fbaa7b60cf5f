"""What became of a run: ``python -m fusiontree.report RUN``. Text on the console, and RUN/report.html with plots."""

from __future__ import annotations

import argparse
import base64
import html
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusiontree.training.goodput import Goodput, account
from fusiontree.training.plots import plot_run
from fusiontree.training.progress import clock, short
from fusiontree.training.records import read_records


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fusiontree.report",
        description="Goodput, interruptions and losses of a run.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--no-html", action="store_true", help="print the text alone; write no RUN/report.html")
    return parser


def text_report(run_dir: Path, goodput: Goodput) -> str:
    """Return the report as lines of text."""
    records = read_records(run_dir / "metrics.jsonl")
    train = [r for r in records if "loss" in r]
    validation = [r for r in records if "validation_loss" in r]
    last_session = goodput.sessions[-1]
    ended = last_session.end or last_session.cause or "no word since its last event: it runs, or it died"
    lines = [f"run {run_dir}: {ended}"]
    if train:
        last = train[-1]
        speeds = sorted(r["tokens_per_s"] for r in train)
        lines.append(f"step {last['step']}, {short(last['tokens'])} tokens, loss {last['loss']:.4f}")
        lines.append(f"median speed {short(speeds[len(speeds) // 2])} tokens/s")
    if validation:
        lines.append(f"last validation loss {validation[-1]['validation_loss']:.4f} at step {validation[-1]['step']}")
    lines.append(
        f"goodput {goodput.share:.1%}: {clock(goodput.kept_s)} of {clock(goodput.wall_s)} became kept steps; "
        f"{clock(goodput.saving_s)} went into saving"
    )
    ranks = ", ".join(str(s.world_size) for s in goodput.sessions)
    lines.append(f"{len(goodput.sessions)} starts on {ranks} ranks, {len(goodput.interruptions)} interruptions")
    lines += [f"  resumed after step {i.step}, {clock(i.lost_s)} lost: {i.cause}" for i in goodput.interruptions]
    counts: dict[str, int] = {}
    for fault in goodput.faults:
        counts[fault["event"]] = counts.get(fault["event"], 0) + 1
    lines += [f"{count} x {kind}" for kind, count in sorted(counts.items())]
    lines += [
        f"  {f['time']} {f['event']}{_step(f)}: {f.get('reason', f.get('folder', ''))}" for f in goodput.faults[-10:]
    ]
    return "\n".join(lines)


def _step(event: dict[str, Any]) -> str:
    return f" at step {event['step']}" if "step" in event else ""


def write_html(run_dir: Path, text: str) -> Path:
    """Write the report with its plots into one file that needs nothing else; return its path."""
    picture = ""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "plot.png"
        try:
            plot_run(run_dir, image)
        except ValueError:
            pass  # nothing logged yet: the text says so
        else:
            data = base64.b64encode(image.read_bytes()).decode()
            picture = f'<img alt="loss and gates" style="max-width:100%" src="data:image/png;base64,{data}">'
    title = html.escape(f"Run {run_dir.resolve().name}")
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f'<body style="font-family:sans-serif;max-width:70rem;margin:2rem auto"><h1>{title}</h1>'
        f"<pre>{html.escape(text)}</pre>{picture}</body></html>\n"
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and write its page; exit code 2 when there is no run."""
    args = build_parser().parse_args(argv)
    try:
        text = text_report(args.run, account(args.run))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    if not args.no_html:
        print(f"\n{write_html(args.run, text)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
