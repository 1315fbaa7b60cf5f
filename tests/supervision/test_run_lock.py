"""One writer a run folder."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fusiontree.supervision import run_lock
from fusiontree.supervision.run_lock import RUN_LOCK, RunLock
from fusiontree.utils.errors import UserError

BEAT = 0.1


@pytest.fixture(autouse=True)
def no_lock_outlives_its_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its thread would go on writing to disk during the tests that follow."""
    made: list[RunLock] = []
    start = RunLock.__init__

    def recorded(lock: RunLock, *arguments: Any, **options: Any) -> None:
        start(lock, *arguments, **options)
        made.append(lock)

    monkeypatch.setattr(RunLock, "__init__", recorded)
    yield
    for lock in made:
        lock.release()


def lease(run: Path, **changes: object) -> RunLock:
    made = RunLock(run, beat_s=BEAT)
    made.me = dataclasses.replace(made.me, **changes)
    return made


def test_a_second_launch_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    first, second = lease(tmp_path), lease(tmp_path)
    first.acquire()
    with pytest.raises(UserError, match=f"being written to by process {first.me.pid} on {first.me.host}"):
        second.acquire()
    assert first.lost_reason() is None
    first.release()
    assert not (tmp_path / RUN_LOCK).exists()
    second.acquire()
    second.release()


def test_a_dead_holder_on_this_machine_is_followed_at_once(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from fusiontree.supervision.run_lock import RunLock; "
        "RunLock(Path(sys.argv[1])).acquire(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert (tmp_path / RUN_LOCK).exists()
    began = time.monotonic()
    lease(tmp_path).acquire()
    assert time.monotonic() - began < 3 * BEAT


def test_another_process_with_the_same_pid_is_not_the_holder(tmp_path: Path) -> None:
    lease(tmp_path, started="1").acquire()
    lease(tmp_path).acquire()


def test_a_holder_on_another_machine_is_watched(tmp_path: Path) -> None:
    there = lease(tmp_path, host="node7", machine="elsewhere 1", pid=1)
    there.acquire()
    with pytest.raises(UserError, match="process 1 on node7"):
        lease(tmp_path).acquire()
    there._stop.set()  # it dies without a word
    said: list[str] = []
    here = RunLock(tmp_path, beat_s=BEAT, say=said.append)
    began = time.monotonic()
    here.acquire()
    assert time.monotonic() - began >= 3 * BEAT
    assert "node7" in said[0]


@pytest.mark.parametrize(
    "other",
    [
        {"machine": "another-boot 1"},  # another machine, or the same one started anew
        {"machine": "{boot} another-namespace"},  # another container
        {"machine": "unknown"},  # a system without /proc
        {"started": ""},
        {"host": "clone", "pid": 1 << 22},  # copies of one virtual machine
    ],
)
def test_a_live_holder_with_the_same_host_name_keeps_the_lock(tmp_path: Path, other: dict[str, object]) -> None:
    """The scene: containers named localhost; the lock of a live run was taken after 0.7 s."""
    here = lease(tmp_path)
    boot = here.me.machine.split()[0]
    changes = {key: value.format(boot=boot) if isinstance(value, str) else value for key, value in other.items()}
    holder = lease(tmp_path, **changes)
    holder.acquire()
    with pytest.raises(UserError, match="being written to"):
        here.acquire()
    assert holder.lost_reason() is None
    holder._stop.set()  # it dies without a word
    said: list[str] = []
    after = RunLock(tmp_path, beat_s=BEAT, say=said.append)
    began = time.monotonic()
    after.acquire()
    assert time.monotonic() - began >= 3 * BEAT
    assert "watching for" in said[0]
    after.release()


def test_two_machines_of_unknown_identity_exclude_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_machine", lambda: "unknown")
    monkeypatch.setattr(run_lock, "_started", lambda pid: "")
    holder, second = lease(tmp_path), lease(tmp_path)
    holder.acquire()
    with pytest.raises(UserError, match="being written to"):
        second.acquire()
    holder.release()


def test_the_same_job_number_of_another_cluster_is_another_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "b")
    here = lease(tmp_path)
    assert here.me.job == "12@b"
    other = lease(tmp_path, machine="there 1", job="12@a", restart=0)
    other.acquire()
    with pytest.raises(UserError, match="job 12@a"):
        here.acquire()
    other.release()


def test_a_requeued_job_follows_itself_and_no_other_job(tmp_path: Path) -> None:
    first = lease(tmp_path, host="node1", machine="there 1", job="12", restart=0)
    first._write()
    again = lease(tmp_path, job="12", restart=1)
    began = time.monotonic()
    again.acquire()
    assert time.monotonic() - began < 3 * BEAT
    again.release()
    alive = lease(tmp_path, host="node1", machine="there 1", job="12", restart=0)
    alive.acquire()
    with pytest.raises(UserError, match="job 12"):
        lease(tmp_path, job="12", restart=0).acquire()  # the same job starting two runs on one folder
    alive.release()


def test_a_holder_that_was_thought_dead_must_not_save(tmp_path: Path) -> None:
    suspended = lease(tmp_path, host="node7", machine="elsewhere 1")
    suspended.acquire()
    suspended._stop.set()
    here = lease(tmp_path)
    here.acquire()
    refusal = suspended.lost_reason()
    assert refusal is not None and f"taken over by process {here.me.pid}" in refusal
    suspended.release()
    assert json.loads((tmp_path / RUN_LOCK).read_text())["token"] == here.me.token
    assert here.lost_reason() is None


def test_a_broken_lease_file_stops_nobody(tmp_path: Path) -> None:
    (tmp_path / RUN_LOCK).write_text("{half")
    holder = lease(tmp_path)
    holder.acquire()
    (tmp_path / RUN_LOCK).unlink()
    time.sleep(3 * BEAT)
    assert (tmp_path / RUN_LOCK).exists()  # written again by the next beat
    holder.release()
