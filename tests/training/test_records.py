from __future__ import annotations

import json
from pathlib import Path

from fusiontree.training.records import Records, read_records


def test_resume_moves_later_lines_aside(tmp_path: Path) -> None:
    records = Records(tmp_path, enabled=True)
    for step in range(1, 6):
        records.metrics({"step": step, "loss": step / 2})
    records.truncate_metrics(3)
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [r["step"] for r in read_records(tmp_path / "metrics.discarded.jsonl")] == [4, 5]


def test_half_a_last_line_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"step": 1}) + '\n{"step": 2, "lo')
    assert read_records(file) == [{"step": 1}]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    records = Records(tmp_path, enabled=False)
    records.metrics({"step": 1})
    records.event("start")
    records.truncate_metrics(0)
    assert not list(tmp_path.iterdir())
