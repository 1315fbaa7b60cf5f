"""Faults for a training process, from outside its code: the campaign starts ranks through :func:`run_rank`.

A moment is the n-th section that the process enters (``wait for data``, ``forward of micro batch 0``, ``save`` …), so
it is repeatable and falls into every part of a step. Nothing of this is reachable from the product.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fusiontree.data.batch import MicroBatch
from fusiontree.engines.base import ModelOutput
from fusiontree.supervision.watchdog import Watchdog
from fusiontree.train import main
from fusiontree.training.loop import Trainer

SIGNALS = {"kill": "SIGKILL", "hang": "SIGSTOP", "term": "SIGTERM", "usr1": "SIGUSR1", "int": "SIGINT"}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong in one process."""

    kind: str
    """A key of SIGNALS, or nan, spike, flip, slow, clock, full_disk; corrupt and lost_shard kill and wandb does
    nothing: the campaign does the rest."""
    rank: int
    entry: int
    """Fires inside the n-th section, from 1, that the process enters, …"""
    section: str = ""
    """… counting sections whose name begins with this."""
    delay_s: float = 0.0
    """Delay of signals, so that they arrive in the middle of the section."""
    amount: float = 0.0
    """slow: seconds per step; clock: seconds of the jump; full_disk: bytes left free; spike: factor of the loss, also
    when the same tokens come again."""


class Injector:
    """Counts sections and lets the fault happen."""

    def __init__(self, fault: Fault, folder: Path) -> None:
        """Arm ``fault``; ``folder`` takes the note that it happened, its ``disk`` may become full."""
        self.fault, self.folder = fault, folder
        self._entered = 0
        self._step = 0
        self._nan = self._slow = self._spike = False
        self._bad_tokens = {int(path.name.split("-")[1]) for path in folder.glob("tokens-*")}
        self.engine: Any = None

    def inside(self, name: str, watchdog: Watchdog) -> None:
        """Note that the process is in section ``name``."""
        if name.startswith(self.fault.section):
            self._entered += 1
            if self._entered == self.fault.entry:
                self._step = watchdog.step
                self._fire(name)
        if self._slow and name == "wait for data":
            time.sleep(self.fault.amount)

    def forward(self, original: Callable[..., ModelOutput], micro: MicroBatch, *rest: Any) -> ModelOutput:
        """Run an engine's forward; a nan or spike fault changes its loss."""
        outputs = original(micro, *rest)
        assert outputs.loss_sum is not None
        if self._nan:
            self._nan = False
            self._note("forward")
            return outputs._replace(loss_sum=outputs.loss_sum * math.nan)
        if self._spike or self._bad_tokens:
            tokens = zlib.crc32(micro.input_ids_BS.numpy().tobytes())
            if self._spike:
                self._spike = False
                self._bad_tokens.add(tokens)
                (self.folder / f"tokens-{tokens}").touch()
            if tokens in self._bad_tokens:
                self._note("forward")
                return outputs._replace(loss_sum=outputs.loss_sum * self.fault.amount)
        return outputs

    def _note(self, section: str) -> None:
        text = json.dumps({**asdict(self.fault), "in": section, "step": self._step})
        (self.folder / f"fired-{time.monotonic_ns()}.json").write_text(text)

    def _fire(self, name: str) -> None:
        kind = self.fault.kind
        if kind in ("nan", "spike"):
            self._nan, self._spike = kind == "nan", kind == "spike"
            return
        if kind in ("slow", "wandb", "clock", "flip", "full_disk"):
            self._note(name)
        if kind == "slow":
            self._slow = True
        elif kind == "clock":
            real = time.time
            time.time = lambda: real() + self.fault.amount
        elif kind == "flip":
            next(self.engine.parameter_pieces())[2].view(-1)[3] += 0.25
        elif kind == "full_disk":
            fill_disk(self.folder / "disk", int(self.fault.amount))
        elif kind != "wandb":  # the campaign gave it a server that does not answer
            if self.fault.delay_s:
                threading.Timer(self.fault.delay_s, self._send, (name,)).start()
            else:
                self._send(name)

    def _send(self, section: str) -> None:
        self._note(section)
        os.kill(os.getpid(), getattr(signal, SIGNALS.get(self.fault.kind, "SIGKILL")))


def fill_disk(folder: Path, leave_bytes: int) -> None:
    """Take the free space of ``folder``'s file system but for ``leave_bytes``."""
    state = os.statvfs(folder)
    take = state.f_bavail * state.f_frsize - leave_bytes
    if take > 0:
        with (folder / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, take)


def install(fault: Fault, folder: Path) -> None:
    """Arm a fault in this process."""
    injector = Injector(fault, folder)
    plain_section, plain_init = Watchdog.section, Trainer.__init__

    @contextmanager
    def section(self: Watchdog, name: str, limit_s: float) -> Iterator[None]:
        with plain_section(self, name, limit_s):
            injector.inside(name, self)
            yield

    def init(self: Trainer, settings: Any, engine: Any, *rest: Any) -> None:
        forward, injector.engine = engine.forward, engine
        engine.forward = partial(injector.forward, forward)
        plain_init(self, settings, engine, *rest)

    watchdog: Any = Watchdog
    trainer: Any = Trainer
    watchdog.section, trainer.__init__ = section, init


def run_rank(
    rank: int, world: int, port: int, arguments: list[str], log: str, environment: dict[str, str], faults: list[Fault]
) -> None:
    """Be one rank of a job: the target of a new process; exits with the training entry's code."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    if world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for fault in faults:
        if fault.rank % world == rank:
            install(fault, Path(log).parent)
    try:
        code = main(arguments)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as a launcher sees it, without clean-up by this campaign
