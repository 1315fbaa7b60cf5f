"""Two hosts, one link: multi-node jobs of torchrun and deepspeed; the link is cut in the middle of a step."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.runs import ROOT, events, metrics, write_config
from tests.slurm.hosts import Hosts, missing_for_hosts
from tests.slurm.jobs import LONG, assert_same_run, read

MISSING = missing_for_hosts()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2400),
    pytest.mark.skipif(bool(MISSING), reason=f"two hosts cannot be made here: no {', '.join(MISSING)}"),
]
LIMIT_S = 25.0
"""Of a step; far above what one takes on a busy machine."""


def start(hosts: Hosts, launcher: str, config: Path, folder: Path) -> list[Path]:
    """Start two ranks on each host; return the two logs."""
    hostfile = folder / "hosts"
    hostfile.write_text("host-0 slots=2\nhost-1 slots=2\n")
    limits = [f"supervision.hang_timeout_s={LIMIT_S}", "supervision.slow_timeout_s=600", "checkpoint.save_interval=5"]
    logs = [folder / f"{name}.log" for name in "01"]
    for host, log in enumerate(logs):
        hosts.start(
            host,
            [str(ROOT / "launchers" / f"{launcher}.sh"), "--config", str(config), *LONG, *limits],
            log,
            PYTHONPATH=str(ROOT),
            FUSIONTREE_PYTHON=sys.executable,
            PROCESSES="2",
            NNODES="2",
            NODE_RANK=str(host),
            MASTER_ADDR=hosts.addresses[0],
            MASTER_PORT="29555",
            HOSTFILE=str(hostfile) if launcher == "deepspeed" else "",
        )
    return logs


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_cut_link_ends_the_step_names_the_peer_and_the_job_goes_on_when_it_is_back(
    launcher: str, reference: Path, data: Path, tmp_path: Path
) -> None:
    config, run = write_config(tmp_path, data), tmp_path / "run"
    with Hosts() as hosts:
        logs = start(hosts, launcher, config, tmp_path)

        def wait_for(condition, what: str, seconds: float) -> None:  # type: ignore[no-untyped-def]
            deadline = time.monotonic() + seconds
            while not condition():
                shown = "\n".join(f"--- {log.name}: {read(log)[-3000:]}" for log in logs)
                assert time.monotonic() < deadline, f"waited {seconds} s for {what}; the logs end with {shown}"
                time.sleep(0.05)

        wait_for(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) >= 8, "8 steps", 700)
        hosts.cut(1)
        cut = time.monotonic()
        wait_for(lambda: "no longer reaches host-" in read(logs[0]) + read(logs[1]), "the report", LIMIT_S + 30)
        # The report itself waits two seconds for an answer and three for the other ranks.
        print(f"{launcher}: the peer was named {time.monotonic() - cut:.1f} s after the cut (limit {LIMIT_S} s)")
        assert "finished" not in events(run)
        hosts.mend(1)
        wait_for(lambda: all(p.poll() is not None for p in hosts.started), "the job to end", 900)
        assert [p.returncode for p in hosts.started] == [0, 0], read(logs[0]) + read(logs[1])
    assert events(run)[-1] == "finished" and events(run).count("resume") >= 1
    told = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert any("no longer reaches host-" in json.dumps(event) for event in told)
    assert_same_run(run, reference)
