"""The report as one self-contained page: report_page.html with the run's data in it."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import yaml

from fusiontree.tracking.console import clock
from fusiontree.tracking.curves import COLORS, read_curves
from fusiontree.tracking.goodput import Goodput

_TEMPLATE = Path(__file__).with_name("report_page.html")
_POINTS = 800
"""Logged steps per curve."""


def write_page(run_dir: Path, summary: Sequence[tuple[str, str]], goodput: Goodput) -> Path:
    """Write RUN/report.html, which needs no other file and no network; return its path.

    Args:
        run_dir: the run folder.
        summary: named lines on the run.
        goodput: its account.
    """
    title = run_dir.resolve().name
    interruptions = [(str(i.step), clock(i.lost_s), i.cause) for i in goodput.interruptions]
    faults = [
        (f.get("time", ""), f["event"], str(f.get("step", "")), f.get("reason", f.get("folder", "")))
        for f in goodput.faults
    ]
    curves = _curves(run_dir)
    data = {
        "curves": curves,
        "colors": COLORS,
        "wall_s": goodput.wall_s,
        "shares": goodput.shares(),
        "sessions": [
            {"from": s.began, "to": s.last_sign, "step": s.first_step, "ranks": s.world_size} for s in goodput.sessions
        ],
        "interruptions": [
            {"from": max(0.0, i.at_s - i.lost_s), "to": i.at_s, "step": i.step, "cause": i.cause}
            for i in goodput.interruptions
        ],
    }
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        summary="".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in summary),
        tasks="".join(
            f'<section class="half" data-curves><h2>{html.escape(task["task"])} '
            f'<small>{html.escape(task["measure"])}</small></h2><div id="task{number}" class="chart"></div></section>'
            for number, task in enumerate(curves["tasks"] if curves else ())
        ),
        interruptions=_table("Interruptions", ["resumed after step", "time lost", "cause"], interruptions),
        faults=_table("Faults", ["time", "event", "step", "reason"], faults),
        config=_config(run_dir / "config.yaml"),
        data=json.dumps(data).replace("</", "<\\/"),
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _curves(run_dir: Path) -> dict[str, Any] | None:
    try:
        return read_curves(run_dir).thinned(_POINTS)
    except ValueError:
        return None  # no step was logged: the page has no charts


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a titled table; an empty text without rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<section><h2>{title}</h2><div class="scroll"><table><tr>{head}</tr>{body}</table></div></section>'


def _config(path: Path) -> str:
    """Return the configuration: one collapsible table per section."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError):
        values = None
    if not isinstance(values, dict):
        return "<section><h2>Configuration</h2><p>config.yaml is damaged.</p></section>"
    sections: dict[str, dict[str, Any]] = {"run": {}}
    for name, value in values.items():
        if isinstance(value, dict):
            sections[name] = value
        else:
            sections["run"][name] = value
    parts = []
    for name, section in sections.items():
        rows = "".join(
            f"<tr><td>{html.escape(key)}</td><td>{html.escape(text)}</td></tr>" for key, text in _settings(section)
        )
        if rows:
            parts.append(f"<details><summary>{html.escape(name)}</summary><table>{rows}</table></details>")
    return f"<section><h2>Configuration</h2>{''.join(parts)}</section>" if parts else ""


def _settings(section: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return each setting's dotted name within its section, and its value as YAML."""
    found: list[tuple[str, str]] = []
    for key, value in section.items():
        if isinstance(value, dict) and value:
            found += _settings(value, f"{prefix}{key}.")
        else:
            text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
            found.append((f"{prefix}{key}", text))
    return found
