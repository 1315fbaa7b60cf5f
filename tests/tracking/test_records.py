from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusiontree.tracking.records import Records, read_records


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


def test_a_line_that_a_crash_cut_off_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "start"}\n{"event": "sa')
    records = Records(tmp_path, enabled=True)
    records.event("resume")
    records.event("finished")
    assert [e["event"] for e in read_records(tmp_path / "events.jsonl")] == ["start", "resume", "finished"]


def test_what_a_full_disk_refused_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = Records(tmp_path, enabled=True)
    records.metrics({"step": 1})
    real = Path.open

    class Full:
        """Writes half of what it is given."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: bytes) -> int:
            self.file.write(data[: len(data) // 2])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda path, *args, **options: Full(real(path, *args, **options)))
    records.metrics({"step": 2})
    records.metrics({"step": 3})
    monkeypatch.setattr(Path, "open", real)
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [1]
    records.metrics({"step": 4})
    records.close()
    assert [r["step"] for r in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
