"""The run lock: a second launch on a run folder is refused while the first process lives.

RUN/lease.json names the holder, which increments a counter in it while it lives. In the same boot and pid namespace,
the kernel says whether the process lives; anywhere else, the counter is watched for some seconds. An equal host name
proves nothing: containers and machines named localhost share it. Clocks are not compared, so a wrong clock does no
harm. A requeued Slurm job takes the lock of its own earlier start at once.

A holder that seemed dead but was not (a suspended job, a hung file system) finds another holder in the file and then
saves no more checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fusiontree.utils.environment import slurm_job
from fusiontree.utils.errors import UserError
from fusiontree.utils.file_lock import FileLock

RUN_LOCK = "lease.json"
GUARD = ".lease.lock"
BEAT_S = 10.0
_MISSED = 3.5
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Holder:
    """The process that writes to a run folder."""

    token: str
    host: str
    machine: str
    """Boot and pid namespace of the host: in which world ``pid`` means something."""
    pid: int
    started: str
    """The kernel's start time of the process; a later process of the same pid has another."""
    job: str
    restart: int

    @classmethod
    def me(cls) -> Holder:
        """Return this process."""
        job, restart = slurm_job()
        return cls(
            secrets.token_hex(8), socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()), job, restart
        )

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}"


class RunLock:
    """The right to write to a run folder. On rank 0 only."""

    def __init__(self, run_dir: Path, beat_s: float = BEAT_S, say: Callable[[str], None] = lambda text: None) -> None:
        """Nothing is taken yet.

        Args:
            run_dir: the run's folder; made when it is taken.
            beat_s: seconds between signs of life.
            say: told what is waited for.
        """
        self.run_dir, self.beat_s, self._say = run_dir, beat_s, say
        self.me = Holder.me()
        self._beat = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the folder.

        Raises:
            UserError: another live process writes to it.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        guard = FileLock(self.run_dir / GUARD)
        locked = False
        with contextlib.suppress(OSError):  # a file system without locks: the look back below decides
            locked = guard.acquire()  # two launches at the same moment look one after the other
        try:
            found = self._read()
            if found and self._lives(*found):
                raise UserError(
                    f"run_dir '{self.run_dir}' is being written to by {found[0]}; stop that run first, or name another "
                    f"run_dir"
                )
            self._write()
            if not locked:
                time.sleep(min(2.0, self.beat_s / 5))
                if other := self.taken_by():
                    raise UserError(f"run_dir '{self.run_dir}' was taken by {other} at the same moment; name another")
        finally:
            guard.close()
        self._thread = threading.Thread(target=self._keep_alive, name="lease", daemon=True)
        self._thread.start()

    def taken_by(self) -> Holder | None:
        """Return who has taken the folder from this process, or None while it is ours."""
        try:
            found = self._read()
        except OSError:
            return None  # nobody can be seen there; whoever asks meets the same file system
        return found[0] if found and found[0].token != self.me.token else None

    def lost_reason(self) -> str | None:
        """Return why this process must not write a checkpoint any more, or None."""
        other = self.taken_by()
        return (
            f"run_dir '{self.run_dir}' was taken over by {other}: this process had shown no sign of life"
            if other
            else None
        )

    def release(self) -> None:
        """Give the folder back."""
        self._stop.set()
        if self._thread:
            self._thread.join()
        if not self.taken_by():
            (self.run_dir / RUN_LOCK).unlink(missing_ok=True)

    def _keep_alive(self) -> None:
        while not self._stop.wait(self.beat_s):
            if self.taken_by():
                return
            try:
                self._write()
            except OSError:
                continue  # a full disk, a folder that is gone: the next beat tries again

    def _write(self) -> None:
        self._beat += 1
        temporary = self.run_dir / f".{RUN_LOCK}.{self.me.token}"
        try:
            temporary.write_text(json.dumps(asdict(self.me) | {"beat": self._beat}))
            temporary.replace(self.run_dir / RUN_LOCK)
        finally:
            temporary.unlink(missing_ok=True)

    def _read(self) -> tuple[Holder, int] | None:
        try:
            values: dict[str, Any] = json.loads((self.run_dir / RUN_LOCK).read_text())
            beat = int(values.pop("beat"))
            return Holder(**values), beat
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            return None  # nothing that any of our processes wrote

    def _lives(self, holder: Holder, beat: int) -> bool:
        if holder.job and holder.job == self.me.job and holder.restart < self.me.restart:
            return False  # Slurm ends a job before it starts it again
        if holder.machine == self.me.machine != _UNKNOWN and holder.started:
            if _started(holder.pid) == holder.started:
                return True
            if holder.host == self.me.host:
                return False
            # Copies of one virtual machine share boot and namespace; only the counter can tell.
        patience = _MISSED * self.beat_s
        self._say(f"{self.run_dir} was written to by {holder}: watching for {patience:.0f} s whether it still lives")
        end = time.monotonic() + patience
        while time.monotonic() < end:
            time.sleep(min(1.0, self.beat_s / 10))
            if self._read() != (holder, beat):
                return self._read() is not None
        return False


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return _UNKNOWN


def _started(pid: int) -> str:
    """Return the start time of a live process, or nothing where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
