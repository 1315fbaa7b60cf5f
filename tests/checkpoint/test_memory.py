"""Memory: a save in the background takes one copy of the state, everything else about the largest tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.runs import ROOT, environment

PROGRAM = """
import json, sys, torch
from pathlib import Path
from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.load import load_checkpoint
from fusiontree.checkpoint.saver import Saver

def peak():  # of this program: getrusage's would count the process that started it, too
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

def save(saver, step, state, wait):
    saver.save(step, state, {}, wait=wait)
    saver.wait()
    (result,) = saver.poll()
    assert result.error is None, result.error
    return result.folder

folder = Path(sys.argv[1])
warm = {"w": torch.ones(10)}
load_checkpoint(save(Saver(folder / "warm", CheckpointConfig()), 1, warm, False), warm)
state = {f"w{i}": torch.ones(2 << 20) for i in range(24)}  # 24 x 8 MiB
seen = [peak()]
saver = Saver(folder / "real", CheckpointConfig(async_=False))
found = save(saver, 1, state, True)
seen.append(peak())
load_checkpoint(found, state)
seen.append(peak())
saver = Saver(folder / "real", CheckpointConfig())
for step in range(2, 6):
    save(saver, step, state, False)
seen.append(peak())
print(json.dumps([b - a for a, b in zip(seen, seen[1:])]))
"""


@pytest.mark.slow
def test_peaks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    waiting, loading, background = json.loads(done.stdout)
    print(f"MiB above a state of 192: save {waiting:.0f}, load {loading:.0f}, save in the background {background:.0f}")
    assert waiting < 24 and loading < 40
    assert 180 < background + max(waiting, loading) < 192 + 40
