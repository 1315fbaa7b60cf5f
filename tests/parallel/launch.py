"""Starts the ranks of a test: plain processes on this machine that meet at a port."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from tests.end_to_end.runs import CONFIG, ROOT, build_data, environment

Job = tuple[str, list[str], str | None]
"""Run folder, overrides, and an option that the worker interprets."""


class Table:
    """Trains layouts on one configuration and dataset, several of one number of ranks in one start of processes."""

    def __init__(self, folder: Path, sections: dict[str, Any], worker: str = "tests.parallel.worker") -> None:
        """Build the data and write the configuration: the common one with ``sections`` in place of its own."""
        self.folder, self.worker = folder, worker
        data = build_data(folder)
        paths = {"train": str(data / "train"), "validation": str(data / "validation")}
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump({**CONFIG, "data": paths, **sections}))

    def train(self, ranks: int, jobs: list[Job]) -> None:
        """Train each job in turn."""
        ports = ",".join(map(str, free_ports(len(jobs))))
        arguments = ["-m", self.worker, str(self.config), json.dumps(jobs), ports]
        run_ranks(arguments, ranks, self.folder, timeout=180.0 * len(jobs))


def run_ranks(arguments: list[str], ranks: int, folder: Path, timeout: float) -> None:
    """Run ``python *arguments`` as every rank of ``ranks``; fail with their outputs if one fails.

    ``MASTER_PORT`` is a free port; a program that meets several times sets further ports itself.
    """
    place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    place["MASTER_PORT"] = str(free_ports(1)[0])
    place["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with ExitStack() as stack:
        logs = [stack.enter_context(open(folder / f"rank{rank}.log", "w+")) for rank in range(ranks)]
        processes = [
            subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env=environment() | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            _wait(processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        failed = [rank for rank, process in enumerate(processes) if process.returncode]
        assert not failed, "".join(f"rank {r}:\n{_ends(Path(logs[r].name).read_text())}" for r in failed)


def free_ports(count: int) -> list[int]:
    """Return ports without a listener that the system does not give to outgoing connections.

    Systems give out ports from 32768 on; the last of many jobs takes its port minutes after it was found.
    """
    found: list[int] = []
    with ExitStack() as stack:
        while len(found) < count:
            port = random.randrange(12000, 32768)
            each = stack.enter_context(socket.socket())
            try:
                each.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    return found


def _wait(processes: list[subprocess.Popen], timeout: float) -> None:
    """Wait until all have ended or one has failed."""
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            time.sleep(2.0)  # the others may have something to say, too
            return
        assert time.monotonic() < end, f"not ended after {timeout:.0f} s"
        time.sleep(0.05)


def _ends(text: str) -> str:
    return text if len(text) < 9000 else text[:6000] + "\n…\n" + text[-3000:]
