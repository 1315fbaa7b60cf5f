"""Starts the ranks of a test: plain processes on this machine that meet at a port."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from tests.end_to_end.runs import ROOT, environment


def run_ranks(arguments: list[str], ranks: int, folder: Path, timeout: float) -> None:
    """Run ``python *arguments`` as every rank of ``ranks``; fail with their outputs if one fails.

    The port where they meet is theirs to choose unless ``MASTER_PORT`` is set by them.
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
    """Return ports that nobody listens on, and that nobody is given by the system until they are used.

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
