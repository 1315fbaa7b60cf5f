"""What became of a run: ``python -m fusiontree.report RUN``. Text on the console, and RUN/report.html with plots."""

from __future__ import annotations

import argparse
import base64
import html
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusiontree.cli.program import run_program
from fusiontree.tracking.console import clock, short
from fusiontree.tracking.goodput import Goodput, account
from fusiontree.tracking.plots import plot_goodput, plot_run
from fusiontree.tracking.records import read_records

_SHOWN = 10
"""Faults listed in the text; the page lists all."""

_STYLE = """
body { font-family: system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem } img { max-width: 100% }
td, th { text-align: left; padding: 0.3rem 0.9rem 0.3rem 0; border-bottom: 1px solid #ddd; vertical-align: top }
td { overflow-wrap: anywhere } td.n { white-space: nowrap }
"""


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


def summary(run_dir: Path, goodput: Goodput) -> list[tuple[str, str]]:
    """Return the run in a few named lines."""
    records = read_records(run_dir / "metrics.jsonl")
    train = [r for r in records if "loss" in r]
    validation = [r for r in records if "validation_loss" in r]
    last_session = goodput.sessions[-1] if goodput.sessions else None
    ended = last_session and (last_session.end or last_session.cause)
    lines = [("state", ended or "no word since its last event: it runs, or it died")]
    if train:
        last = train[-1]
        speeds = sorted(r["tokens_per_s"] for r in train)
        lines.append(("reached", f"step {last['step']}, {short(last['tokens'])} tokens, loss {last['loss']:.4f}"))
        lines.append(("median speed", f"{short(speeds[len(speeds) // 2])} tokens/s"))
    if validation:
        last = validation[-1]
        lines.append(("last validation", f"loss {last['validation_loss']:.4f} at step {last['step']}"))
    lines.append(
        ("goodput", f"{goodput.share:.1%}: {clock(goodput.kept_s)} of {clock(goodput.wall_s)} became kept steps")
    )
    lines += [(name, clock(seconds)) for name, seconds, _ in goodput.shares()[1:]]
    ranks = ", ".join(str(s.world_size) for s in goodput.sessions)
    count = len(goodput.interruptions)
    lines.append(("starts", f"{len(goodput.sessions)} starts on {ranks} ranks, {count} interruptions"))
    return lines


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
    lines += [f"    {f['time']} {_describe(f)}" for f in goodput.faults[-_SHOWN:]]
    return "\n".join(lines)


def _describe(event: dict[str, Any]) -> str:
    step = f" at step {event['step']}" if "step" in event else ""
    return f"{event['event']}{step}: {_in_short(event.get('reason', event.get('folder', '')))}"


def _in_short(text: str, length: int = 240) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 2] + " …"


def write_html(run_dir: Path, goodput: Goodput) -> Path:
    """Write the report with its plots into one file that needs nothing else; return its path."""
    title = f"Run {run_dir.resolve().name}"
    parts = [f"<h1>{html.escape(title)}</h1>", _table([], summary(run_dir, goodput))]
    parts.append(_picture("throughput and wall time", lambda image: plot_goodput(run_dir, goodput, image)))
    parts.append(_picture("loss and gates", lambda image: plot_run(run_dir, image)))
    if goodput.interruptions:
        rows = [(str(i.step), clock(i.lost_s), i.cause) for i in goodput.interruptions]
        parts += ["<h2>Interruptions</h2>", _table(["went on after step", "time lost", "cause"], rows)]
    if goodput.faults:
        faults = [
            (f["time"], f["event"], str(f.get("step", "")), f.get("reason", f.get("folder", "")))
            for f in goodput.faults
        ]
        parts += ["<h2>Faults</h2>", _table(["time", "event", "step", "what"], faults)]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _table(header: list[str], rows: Sequence[Sequence[str]]) -> str:
    head = "<tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in header) + "</tr>" if header else ""
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{"n" if place < len(row) - 1 else ""}">{html.escape(cell)}</td>'
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f"<table>{head}{body}</table>"


def _picture(name: str, draw: Callable[[Path], None]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "plot.png"
        try:
            draw(image)
        except ValueError:
            return ""  # nothing logged yet: the text says so
        data = base64.b64encode(image.read_bytes()).decode()
    return f'<p><img alt="{name}" src="data:image/png;base64,{data}"></p>'


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report and write its page; exit code 2 when there is no run."""
    return run_program(build_parser, report, argv)


def report(args: argparse.Namespace) -> int:
    """Print the report and write its page; return the exit code of :func:`main`."""
    goodput = account(args.run)
    print(text_report(args.run, goodput))
    if not args.no_html:
        print(f"\n{write_html(args.run, goodput)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
