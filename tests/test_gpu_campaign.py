"""The campaign of GPU measurements, here with commands that need none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.gpu.campaign import JOBS, main, read_phases

RESULT = {
    "config": "a.yaml", "overrides": ["x=1"], "tokens_per_s_per_gpu": 1234.5, "mfu": 0.5, "step_time_s": 0.1,
    "matmul_precision": "bf16", "documents_per_row": 1.0,
}  # fmt: skip


def phases(tmp_path: Path, *jobs: list[dict[str, object]]) -> list[str]:
    file = tmp_path / "jobs.yaml"
    file.write_text(json.dumps(jobs))
    return [str(tmp_path / "out"), "--jobs", str(file), "--gpus", "2"]


def test_jobs_share_the_gpus_and_phases_follow_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = "echo $NAME $CUDA_VISIBLE_DEVICES $MASTER_PORT >> $OUT/order; sleep 0.6"
    first = [{"name": "one", "command": f"NAME=one; {note}"}, {"name": "two", "command": f"NAME=two; {note}"}]
    last = [{"name": "both", "gpus": 2, "command": f"NAME=both; {note}; echo '{json.dumps(RESULT)}'"}]
    assert main(phases(tmp_path, first, last)) == 0
    lines = [line.split() for line in (tmp_path / "out" / "order").read_text().splitlines()]
    assert sorted(lines[:2])[0][0] == "one" and lines[2][:2] == ["both", "0,1"]
    assert {line[1] for line in lines[:2]} == {"0", "1"} and len({line[2] for line in lines}) == 3
    assert "1,234 tokens/s/GPU, MFU 50.0%" in capsys.readouterr().out


def test_a_job_behind_its_limit_is_killed_with_its_children(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = {"name": "slow", "limit": 0.5, "command": "timeout 60 bash -c 'sleep 2; touch $OUT/alive'"}
    large = {"name": "large", "gpus": 3, "command": "true"}
    assert main(phases(tmp_path, [slow, large, {"name": "wrong", "command": "false"}])) == 1
    out = capsys.readouterr().out
    assert "slow: killed after" in out and "large: left out, it needs 3 of 2 GPUs" in out
    assert "wrong: exit code 1" in out and "not finished: " in out
    assert main([*phases(tmp_path, [{"name": "later", "command": "sleep 2.2"}]), "--limit", "3"]) == 0
    assert not (tmp_path / "out" / "alive").exists()


def test_the_jobs_are_readable_and_a_wrong_name_is_refused() -> None:
    names = [job.name for phase in read_phases(JOBS, []) for job in phase]
    assert len(set(names)) == len(names) and [job.gpus for job in read_phases(JOBS, ["7b"])[1]] == [4]
    with pytest.raises(SystemExit, match="no such job: 8b"):
        read_phases(JOBS, ["8b"])
