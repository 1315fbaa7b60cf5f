"""A program that saves and is killed, many times: after each its last completed save, or a later one, must load.

``killed_saver.py FOLDER each STRIDE``: kill −9 at every STRIDE-th change that a save makes to the file system.
``killed_saver.py FOLDER random COUNT SEED``: at random moments.
It forks, because starting Python anew takes a thousand times as long as the save.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusiontree.checkpoint import write_files as write
from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.folders import complete_checkpoints, remove_partial
from fusiontree.checkpoint.load import load_newest
from fusiontree.checkpoint.saver import Saver

STEPS = 5
STEP_SIGNAL = "committed"


def state(step: int) -> dict[str, torch.Tensor]:
    return {f"model.{i}": torch.full((50, 40 + i), float(step * 100 + i)) for i in range(3)}


def save_all(checkpoints: Path, count: int = STEPS, keep_last: int = 2) -> None:
    """Save ``count`` steps, noting each beside the folder once the saver says that it is done."""
    saver = Saver(checkpoints, CheckpointConfig(keep_last=keep_last))
    for step in range(1, count + 1):
        saver.save(step, state(step), {"tokens": step * 10}, [checkpoints.parent / "tokenizer.json"])
        saver.wait()
        (result,) = saver.poll()
        assert result.error is None, result.error
        note = checkpoints.parent / f"{STEP_SIGNAL}.new"
        note.write_text(str(step))
        note.replace(checkpoints.parent / STEP_SIGNAL)  # the kill may come while the note is being written


def count_changes(then: Callable[[int], None]) -> None:
    """Call ``then(n)`` before the n-th change to the file system that this process makes."""
    made = 0

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            nonlocal made
            made += 1
            then(made)
            # A killed process loses nothing that the kernel has; waiting for the disk would take most of the time.
            return None if name == "fsync" else real(*arguments, **options)

        setattr(owner, name, wrapped)

    for name in ("mkdir", "fsync", "replace", "rename", "rmdir", "unlink", "chmod", "open"):
        wrap(os, name)
    wrap(write._HashingStream, "write")


def check(folder: Path) -> None:
    """Do as a new start does: remove partial checkpoints and load the newest complete checkpoint."""
    checkpoints = folder / "checkpoints"
    committed = int((folder / STEP_SIGNAL).read_text()) if (folder / STEP_SIGNAL).exists() else 0
    damage: list[str] = []
    remove_partial(checkpoints)
    tensors = {name: torch.zeros_like(t) for name, t in state(0).items()}
    found = load_newest(checkpoints, tensors, on_damage=damage.append)
    assert not damage, damage
    step = found[1]["step"] if found else 0
    assert committed <= step <= committed + 1, f"saved step {committed}, found step {step}"
    if found:
        assert found[1]["tokens"] == step * 10
        assert all(torch.equal(tensors[n], t) for n, t in state(step).items()), f"step {step} holds other values"
        assert len(complete_checkpoints(checkpoints)) <= 3
    assert not list(checkpoints.glob(".*")), list(checkpoints.iterdir())


def fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "tokenizer.json").write_text("{}")


def child(work: Callable[[], None]) -> int:
    """Run ``work`` in a fork; return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            print(f"child: {error!r}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_each(folder: Path, stride: int) -> int:
    """Return how many changes there are to be killed before."""
    number = 1
    while True:
        fresh(folder)

        def work(number: int = number) -> None:
            count_changes(lambda made: os.kill(os.getpid(), signal.SIGKILL) if made == number else None)
            save_all(folder / "checkpoints", count=2, keep_last=1)  # the second also deletes the first

        code = ended(child(work))
        check(folder)
        if code == 0:
            return number - 1
        assert code == -signal.SIGKILL, code
        number += stride


def kill_at_random(folder: Path, count: int, seed: int) -> int:
    """Return how many of the kills hit a save that was under way."""
    dice = random.Random(seed)
    fresh(folder)
    began = time.monotonic()
    assert ended(child(lambda: save_all(folder / "checkpoints"))) == 0
    length = time.monotonic() - began
    hit = 0
    for _ in range(count):
        fresh(folder)
        pid = child(lambda: save_all(folder / "checkpoints", count=1000))
        time.sleep(dice.uniform(0, length))
        os.kill(pid, signal.SIGKILL)
        assert ended(pid) == -signal.SIGKILL
        hit += bool(list((folder / "checkpoints").glob(".partial-*")))
        check(folder)
    return hit


if __name__ == "__main__":
    place, mode = Path(sys.argv[1]), sys.argv[2]
    if mode == "each":
        print(f"killed at {kill_at_each(place, int(sys.argv[3]))} places")
    else:
        print(f"{kill_at_random(place, int(sys.argv[3]), int(sys.argv[4]))} of {sys.argv[3]} kills hit a save")
