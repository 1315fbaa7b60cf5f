"""Starts of tiny runs for the fault campaign: texts, configuration, small file systems, ranks as processes."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import socket
import subprocess
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import yaml

from tests.tiny import tiny_section
from tools.build_shards import main as build_shards
from tools.fault_injection import Fault, run_rank

STEPS = 24
PATIENCE_S = 180.0
"""No start of these tiny runs takes longer, hung ones included."""
GRACE_S = 4.0
"""Time for the other ranks to leave by themselves after the first left with an error."""
CONFIG: dict[str, Any] = {
    "model": tiny_section(
        vocab_size=264,
        window_size=12,
        initializer_range=0.02,
        drop_branch_prob=0.1,
        load_balance_coeff=0.05,
        mamba={"d_state": 8, "chunk_size": 16, "A_init_range": [1.0, 16.0]},
    ),
    "training": {
        "seq_len": 64,
        "max_steps": STEPS,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "precision": "fp32",
        "device": "cpu",
        "learning_rate": 3e-4,
        "warmup_steps": 4,
        "validation": {"interval": 12, "rows": 4},
    },
    "supervision": {
        "hang_timeout_s": 12.0,  # a crowded machine makes a step of milliseconds last seconds
        "slow_timeout_s": 45.0,
        "straggler_interval": 4,
        "straggler_factor": 2.0,
        "replica_check_interval": 8,
        "restart_backoff_s": 0.1,
    },
    "checkpoint": {"save_interval": 3, "keep_last": 2},
    "logging": {"log_interval": 1},
}
# Forked from one process that has imported everything: a start takes a second, not four.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tools.fault_injection", "fusiontree.engines.build", "fusiontree.data.loader"])
_STARTING = threading.Lock()
# Below the ports that the kernel gives away; where in there differs from campaign to campaign.
_PORTS = itertools.cycle(range(10000 + os.getpid() * 37 % 20000, 32000))


def build_corpus(folder: Path) -> Path:
    """Write small texts and build train and validation shards of them; return their folder."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    random = Random(0)
    for number in range(80):
        words = " ".join(random.choice(("tree", "root", "leaf", "moss", "rain")) for _ in range(5 + number % 60))
        (texts / f"{number:03d}.txt").write_text(words)
    options = ["--validation-fraction", "0.15", "--shard-mb", "0.003", "--processes", "1"]
    assert build_shards(["--input", str(texts), "--output", str(folder / "data"), *options]) == 0
    return folder / "data"


def can_mount(folder: Path) -> bool:
    """Tell whether a small file system can be mounted here."""
    probe = folder / "probe"
    probe.mkdir(parents=True)
    mounted = mount_small(probe, 1)
    if mounted:
        unmount(probe)
    probe.rmdir()
    return mounted


def mount_small(folder: Path, mib: int) -> bool:
    """Mount a file system of ``mib`` MiB in memory; False where that is not allowed."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)], capture_output=True)
    return done.returncode == 0


def unmount(folder: Path) -> None:
    """Unmount it."""
    subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def free_port() -> int:
    """Return a TCP port that nobody listens on, another one every time; outgoing connections do not take it either."""
    while True:
        port = next(_PORTS)
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def write_config(
    folder: Path, data: Path, engine: str, run_dir: Path | None = None, **sections: dict[str, Any]
) -> Path:
    """Write the configuration of a run in ``run_dir``, by default ``folder / run``."""
    values = {
        **CONFIG,
        **sections,
        "run_dir": str(run_dir or folder / "run"),
        "parallel": {"engine": engine, **sections.get("parallel", {})},
    }
    values["data"] = {"train": str(data / "train"), "validation": str(data / "validation")}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(folder: Path, config: Path, world: int, faults: list[Fault], environment: dict[str, str]) -> list[int]:
    """Start ``world`` ranks as a launcher would and wait for them; return their exit codes."""
    port = free_port()
    arguments = ["--config", str(config)]
    log = str(folder / "log.txt")
    with _STARTING:
        ranks = [
            _CONTEXT.Process(target=run_rank, args=(rank, world, port, arguments, log, environment, faults))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
    deadline = time.monotonic() + PATIENCE_S
    doomed = False
    while any(process.is_alive() for process in ranks):
        codes = [process.exitcode for process in ranks]
        if not doomed and any(code not in (None, 0) for code in codes):
            doomed, deadline = True, min(deadline, time.monotonic() + GRACE_S)
            for process in ranks:
                if process.is_alive() and 75 not in codes:
                    process.terminate()  # unlike os.kill, also where another thread sees it end at this moment
        if time.monotonic() > deadline:
            for process in ranks:
                process.kill()
        time.sleep(0.02)
    return [process.exitcode if process.exitcode is not None else -1 for process in ranks]
