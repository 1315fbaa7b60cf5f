"""Checks of slurm/pretrain.sh and slurm/evaluate.sh before they queue, chains of jobs, and an evaluation job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.runs import ROOT, events, train, write_config
from tests.slurm.cluster import SlurmCluster
from tests.slurm.jobs import (
    LONG,
    assert_same_run,
    needs_slurm,
    read,
    script,
    submit,
    wait_for_end,
    wait_for_steps,
    warn,
)

pytestmark = needs_slurm
PRETRAIN, EVALUATE = str(ROOT / "slurm" / "pretrain.sh"), str(ROOT / "slurm" / "evaluate.sh")


@pytest.mark.parametrize(
    ("options", "override", "complaint"),
    [
        (["--nodes=2"], "training.max_step=3", "did you mean 'max_steps'"),
        (["--nodes=3", "--gpus-per-node=h100:1"], "parallel.shard_size=2", "must divide the 3 processes"),
        # The site's options count too, and a range of nodes must fit at its every size.
        (["-N", "1-2", "--"], "parallel.shard_size=8", "must divide the 4 processes"),
        (["--nodes=2"], "data.train=/nowhere/train", "/nowhere/train"),
        (["--nodes=2"], "run_dir=/dev/null/run", "nothing can be written to '/dev/null'"),
    ],
)
def test_what_is_wrong_stops_before_queueing(
    cluster: SlurmCluster, data: Path, tmp_path: Path, options: list[str], override: str, complaint: str
) -> None:
    config = write_config(tmp_path, data)
    done = script(cluster, PRETRAIN, *options, str(config), override, SBATCH_OPTIONS="--ntasks-per-node=4")
    if "--gpus-per-node=h100:1" in options:
        done = script(cluster, PRETRAIN, *options, str(config), override)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert not cluster.run("squeue", "-h").strip()


def test_a_chain_goes_on_where_its_jobs_may_not_requeue(
    cluster: SlurmCluster, reference: Path, data: Path, tmp_path: Path
) -> None:
    """Three jobs: the first is warned, the second finishes, the third is taken out of the queue."""
    config, run, log = write_config(tmp_path, data), tmp_path / "run", tmp_path / "job.log"
    options = ["--chain=3", "--nodes=2", "--time=30", f"--output={log}"]
    done = script(cluster, PRETRAIN, *options, str(config), *LONG)
    assert done.returncode == 0, done.stderr
    first, second, third = (line.split()[-1] for line in done.stdout.splitlines() if line.startswith("queued job"))
    wait_for_steps(cluster, run, log, 4)
    assert cluster.state(second) == "PENDING"
    warn(cluster, first, run, 1)
    assert wait_for_end(cluster, first, log) == "FAILED"  # 75: saved, not at its end
    assert "ExitCode=75:0" in cluster.run("scontrol", "show", "job", first, "-o")
    assert wait_for_end(cluster, second, log) == "COMPLETED", read(log)
    assert wait_for_end(cluster, third, log) == "CANCELLED"
    assert events(run).count("resume") == 1
    assert_same_run(run, reference)


def test_an_array_is_a_chain_too(cluster: SlurmCluster, reference: Path, data: Path, tmp_path: Path) -> None:
    config, run, log = write_config(tmp_path, data), tmp_path / "run", tmp_path / "job.log"
    done = script(cluster, PRETRAIN, "--array=1-3%1", f"--output={log}", str(config), *LONG)
    assert done.returncode == 0, done.stderr
    wait_for_steps(cluster, run, log, 4)
    warn(cluster, cluster.run("squeue", "-h", "-t", "RUNNING", "-o", "%A").strip(), run, 1)
    cluster.wait_for(lambda: not cluster.run("squeue", "-h").strip(), f"the array to end: {read(log)}", 900)
    assert read(log).count("finished the run") == 1
    assert_same_run(run, reference)


def test_the_network_is_measured_first_where_asked(cluster: SlurmCluster, data: Path, tmp_path: Path) -> None:
    config, log = write_config(tmp_path, data), tmp_path / "job.log"
    short = ("training.max_steps=4", "training.validation.interval=0")
    job = submit(cluster, log, config, "--nodes=2", "--ntasks-per-node=1", overrides=short, PREFLIGHT="1")
    assert wait_for_end(cluster, job, log) == "COMPLETED", read(log)
    measured = json.loads((tmp_path / "run" / "logs" / "preflight.json").read_text())
    assert measured["problems"] == []
    assert [link["pair"] for link in measured["links"]] == [[0, 1]]
    assert measured["links"][0]["all_reduce_gb_per_s"] > 0
    assert read(log).index("all-reduce GB/s") < read(log).index("finished the run")


def test_an_evaluation_job(cluster: SlurmCluster, data: Path, tmp_path: Path) -> None:
    config, log = write_config(tmp_path, data), tmp_path / "job.log"
    assert train(config, "training.max_steps=4").returncode == 0
    done = script(cluster, EVALUATE, f"--checkpoint={tmp_path / 'nothing'}", "--tasks", "perplexity")
    assert done.returncode == 2 and "nothing" in done.stderr
    output = tmp_path / "result.json"
    options = ["--time=10", f"--output={log}"]
    wanted = [f"--checkpoint={tmp_path / 'run'}", "--tasks", "perplexity", f"--output={output}", "--max-rows=4"]
    done = script(cluster, EVALUATE, *options, *wanted)
    assert done.returncode == 0, done.stderr
    assert wait_for_end(cluster, done.stdout.split()[-1], log) == "COMPLETED", read(log)
    assert "perplexity" in json.loads(output.read_text())["results"]
