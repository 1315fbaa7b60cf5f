from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusiontree.supervision.watchdog import EXIT_CODE, Watchdog
from fusiontree.tracking.crash_report import collect_reports, explain, write_report
from fusiontree.utils.peers import Peers, answers, host_address


def test_a_long_section_ends_the_process_and_names_itself(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    left: list[int] = []
    with Watchdog(tmp_path, rank=3, leave=left.append, flight_record=lambda: b"record") as watchdog:
        watchdog.step = 7
        with watchdog.section("backward", 0.3):
            time.sleep(1.0)
    assert left == [EXIT_CODE]
    assert "rank 3 hung: 'backward'" in capsys.readouterr().err
    assert "test_watchdog" in (tmp_path / "hangs" / "rank-3.stacks.txt").read_text()
    assert (tmp_path / "hangs" / "rank-3.nccl").read_bytes() == b"record"
    assert [(h["rank"], h["section"], h["step"]) for h in collect_reports(tmp_path)] == [(3, "backward", 7)]
    assert collect_reports(tmp_path) == []


def test_short_sections_and_no_limit_are_left_alone(tmp_path: Path) -> None:
    left: list[int] = []
    with Watchdog(tmp_path, rank=0, leave=left.append) as watchdog:
        with watchdog.section("step", 0.6):
            for _ in range(3):
                with watchdog.section("forward", 0.6):
                    time.sleep(0.3)
        with watchdog.section("save", 0):
            time.sleep(0.8)
    assert not left
    assert not collect_reports(tmp_path)


def test_a_report_that_cannot_be_written_does_not_keep_the_process(tmp_path: Path) -> None:
    (tmp_path / "hangs").write_text("a file where the folder should be")
    code = (
        "import sys, time; from pathlib import Path; from fusiontree.supervision.watchdog import Watchdog\n"
        "with Watchdog(Path(sys.argv[1]), rank=0) as watchdog, watchdog.section('save', 0.3):\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=50)
    assert done.returncode == EXIT_CODE
    assert "could not be written" in done.stderr


def test_an_error_leaves_the_innermost_section_and_its_stack(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        Watchdog(tmp_path, rank=1, world_size=2) as watchdog,
        watchdog.section("step", 0),
        watchdog.section("backward of micro batch 0", 0),
    ):
        raise RuntimeError("device-side assert")
    (report,) = collect_reports(tmp_path)
    assert report["section"] == "backward of micro batch 0"
    assert "device-side assert" in explain([report])
    assert "device-side assert" in (tmp_path / "hangs" / "rank-1.stacks.txt").read_text()


def reports(folder: Path, *ranks: dict) -> str:
    for rank in ranks:
        values = {"kind": "hang", "world_size": 3, "step": 4, "section": "forward", "sections": 20}
        write_report(folder, rank["rank"], values | rank)
    return explain(collect_reports(folder))


PEER = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1024"


@pytest.mark.parametrize(
    ("ranks", "parts"),
    [
        ([{"rank": 0}, {"rank": 2}], ["rank 1 left no report", "rank 0", "waited in 'forward' of step 4"]),
        ([{"rank": 0}, {"rank": 1, "sections": 19, "section": "wait for data"}, {"rank": 2}], ["rank 1", "'wait for"]),
        ([{"rank": 0}, {"rank": 1}, {"rank": 2}], ["all 3 ranks waited in 'forward'"]),
        (
            [
                {"rank": 0, "kind": "crash", "error": PEER},
                {"rank": 2, "kind": "crash", "error": "OutOfMemoryError: tried to allocate"},
            ],
            ["rank 2", "failed in 'forward'", "tried to allocate"],
        ),
        (
            [{"rank": 0, "kind": "crash", "error": PEER}, {"rank": 1, "kind": "crash", "error": PEER}],
            ["rank 2 left no"],
        ),
    ],
)
def test_the_rank_to_look_at_is_named(tmp_path: Path, ranks: list[dict], parts: list[str]) -> None:
    said = reports(tmp_path, *ranks)
    for part in parts:
        assert part in said


def test_no_report_and_a_broken_one(tmp_path: Path) -> None:
    assert explain([]) == "killed or crashed without a report"
    (tmp_path / "hangs").mkdir()
    (tmp_path / "hangs" / "rank-0.json").write_text(json.dumps({"rank": 0})[:-3])
    assert "cannot be read" in explain(collect_reports(tmp_path))


def test_a_host_that_no_longer_answers_is_named(tmp_path: Path) -> None:
    left: list[int] = []
    with Watchdog(tmp_path, rank=0, world_size=2, leave=left.append) as watchdog:
        watchdog.silent_hosts = lambda: ["host-1 10.77.0.2"]
        with watchdog.section("backward", 0.3):
            time.sleep(1.0)
    reports = collect_reports(tmp_path)
    assert "no longer reaches host-1 10.77.0.2: link or host down" in explain(reports)
    # A rank that failed by itself comes first: its host may be silent because it is gone.
    crash = {"rank": 1, "kind": "crash", "section": "save", "error": "OSError: disk full", "unix_time": 0.0}
    assert "disk full" in explain([*reports, crash])


def test_a_host_answers_by_refusing() -> None:
    assert answers("127.0.0.1")
    assert not answers("999.0.0.1")  # no such address
    asked = Peers([host_address(), "other 127.0.0.1", "hidden 999.0.0.1"])
    assert asked.hosts == ["other 127.0.0.1"]  # what was hidden from the start is not missed later
    assert asked.silent() == []
    asked.hosts.append("hidden 999.0.0.1")
    assert asked.silent() == ["hidden 999.0.0.1"]
