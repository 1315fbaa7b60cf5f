"""One configuration file, unchanged, on a laptop, a workstation and a cluster; restarts and signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusiontree.utils.environment import process_place
from tests.end_to_end.runs import ROOT, environment, events, metrics, write_config
from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import LONG, assert_same_run, needs_slurm, read, submit, wait_for_end, wait_for_steps, warn


def launch(launcher: str, config: Path, log: Path, *overrides: str, **variables: str) -> subprocess.Popen[bytes]:
    """Start two ranks with launchers/torchrun.sh or launchers/deepspeed.sh."""
    env = environment() | {"FUSIONTREE_PYTHON": sys.executable, "PROCESSES": "2"} | variables
    env["MASTER_PORT"] = str(29700 + os.getpid() % 200)  # deepspeed's is fixed otherwise
    if launcher == "torchrun":
        del env["MASTER_PORT"]
    with log.open("wb") as file:
        return subprocess.Popen(
            [str(ROOT / "launchers" / f"{launcher}.sh"), "--config", str(config), *overrides],
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=file,
        )


def wait(condition, what: str, log: Path, seconds: float = 700) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}: {read(log)[-3000:]}"
        time.sleep(0.2)


def at_step(run: Path, count: int) -> bool:
    return (run / "metrics.jsonl").exists() and len(metrics(run)) >= count


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 1, 0, 1)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}, (5, 8, 1, 4)),  # torchrun
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"}, (5, 8, 1, 4)),  # deepspeed
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "MASTER_ADDR": "x"}
            | {"SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4,3"},
            (5, 7, 1, 3),
        ),
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "MASTER_ADDR": "x"}
            | {"SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
            (5, 8, 1, 4),
        ),
    ],
)
def test_every_launcher_tells_a_process_its_place(
    variables: dict[str, str], expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_PROCID", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place = process_place()
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == expected


def test_a_layout_that_does_not_fit_stops_a_launcher_at_once(data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = launch("torchrun", write_config(tmp_path, data), log, "parallel.shard_size=3")
    assert process.wait(timeout=300) == 2
    assert "must divide the 2 processes" in read(log)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_killed_rank_costs_a_restart_and_a_signal_saves(
    launcher: str, reference: Path, data: Path, tmp_path: Path
) -> None:
    """kill -9 of a rank: all start again by themselves. SIGUSR1 and SIGTERM to the launcher: saved, exit code 75."""
    config, run, log = write_config(tmp_path, data), tmp_path / "run", tmp_path / "log"
    overrides = (*LONG, "checkpoint.save_interval=5", "supervision.hang_timeout_s=30")
    process = launch(launcher, config, log, *overrides)
    wait(lambda: at_step(run, 7), "7 steps", log)
    found = subprocess.run(["pgrep", "-f", "--", f"-u -m fusiontree.train .*{config}"], capture_output=True)
    ranks = [int(pid) for pid in found.stdout.split()]
    assert ranks
    os.kill(max(ranks), signal.SIGKILL)
    wait(lambda: events(run).count("resume") == 1 and at_step(run, 12), "the restart", log)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == 75, read(log)
    assert events(run)[-1] == "interrupted"
    process = launch(launcher, config, log, *overrides)
    before = len(metrics(run))
    wait(lambda: events(run).count("resume") == 2 and at_step(run, before + 2), "steps after it", log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == 75, read(log)
    process = launch(launcher, config, log, *overrides)
    assert process.wait(timeout=700) == 0, read(log)
    assert_same_run(run, reference)


class TestInSlurm:
    pytestmark = needs_slurm

    def test_one_configuration_file_everywhere(
        self, cluster: SlurmCluster, reference: Path, data: Path, tmp_path: Path
    ) -> None:
        """``reference`` was made by ``python -m fusiontree.train`` from the same file but for the folder's name."""
        config, log = write_config(tmp_path, data), tmp_path / "log"
        text = config.read_text()
        process = launch("torchrun", config, log, *LONG)
        assert process.wait(timeout=700) == 0, read(log)
        assert_same_run(tmp_path / "run", reference)
        (tmp_path / "run").rename(tmp_path / "workstation")
        job = submit(cluster, log, config, "--nodes=2", "--ntasks-per-node=1")
        assert wait_for_end(cluster, job, log) == "COMPLETED", read(log)
        assert_same_run(tmp_path / "run", reference)
        assert config.read_text() == text
        worlds = [
            json.loads((tmp_path / name / "events.jsonl").read_text().splitlines()[0])["world_size"]
            for name in ("workstation", "run")
        ]
        assert worlds == [2, 2]

    @pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
    def test_one_launcher_a_node(
        self, launcher: str, cluster: SlurmCluster, reference: Path, data: Path, tmp_path: Path
    ) -> None:
        """srun starts one launcher on each node, which starts two ranks; warned, it saves, requeues and resumes."""
        config, log, run = write_config(tmp_path, data), tmp_path / "log", tmp_path / "run"
        job = submit(cluster, log, config, "--nodes=2", "--exclusive", LAUNCHER=launcher, PROCESSES="2")
        wait_for_steps(cluster, run, log, 5)
        warn(cluster, job, run, 1)
        cluster.wait_for(lambda: cluster.state(job) == "PENDING", f"the requeue: {read(log)}", 90)
        assert wait_for_end(cluster, job, log) == "COMPLETED", read(log)
        assert "saved; requeueing" in read(log)
        assert events(run).count("resume") == 1
        assert_same_run(run, reference)
