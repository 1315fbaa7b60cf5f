from __future__ import annotations

import time
from pathlib import Path

from fusiontree.training.watchdog import EXIT_CODE, Watchdog, collect_hangs


def test_a_long_section_ends_the_process_and_names_itself(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    left: list[int] = []
    with Watchdog(tmp_path, rank=3, leave=left.append) as watchdog, watchdog.section("backward", 0.3):
        time.sleep(1.0)
    assert left == [EXIT_CODE]
    assert "rank 3 hung: 'backward'" in capsys.readouterr().err
    assert "test_watchdog" in (tmp_path / "hangs" / "rank-3.stacks.txt").read_text()
    assert [(h["rank"], h["section"]) for h in collect_hangs(tmp_path)] == [(3, "backward")]
    assert collect_hangs(tmp_path) == []


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
    assert not collect_hangs(tmp_path)
