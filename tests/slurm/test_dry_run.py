"""``--dry-run`` of slurm/pretrain.sh and slurm/evaluate.sh: the checks and the commands, and nothing queued."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.runs import ROOT, environment


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A python that notes its arguments and refuses the configuration bad.yaml, and an sbatch that notes its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    python = 'echo "$@" >> "$NOTES/python"; case "$*" in *bad.yaml*) echo "error: bad" >&2; exit 2 ;; esac'
    for name, text in (("python", python), ("sbatch", 'echo "$@" >> "$NOTES/sbatch"; echo 7')):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def script(programs: Path, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = environment() | {"FUSIONTREE_PYTHON": str(programs / "python"), "NOTES": str(programs.parent)} | variables
    env["PATH"] = f"{programs}:{env['PATH']}"
    return subprocess.run(
        [str(ROOT / "slurm" / name), *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )


def test_a_dry_run_checks_and_shows_what_would_be_queued(programs: Path) -> None:
    options = ["--dry-run", "--chain=2", "--nodes=1-2", "--gpus-per-node=h100:8", "--comment=two words"]
    done = script(programs, "pretrain.sh", *options, "my.yaml", "run_dir=runs/a b", LAUNCHER="torchrun")
    assert done.returncode == 0, done.stderr
    assert not (programs.parent / "sbatch").exists()
    checks = [line for line in (programs.parent / "python").read_text().splitlines() if "--check" in line]
    assert [line.split("--world-size ")[1].split()[0] for line in checks] == ["8", "16"]
    plan, first, second = done.stdout.splitlines()
    assert plan == "each job starts 8 or 16 ranks by LAUNCHER=torchrun"
    wanted = "would queue: sbatch --parsable --nodes=1-2 --gpus-per-node=h100:8 --comment=two\\ words"
    assert first.strip() == f"{wanted} {ROOT}/slurm/pretrain.sh my.yaml run_dir=runs/a\\ b"
    assert "--dependency=afternotok:JOB1 --kill-on-invalid-dep=yes" in second
    done = script(programs, "pretrain.sh", *options[1:], "my.yaml", "run_dir=runs/a b")
    assert done.stdout.splitlines() == ["queued job 7"] * 2
    assert len((programs.parent / "sbatch").read_text().splitlines()) == 2


def test_a_dry_run_of_what_is_wrong_ends_with_code_2(programs: Path) -> None:
    done = script(programs, "pretrain.sh", "--dry-run", "--gpus=3", "--nodes=2", "my.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "3 GPUs do not divide evenly among 2 nodes" in done.stderr
    done = script(programs, "pretrain.sh", "--dry-run", "bad.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "would queue" not in done.stdout


def test_an_evaluation_has_a_dry_run_too(programs: Path) -> None:
    done = script(programs, "evaluate.sh", "--gpus-per-node=1", "--dry-run", "--checkpoint=runs/a", "--tasks", "text")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("would queue: sbatch --parsable --gpus-per-node=1 ")
    assert line.strip().endswith("slurm/evaluate.sh --checkpoint=runs/a --tasks text")
    assert not (programs.parent / "sbatch").exists()
