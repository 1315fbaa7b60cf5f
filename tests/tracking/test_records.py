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


BROKEN = b'{"step": 1}\n{"broken\n\xff\xfe\x00\n[1]\n{"loss": 2}\n{"step": "x"}\n{"step": 2}\n'


def test_damaged_lines_cost_a_warning_and_are_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(BROKEN)
    assert [r["step"] for r in read_records(file)] == [1, 2]
    assert "5 damaged lines are left out; the first is line 2" in caplog.text
    assert Records(tmp_path, enabled=True).truncate_metrics(1) == 2
    assert file.read_text() == '{"step": 1}\n'
    assert (tmp_path / "metrics.damaged.txt").read_bytes() == b"".join(BROKEN.splitlines(keepends=True)[1:-1])


def test_an_unreadable_record_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).mkdir()
        assert read_records(tmp_path / name) == []
        assert f"{name} cannot be read" in caplog.text
    (tmp_path / "events.jsonl").rmdir()
    deep = b"[" * 100_000 + b"\n"
    (tmp_path / "events.jsonl").write_bytes(b'{"step": 3}\n' + deep + b'{"event": "start"}\n')
    assert read_records(tmp_path / "events.jsonl") == [{"event": "start"}]


def test_nothing_to_move_rewrites_nothing(tmp_path: Path) -> None:
    records = Records(tmp_path, enabled=True)
    records.metrics({"step": 1})
    before = (tmp_path / "metrics.jsonl").stat()
    assert records.truncate_metrics(1) == 1
    after = (tmp_path / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


@pytest.mark.parametrize("end", ["", '{"step": 6, "lo'])
def test_only_the_tail_is_cut_off(tmp_path: Path, end: str) -> None:
    records = Records(tmp_path, enabled=True)
    for step in range(1, 6):
        records.metrics({"step": step, "loss": step / 3, "text": "ä", "none": float("nan")})
    file = tmp_path / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines) + end)
    before = file.stat().st_ino
    assert records.truncate_metrics(2) == 5
    assert file.read_text() == "".join(lines[:2]) and file.stat().st_ino == before
    assert (tmp_path / "metrics.discarded.jsonl").read_text() == "".join(lines[2:])
    assert records.truncate_metrics(0) == 2 and file.read_bytes() == b"" and file.stat().st_ino == before


@pytest.mark.parametrize(
    "text", ['{"step": 3}\n{"step": 1}\n', '{"step": 1}\n{"step":3}\n', '{"step": 1}\n{"step": 3}\n\n']
)
def test_lines_that_are_no_tail_of_ours_are_taken_out_one_by_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    assert Records(tmp_path, enabled=True).truncate_metrics(2) == 3
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert read_records(tmp_path / "metrics.discarded.jsonl") == [{"step": 3}]


def test_lines_are_strict_json_with_the_time(tmp_path: Path) -> None:
    values = {"step": 1, "loss": float("nan"), "gates": {"mean": [0.5, float("inf")]}, "epochs": (-float("inf"), 1)}
    Records(tmp_path, enabled=True).metrics(values)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record.pop("unix_time") > 1e9
    assert record == {"step": 1, "loss": None, "gates": {"mean": [0.5, None]}, "epochs": [None, 1]}
