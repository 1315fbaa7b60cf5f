"""Killed at any moment - a rank, the cache's writer, a command - the next start goes on with the right tokens."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from itertools import count, cycle, islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from fusiontree.data.config import DataConfig, DatasetConfig
from fusiontree.data.sources.cached_shards import open_shards
from tests.data.batches import open_data, row_digests
from tests.data.datasets import random_dataset
from tests.data.http_folder import HttpFolder
from tests.data.test_cache import held

STEPS = 150
KIND = {"curriculum": [[4, 40], [8, 40]], "global_batch_size": 8}
# Forked, so that a start costs no imports; each child is a process that can be killed as any other.
PROCESSES = multiprocessing.get_context("fork")


def run_rank(config: DataConfig, rank: int, size: int, state: Any, output: Path) -> None:
    """Read to the end of the run, noting every step as a training loop with a checkpoint a step would."""
    with output.open("w") as file:
        data = open_data(config, rank, size, **KIND)
        for batch, after in data.steps(state):
            file.write(json.dumps([after["step"], row_digests(batch), after]) + "\n")
            file.flush()
            if after["step"] == STEPS:
                return
            time.sleep(0.002)


def run_writer(config: DataConfig) -> None:
    """Fetch shards into the cache without end, as fast as it goes."""
    source = open_shards(DatasetConfig(path=str(config.train)), config)
    for number in cycle(range(len(source.info.shards))):
        source.fetch(number)


def noted(output: Path) -> list[list[Any]]:
    """The steps that a rank noted; the last line may have been cut by a kill."""
    if not output.exists():
        return []
    return [json.loads(line) for line in output.read_text().splitlines(keepends=True) if line.endswith("\n")]


class Campaign:
    """A run that is killed again and again; every row it ever hands out is compared with an undisturbed run's."""

    def __init__(self, base: Path, url: str, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.output = base / "ranks"
        self.output.mkdir()
        self.cache = base / "cache"
        plain = DataConfig(train=str(folder), num_workers=0, shuffle_shards=2)
        self.wanted: dict[int, dict[str, str]] = {}
        for batch, after in islice(open_data(plain, **KIND).steps(), STEPS):
            self.wanted[after["step"]] = {str(number): digest for number, digest in row_digests(batch).items()}
        values = {"train": url, "cache_dir": str(self.cache), "shuffle_shards": 2, "num_workers": 2}
        values |= {"fetch_wait_s": 0.05, "allow_pipe": True, "prefetch_shards": 2}
        source = open_shards(DatasetConfig(path=url), DataConfig.model_validate(values))
        sizes = sorted(source.cache_bytes(n) for n in range(len(source.info.shards)))
        self.limit = sum(sizes[-5:])
        self.config = DataConfig.model_validate({**values, "cache_size_gib": self.limit / 2**30})
        self.state: Any = None
        self.finished = 0
        self.kills = {"rank": 0, "writer": 0, "worker": 0}

    def life(self, kind: str | None) -> None:
        """Start ranks where the run stands, kill something (or nothing), and see how far they came."""
        size = self.random.randint(1, 3)
        files = [self.output / f"{rank}.jsonl" for rank in range(size)]
        for file in files:
            file.unlink(missing_ok=True)
        arguments = [(self.config, rank, size, self.state, files[rank]) for rank in range(size)]
        ranks = [PROCESSES.Process(target=run_rank, args=a) for a in arguments]
        writers = [PROCESSES.Process(target=run_writer, args=(self.config,))] if kind == "writer" else []
        for process in [*ranks, *writers]:
            process.start()
        if kind is None:
            for process in ranks:
                process.join(60)
                assert process.exitcode == 0
        else:
            self._kill_one(kind, ranks, writers)
            for process in ranks:  # as a launcher does when a rank has died
                process.kill()
                process.join()
        self._check(files)

    def _kill_one(self, kind: str, ranks: list[BaseProcess], writers: list[BaseProcess]) -> None:
        time.sleep(self.random.uniform(0, 0.4))
        if kind == "rank":
            self.random.choice(ranks).kill()
            self.kills[kind] += 1
            time.sleep(self.random.uniform(0, 0.05))
        elif kind == "writer":
            writers[0].kill()
            writers[0].join()
            self.kills[kind] += 1
            time.sleep(0.2)
        else:
            until = time.monotonic() + 2
            while not (commands := commands_of(ranks)) and time.monotonic() < until:
                time.sleep(0.001)
            for pid in commands[:1]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.kills[kind] += 1
            time.sleep(0.2)
        if kind != "rank":
            assert all(process.exitcode in (None, 0) for process in ranks), "the others go on"

    def _check(self, files: list[Path]) -> None:
        logs = [noted(file) for file in files]
        for log in logs:
            for step, rows, _ in log:
                assert rows.items() <= self.wanted[step].items()
        common = min(len(log) for log in logs)
        for step in range(common):
            together = {number for log in logs for number in log[step][1]}
            assert together == self.wanted[logs[0][step][0]].keys()
        if common:
            self.state = logs[0][common - 1][2]
        if self.state is not None and self.state["step"] == STEPS:
            self.finished += 1
            self.state = None

    def run(self, kills: int, kinds: list[str]) -> None:
        """Kill the run ``kills`` times, then let it end undisturbed."""
        for number in count():
            if sum(self.kills.values()) >= kills:
                break
            assert number < 3 * kills + 20
            self.life(kinds[number % len(kinds)])
        finished = self.finished
        self.life(None)
        assert self.finished == finished + 1
        assert held(self.cache) <= self.limit
        source = open_shards(DatasetConfig(path=str(self.config.train)), self.config)
        for number in range(len(source.info.shards)):  # a rank that ends may leave a download, which others remove
            source.fetch(number)
        assert not list(self.cache.glob("*.part"))


def commands_of(ranks: list[BaseProcess]) -> list[int]:
    """Processes that ranks started."""
    found = []
    for rank in ranks:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{rank.pid}/task").iterdir():
                found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


def campaign(base: Path, kills: int, kinds: list[str], seed: int) -> Campaign:
    folder = random_dataset(base / "d", shards=9, count=60)
    with HttpFolder(folder, bytes_per_s=2e6) as server:
        url = server.url
        if kinds == ["worker"]:
            url = f"pipe:sleep 0.02; cat {shlex.quote(str(folder))}/{{name}}"
        run = Campaign(base, url, folder, seed)
        run.run(kills, kinds)
    return run


def test_a_few_kills(tmp_path: Path) -> None:
    run = campaign(tmp_path, 6, ["rank", "writer", "rank"], seed=0)
    assert run.kills["rank"] >= 3


def test_killed_commands_are_repeated(tmp_path: Path) -> None:
    campaign(tmp_path, 2, ["worker"], seed=0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_kills_of_each_kind(tmp_path: Path) -> None:
    first = campaign(tmp_path / "a", 100, ["rank", "writer"], seed=1)
    second = campaign(tmp_path / "b", 50, ["worker"], seed=2)
    print(first.kills, second.kills, "runs finished:", first.finished, second.finished)
    assert min(first.kills["rank"], first.kills["writer"], second.kills["worker"]) >= 45


def test_no_process_outlives_a_killed_trainer(tmp_path: Path) -> None:
    """Neither worker threads nor a command that hangs."""
    mark = f"7{os.getpid():07d}.5"  # recognisable among all sleeping processes
    code = (
        "import sys; from pathlib import Path; from fusiontree.data.sources.remote import CommandFolder\n"
        "CommandFolder(sys.argv[1]).download('x', Path(sys.argv[2]))"
    )
    command = f"pipe:sleep {mark} | cat; echo {{name}}"
    trainer = subprocess.Popen([sys.executable, "-c", code, command, str(tmp_path / "out")])

    def sleepers() -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().decode(errors="replace").split("\0")
                if mark in words:
                    found.append(path.parent.name)
        return found

    until = time.monotonic() + 20
    while not sleepers() and time.monotonic() < until:
        time.sleep(0.02)
    assert sleepers()
    trainer.kill()
    trainer.wait()
    until = time.monotonic() + 5
    while sleepers() and time.monotonic() < until:
        time.sleep(0.02)
    assert not sleepers()
