"""A real Slurm with two nodes runs slurm/pretrain.sh: time limits, cancellation, a lost node."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from fusiontree.parallel.config import ParallelConfig
from tests.end_to_end.runs import events, write_config
from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import (
    LONG,
    assert_same_run,
    hurry,
    needs_slurm,
    read,
    submit,
    wait_for_end,
    wait_for_steps,
    warn,
)

pytestmark = needs_slurm
ENGINES = get_args(ParallelConfig.model_fields["engine"].annotation)


@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine in ("fsdp2", "zero3")])
def test_two_nodes_equal_one_process(
    cluster: SlurmCluster, reference: Path, data: Path, tmp_path: Path, engine: str
) -> None:
    """Four ranks on two nodes; the requeue of this one finds the run finished."""
    config, log = write_config(tmp_path, data), tmp_path / "job.log"
    overrides = (*LONG, f"parallel.engine={engine}")
    job = submit(cluster, log, config, "--nodes=2", "--ntasks-per-node=2", overrides=overrides)
    assert wait_for_end(cluster, job, log) == "COMPLETED", read(log)
    assert "finished the run" in read(log)
    assert_same_run(tmp_path / "run", reference)
    logs = sorted(p.name for p in (tmp_path / "run" / "logs").iterdir())
    assert logs == [f"job-{job}.rank-{rank}.log" for rank in range(4)]
    assert "step 40/40" in (tmp_path / "run" / "logs" / logs[0]).read_text()


def test_the_warning_saves_requeues_and_resumes(
    cluster: SlurmCluster, reference: Path, data: Path, tmp_path: Path
) -> None:
    """The signal that Slurm sends before the time limit, twice; the run ends as if nothing had happened."""
    config, log, run = write_config(tmp_path, data), tmp_path / "job.log", tmp_path / "run"
    job = submit(cluster, log, config, "--nodes=2", "--ntasks-per-node=1")
    for stop in (1, 2):
        wait_for_steps(cluster, run, log, 4 + 10 * (stop - 1), resumes=stop - 1)
        warn(cluster, job, run, stop)
        cluster.wait_for(lambda: cluster.state(job) == "PENDING", "the requeue", 200)
        hurry(cluster, job)
    assert wait_for_end(cluster, job, log) == "COMPLETED", read(log)
    assert events(run).count("resume") == 2
    assert read(log).count("saved; requeueing") == 2
    assert_same_run(run, reference)


def test_the_time_limit_itself_warns(cluster: SlurmCluster, data: Path, tmp_path: Path) -> None:
    """Slurm's own clock sends the signal, up to a minute early; the job is saved and back in the queue in time."""
    config, log, run = write_config(tmp_path, data), tmp_path / "job.log", tmp_path / "run"
    endless = ("training.max_steps=100000", "training.validation.interval=0")
    job = submit(cluster, log, config, "--nodes=1", "--time=4", "--signal=B:USR1@60", overrides=endless)
    try:
        cluster.wait_for(lambda: "saved; requeueing" in read(log), "the requeue", 290)
        assert "time limit near" in read(log)
        assert events(run)[-1] == "interrupted"
        cluster.wait_for(lambda: cluster.state(job) == "PENDING", "the job to be in the queue", 60)
    finally:
        cluster.run("scancel", job)


def test_a_cancelled_run_goes_on_when_queued_again(
    cluster: SlurmCluster, reference: Path, data: Path, tmp_path: Path
) -> None:
    config, log, run = write_config(tmp_path, data), tmp_path / "job.log", tmp_path / "run"
    job = submit(cluster, log, config, "--nodes=1", "--ntasks-per-node=2")
    wait_for_steps(cluster, run, log, 9)
    cluster.run("scancel", job)
    assert wait_for_end(cluster, job, log) == "CANCELLED"
    again = submit(cluster, log, config, "--nodes=1", "--ntasks-per-node=2")
    assert wait_for_end(cluster, again, log) == "COMPLETED", read(log)
    assert_same_run(run, reference)


def test_a_lost_node_costs_a_requeue_on_the_other(
    cluster: SlurmCluster, reference: Path, data: Path, tmp_path: Path
) -> None:
    """The job asks for one or two nodes; it loses one of two and goes on with half of its four ranks."""
    config, log, run = write_config(tmp_path, data), tmp_path / "job.log", tmp_path / "run"
    idle = lambda: cluster.run("sinfo", "-h", "-o", "%T").split() == ["idle"]  # noqa: E731
    cluster.wait_for(idle, "both nodes to be free", 60)
    # A number of tasks would cap the nodes at it; PROCESSES says how many ranks each node has, however many there are.
    job = submit(cluster, log, config, "--nodes=1-2", "--exclusive", PROCESSES="2")
    wait_for_steps(cluster, run, log, 9)
    shown = cluster.run("scontrol", "show", "job", job, "-o")
    assert "NumNodes=2" in shown
    batch_host = shown.split("BatchHost=")[1].split()[0]
    lost = next(name for name in cluster.names if name != batch_host)
    cluster.kill_node(lost)
    try:
        cluster.run("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=lost")
        cluster.wait_for(lambda: cluster.state(job) in ("PENDING", "RUNNING"), "the requeue", 300)
        assert wait_for_end(cluster, job, log) == "COMPLETED", read(log)
        assert "NumNodes=1" in cluster.run("scontrol", "show", "job", job, "-o")
        assert len(list((run / "logs").glob(f"job-{job}.rank-*.log"))) == 4
        assert_same_run(run, reference)
    finally:
        cluster.start_node(lost)
        cluster.run("scontrol", "update", f"NodeName={lost}", "State=RESUME", check=False)
        cluster.wait_for(idle, "both nodes to be back", 60)
