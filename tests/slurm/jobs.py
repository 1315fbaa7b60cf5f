"""Jobs on the test cluster: queue them as a user would, wait for what becomes of them, compare runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.runs import ROOT, environment, events, metrics
from tests.slurm.cluster import SlurmCluster, missing_programs

# A gentle rate: over many steps a steep one amplifies rounding beyond what the comparison allows.
LONG = ("training.max_steps=40", "training.learning_rate=0.0003")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
_MISSING = missing_programs()

needs_slurm = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.xdist_group("slurm"),
    pytest.mark.skipif(
        bool(_MISSING), reason=f"a Slurm of its own needs {', '.join(_MISSING)} (Debian: slurm-wlm and munge, as root)"
    ),
]
"""Marks of a test module that starts a cluster."""


def submit(
    cluster: SlurmCluster, log: Path, config: Path, *options: str, overrides: tuple[str, ...] = LONG, **variables: str
) -> str:
    """Queue ``sbatch slurm/pretrain.sh``; return the job's number."""
    os.environ["FUSIONTREE_PYTHON"] = sys.executable
    shown = cluster.run(
        *("env", *(f"{name}={value}" for name, value in variables.items())),
        *("sbatch", "--parsable", f"--output={log}", f"--chdir={ROOT}", *options),
        *("slurm/pretrain.sh", str(config), *overrides),
    )
    return shown.strip().split(";")[0]


def script(cluster: SlurmCluster, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one of our scripts outside any job."""
    env = environment() | cluster.environment | {"FUSIONTREE_PYTHON": sys.executable} | variables
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def wait_for_end(cluster: SlurmCluster, job: str, log: Path, seconds: float = 900) -> str:
    """Return the state in which the job ended; a requeued one is let go at once, not after Slurm's two minutes."""
    hurry(cluster, job)
    cluster.wait_for(lambda: cluster.state(job) in ENDED, f"job {job} to end; its log: {read(log)}", seconds)
    return cluster.state(job)


def hurry(cluster: SlurmCluster, job: str) -> None:
    """Let a requeued job start now."""
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)


def wait_for_steps(cluster: SlurmCluster, run: Path, log: Path, count: int, resumes: int = 0) -> None:
    """Wait until the run has logged ``count`` steps and was resumed so often."""
    cluster.wait_for(
        lambda: (
            (run / "metrics.jsonl").exists() and events(run).count("resume") == resumes and len(metrics(run)) >= count
        ),
        f"{count} steps after {resumes} resumes; the job's log: {read(log)}",
        800,
    )


def warn(cluster: SlurmCluster, job: str, run: Path, times: int) -> None:
    """Send what Slurm sends before the time limit, and wait until the run was interrupted so often."""
    cluster.run("scancel", "--batch", "--signal=USR1", job, check=False)  # delivers to an array's task and fails
    cluster.wait_for(lambda: events(run).count("interrupted") == times, f"interruption {times}", 300)


def read(log: Path) -> str:
    """The file's text, where there is one."""
    return log.read_text() if log.exists() else "(none)"


def assert_same_run(run: Path, reference: Path) -> None:
    """Equal losses (fp32, other layouts round differently) and, exactly, equal tokens at every step."""
    assert metrics(run) == pytest.approx(metrics(reference), rel=1e-5)
    assert metrics(run, "grad_norm") == pytest.approx(metrics(reference, "grad_norm"), rel=1e-4)
    assert metrics(run, "tokens") == metrics(reference, "tokens")
    assert metrics(run, "tokens_hash") == metrics(reference, "tokens_hash")
