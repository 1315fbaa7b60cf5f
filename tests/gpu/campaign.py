"""Runs measurements on the GPUs of one machine, as many side by side as there are free GPUs.

    python -m tests.gpu.campaign OUT                                   # the jobs of tests/gpu/campaign.yaml
    python -m tests.gpu.campaign OUT --only decode 150m --limit 560    # some of them, for at most 560 seconds
    python -m tests.gpu.campaign OUT --table                           # the table of what was measured

The file has phases, lists of jobs: ``name``, ``gpus``, ``command`` (one line of bash or several) and ``limit`` in
seconds. A job starts when so many GPUs are free, in the order of the file; the next phase starts when all jobs of a
phase have ended. Jobs without GPUs run beside the phases that follow. The output of a job is OUT/NAME.txt. Commands
see ``$OUT``, their GPUs alone, and a port of their own as ``MASTER_PORT``. A job behind its limit is killed, with all
processes of its session.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

JOBS = Path(__file__).with_name("campaign.yaml")
_PORTS = 500
"""Ports from one job's first to the next one's: a job may run several programs of several processes."""


@dataclass
class Job:
    """A command and the GPUs that it needs."""

    name: str
    command: str
    gpus: int = 1
    limit: float = 300
    given: list[int] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0

    def start(self, out: Path, given: list[int], port: int) -> None:
        """Start the command in a process session of its own."""
        shown = ",".join(map(str, given))
        environment = os.environ | {"OUT": str(out), "CUDA_VISIBLE_DEVICES": shown, "MASTER_PORT": str(port)}
        environment.setdefault("PYTHONUNBUFFERED", "1")
        self.given, self.began = given, time.monotonic()
        with (out / f"{self.name}.txt").open("ab") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", self.command], env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def ended(self, until: float) -> str | None:
        """Return how the job ended, or None while it runs; kill it behind its limit or ``until``."""
        assert self.process is not None
        code = self.process.poll()
        seconds = time.monotonic() - self.began
        if code is not None:
            return f"exit code {code} after {seconds:.0f} s"
        if seconds < self.limit and time.monotonic() < until:
            return None
        kill_session(self.process.pid)
        self.process.wait()
        return f"killed after {seconds:.0f} s"


def kill_session(session: int) -> None:
    """Kill all processes of a session: ``timeout`` and launchers put theirs into other process groups."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == session:
                os.kill(int(entry.name), signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def read_phases(file: Path, only: Sequence[str]) -> list[list[Job]]:
    """Return the jobs of each phase, only those named if there are names."""
    phases = [[Job(**job) for job in phase] for phase in yaml.safe_load(file.read_text(encoding="utf-8"))]
    names = [job.name for phase in phases for job in phase]
    if wrong := set(only) - set(names):
        sys.exit(f"no such job: {', '.join(sorted(wrong))}; there are {', '.join(names)}")
    return [[job for job in phase if not only or job.name in only] for phase in phases]


def run(phases: list[list[Job]], out: Path, gpus: int, limit: float) -> list[str]:
    """Run the jobs; return the names of those that did not end with exit code 0."""
    began, port = time.monotonic(), int(os.environ.get("MASTER_PORT", "29500"))
    free, running, failed = list(range(gpus)), list[Job](), list[str]()
    out.mkdir(parents=True, exist_ok=True)
    for phase in [*phases, []]:
        waiting = list(phase)
        last = not phase
        while waiting or (running if last else any(job.given for job in running)):
            for job in list(waiting):
                if job.gpus > gpus or time.monotonic() > began + limit:
                    why = "the time is over" if job.gpus <= gpus else f"it needs {job.gpus} of {gpus} GPUs"
                    print(f"{job.name}: left out, {why}", flush=True)
                    waiting.remove(job)
                    failed.append(job.name)
                elif job.gpus <= len(free):
                    port += _PORTS
                    job.start(out, free[: job.gpus], port)
                    free = free[job.gpus :]
                    waiting.remove(job)
                    running.append(job)
                    print(f"{time.monotonic() - began:6.0f} s  {job.name}: started on GPUs {job.given}", flush=True)
            for job in list(running):
                if (how := job.ended(began + limit)) is not None:
                    running.remove(job)
                    free = sorted(free + job.given)
                    failed += [job.name] * (how.partition(" after")[0] != "exit code 0")
                    print(f"{time.monotonic() - began:6.0f} s  {job.name}: {how}", flush=True)
            time.sleep(0.2)
    return failed


def table(out: Path) -> None:
    """Print a line for each result of the benchmark in the jobs' outputs."""
    for file in sorted(out.glob("*.txt")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if found := result_of(line):
                others = {name: peer.get("tokens_per_s_per_gpu") for name, peer in found.get("others", {}).items()}
                print(
                    f"{file.stem:12s} {found['tokens_per_s_per_gpu']:10,.0f} tokens/s/GPU, MFU {found['mfu']:.1%}, "
                    f"step {1e3 * found['step_time_s']:.1f} ms, {found['matmul_precision']}, documents per row "
                    f"{found['documents_per_row']:.1f}, {found['config']} {' '.join(found['overrides'])} {others or ''}"
                )


def result_of(line: str) -> dict[str, Any] | None:
    """Return the benchmark's JSON object that the line holds, or None."""
    begin = line.find('{"config"')
    try:
        found = json.loads(line[begin:]) if begin >= 0 else {}
    except json.JSONDecodeError:
        return None
    return found if "tokens_per_s_per_gpu" in found else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; return 1 if a job failed or was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", help="folder of the outputs")
    add("--jobs", type=Path, default=JOBS, metavar="FILE", help="phases of jobs (default tests/gpu/campaign.yaml)")
    add("--only", nargs="+", default=[], metavar="NAME", help="run these jobs alone")
    add("--gpus", type=int, metavar="N", help="GPUs to use (default: all)")
    add("--limit", type=float, default=float("inf"), metavar="S", help="seconds after which running jobs are killed")
    add("--table", action="store_true", help="print the table of what was measured, and run nothing")
    args = parser.parse_args(argv)
    failed: list[str] = []
    if not args.table:
        if args.gpus is None:
            import torch

            args.gpus = torch.cuda.device_count()
        failed = run(read_phases(args.jobs, args.only), args.out.absolute(), args.gpus, args.limit)
    table(args.out)
    if failed:
        print(f"not finished: {', '.join(failed)}; their output is in {args.out}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
