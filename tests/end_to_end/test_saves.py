"""Training with failing saves, in a run folder that is locked, and from the checkpoint of another model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.end_to_end.runs import ROOT, environment, events, train, write_config

pytestmark = pytest.mark.xdist_group("training")


def records(run: Path, name: str) -> list[dict]:
    lines = (run / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """RUN/checkpoints on a file system of 22 MB, 17 of which the saver keeps for small files."""
    place = tmp_path / "run" / "checkpoints"
    place.mkdir(parents=True)
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=22m", "none", place]).returncode:
        pytest.skip("a small tmpfs cannot be mounted here (needs root and the right to mount)")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_a_full_disk_costs_checkpoints_and_not_the_run(data: Path, tmp_path: Path, small_disk: Path) -> None:
    """Something fills the disk after the first save; the run goes on, and says at its end that it was not saved."""
    config = write_config(tmp_path, data)
    shutil.copy(config, tmp_path / "run" / "config.yaml")
    short = ("training.max_steps=12", "checkpoint.save_interval=3", "training.validation.interval=0")
    values = yaml.safe_load(train(config, *short, "--print-config").stdout)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(values))
    assert train(config, *short, "training.exit_at_step=3").returncode == 0
    (small_disk / "ballast").write_bytes(bytes(5 << 20))
    done = train(config, *short)
    assert done.returncode == 2
    assert "resumed at step 3" in done.stdout
    assert "finished, but the last checkpoint could not be written" in done.stderr
    failed = records(tmp_path / "run", "save_failed")
    assert [event["step"] for event in failed] == [6, 9, 12]
    assert all("free" in event["reason"] and str(small_disk) in event["reason"] for event in failed)
    (small_disk / "ballast").unlink()
    done = train(config, *short)
    assert done.returncode == 0, done.stderr
    assert "resumed at step 3" in done.stdout
    assert (small_disk / "step-00000012").exists()


def test_a_second_launch_is_refused_and_a_killed_one_followed(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    command = [sys.executable, "-m", "fusiontree.train", "--config", str(config)]
    long = ["training.max_steps=100000", "checkpoint.save_interval=2"]
    first = subprocess.Popen(
        [*command, *long], cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        end = time.monotonic() + 120
        while not list((tmp_path / "run" / "checkpoints").glob("step-*")):
            assert time.monotonic() < end and first.poll() is None
            time.sleep(0.1)
        second = train(config)
        assert second.returncode == 2
        assert f"is being written to by process {first.pid}" in second.stderr
        assert first.poll() is None and events(tmp_path / "run").count("start") == 1
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    third = train(config, *long, "training.exit_at_step=1")  # it is past that: resumes and goes one step
    assert third.returncode == 0, third.stderr
    assert events(tmp_path / "run").count("resume") == 1
    assert not (tmp_path / "run" / "lease.json").exists()


def test_a_checkpoint_of_another_model_is_named_by_its_fields(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    short = ("training.max_steps=2", "training.warmup_steps=0", "training.validation.interval=0")
    assert train(config, *short).returncode == 0
    other = write_config(tmp_path, data, "other")
    shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "other" / "checkpoints")
    values = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    values["model"]["gate_rank"] = 4
    (tmp_path / "other" / "config.yaml").write_text(yaml.safe_dump(values))
    done = train(other, *short, "model.gate_rank=4")
    assert done.returncode == 2
    assert "model.gate_rank: 8 in the checkpoint, 4 now" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "other" / "lease.json").exists()


@pytest.mark.slow
def test_the_best_checkpoints_are_kept(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    keep = [
        "checkpoint.save_interval=2",
        "checkpoint.keep_last=1",
        "checkpoint.keep_best=1",
        "training.validation.interval=2",
    ]
    # A learning rate that spoils the model after the warm-up: the best is not the last.
    done = train(config, *keep, "training.max_steps=8", "training.learning_rate=0.5", "training.warmup_steps=8")
    assert done.returncode == 0, done.stderr
    losses = {}
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "validation_loss" in record:
            losses[record["step"]] = record["validation_loss"]
    kept = {int(folder.name[5:]) for folder in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {8, min(losses, key=lambda step: losses[step])}
