"""A real Slurm with two nodes runs slurm/pretrain.sh: time limits, cancellation, a lost node."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.runs import ROOT, events, metrics, train, write_config
from tests.slurm.cluster import SlurmCluster, missing_programs

# A gentle rate: over 60 steps a steep one amplifies rounding beyond what the comparison allows.
LONG = ("training.max_steps=60", "training.learning_rate=0.0003")
MISSING = missing_programs()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.xdist_group("slurm"),
    pytest.mark.skipif(bool(MISSING), reason=f"Slurm cannot be started here: no {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of one process, long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("reference")
    done = train(write_config(folder, data), *LONG)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def submit(cluster: SlurmCluster, log: Path, config: Path, *options: str, overrides: tuple[str, ...] = ()) -> str:
    """Queue slurm/pretrain.sh as a user would; return the job id."""
    os.environ["FUSIONTREE_PYTHON"] = sys.executable
    shown = cluster.run(
        *("sbatch", "--parsable", f"--output={log}", f"--chdir={ROOT}", *options),
        *("slurm/pretrain.sh", str(config), *LONG, *overrides),
    )
    return shown.strip().split(";")[0]


def finished(cluster: SlurmCluster, job: str) -> bool:
    return cluster.state(job) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.mark.parametrize("engine", ["fsdp2"])
def test_two_nodes_equal_one_process(
    cluster: SlurmCluster, reference: Path, data: Path, tmp_path: Path, engine: str
) -> None:
    config, log = write_config(tmp_path, data), tmp_path / "job.log"
    job = submit(cluster, log, config, "--nodes=2", "--ntasks-per-node=2", overrides=(f"parallel.engine={engine}",))
    cluster.wait_for(lambda: finished(cluster, job), "the job to end", 200)
    assert cluster.state(job) == "COMPLETED", log.read_text()
    assert "finished the run" in log.read_text()
    assert metrics(tmp_path / "run") == pytest.approx(metrics(reference), rel=1e-5)


def test_a_wrong_config_stops_before_queueing(cluster: SlurmCluster, data: Path, tmp_path: Path) -> None:
    import subprocess

    config = write_config(tmp_path, data)
    done = subprocess.run(
        [str(ROOT / "slurm" / "pretrain.sh"), "--nodes=2", "--", str(config), "training.max_step=3"],
        env=cluster.environment | {"FUSIONTREE_PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "did you mean 'max_steps'" in done.stderr
    assert not cluster.run("squeue", "-h").strip()


def test_the_warning_saves_requeues_and_resumes(
    cluster: SlurmCluster, reference: Path, data: Path, tmp_path: Path
) -> None:
    """The signal that Slurm sends before the time limit, twice; the run ends as if nothing had happened."""
    config, log = write_config(tmp_path, data), tmp_path / "job.log"
    run = tmp_path / "run"
    job = submit(cluster, log, config, "--nodes=2", "--ntasks-per-node=1")
    for stop in (1, 2):
        resumed = stop - 1
        cluster.wait_for(
            lambda n=resumed: (
                (run / "events.jsonl").exists()
                and events(run).count("resume") == n
                and (run / "metrics.jsonl").exists()
                and len(metrics(run)) >= 4 + 12 * n
            ),
            f"steps before stop {stop}; the log so far: {log.read_text() if log.exists() else ''}",
            300,
        )
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        cluster.wait_for(lambda n=stop: events(run).count("interrupted") == n, f"stop {stop}", 60)
        cluster.wait_for(lambda: cluster.state(job) in ("PENDING", "RUNNING"), "the requeue", 60)
        # A requeued job waits for about two minutes; an operator may let it go at once.
        cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
    cluster.wait_for(lambda: finished(cluster, job), "the job to end", 400)
    assert cluster.state(job) == "COMPLETED", log.read_text()
    assert events(run).count("resume") == 2
    assert metrics(run) == pytest.approx(metrics(reference), rel=1e-5)
    assert metrics(run, "tokens") == metrics(reference, "tokens")


def test_a_cancelled_run_goes_on_when_queued_again(
    cluster: SlurmCluster, reference: Path, data: Path, tmp_path: Path
) -> None:
    config, log = write_config(tmp_path, data), tmp_path / "job.log"
    run = tmp_path / "run"
    job = submit(cluster, log, config, "--nodes=1", "--ntasks-per-node=2")
    cluster.wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 9, "some steps", 120)
    cluster.run("scancel", job)
    cluster.wait_for(lambda: finished(cluster, job), "the cancellation", 60)
    again = submit(cluster, log, config, "--nodes=1", "--ntasks-per-node=2")
    cluster.wait_for(lambda: finished(cluster, again), "the second job to end", 200)
    assert cluster.state(again) == "COMPLETED", log.read_text()
    assert metrics(run) == pytest.approx(metrics(reference), rel=1e-5)


def test_a_lost_node_costs_a_requeue_on_the_other(
    cluster: SlurmCluster, reference: Path, data: Path, tmp_path: Path
) -> None:
    """The job asks for one or two nodes; it loses one of two and goes on with half the ranks."""
    config, log = write_config(tmp_path, data), tmp_path / "job.log"
    run = tmp_path / "run"
    idle = lambda: cluster.run("sinfo", "-h", "-o", "%T").split() == ["idle"]  # noqa: E731
    cluster.wait_for(idle, "both nodes to be free", 60)
    # A number of tasks would cap the nodes at it; without one srun starts a task on every node there is.
    job = submit(cluster, log, config, "--nodes=1-2", "--exclusive")
    cluster.wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 9, "some steps", 120)
    shown = cluster.run("scontrol", "show", "job", job, "-o")
    assert "NumNodes=2" in shown
    batch_host = shown.split("BatchHost=")[1].split()[0]
    lost = next(name for name in cluster.names if name != batch_host)
    cluster.kill_node(lost)
    try:
        cluster.run("scontrol", "update", f"NodeName={lost}", "State=DOWN", "Reason=lost")
        cluster.wait_for(lambda: cluster.state(job) in ("PENDING", "RUNNING"), "the requeue", 120)
        cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        cluster.wait_for(lambda: finished(cluster, job), "the job to end", 400)
        assert cluster.state(job) == "COMPLETED", log.read_text()
        assert "NumNodes=1" in cluster.run("scontrol", "show", "job", job, "-o")
        assert metrics(run) == pytest.approx(metrics(reference), rel=1e-5)
    finally:
        cluster.start_node(lost)
        cluster.run("scontrol", "update", f"NodeName={lost}", "State=RESUME", check=False)
