"""Conversions hold about the largest tensor in memory, whatever the model's size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.convert.checkpoints import all_tensors, training_run
from tests.end_to_end.runs import ROOT, environment

MEASURED = """
import json, re, sys, threading
from pathlib import Path
from tools.convert_checkpoint import main

def anonymous():
    # What is mapped from files costs nothing: the system takes it back when it needs room.
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def convert_all(folder):
    for source, target, *arguments in steps:
        assert main([str(folder / source), str(folder / target), *arguments]) == 0

small, large, steps = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
convert_all(small)  # whatever is loaded and kept once
seen = [anonymous()]
done = threading.Event()

def watch():
    while not done.wait(0.002):
        seen.append(anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
convert_all(large)
done.set()
watcher.join()
print("grew", max(seen) - seen[0])
"""

STEPS = {
    "hf": [
        ["run", "hf", "--to", "hf", "--max-shard-size", "1GB", "--check-logits", "off"],
        ["hf", "again", "--to", "dcp"],
        ["run", "w.safetensors", "--to", "safetensors"],
    ],
    "megatron": [["run", "megatron", "--to", "megatron", "--tp", "2"], ["megatron", "again", "--to", "dcp"]],
    "zero2": [["run", "zero", "--to", "zero", "--stage", "2", "--tp", "2"], ["zero", "again", "--to", "dcp"]],
    "zero3": [["run", "zero", "--to", "zero", "--stage", "3", "--dp", "2"], ["zero", "again", "--to", "dcp"]],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STEPS)
def test_memory_stays_near_the_largest_tensor(kind: str, tmp_path: Path):
    if kind.startswith("zero"):
        pytest.importorskip("deepspeed")
    training_run(tmp_path / "small" / "run")
    run = tmp_path / "large" / "run"
    training_run(run, hidden_size=512, num_layers=8, mamba={"head_dim": 64, "d_state": 16, "n_groups": 1})
    largest = max(tensor.nbytes for tensor in all_tensors(run).values()) / 2**20
    weights = sum(file.stat().st_size for file in run.rglob("*.distcp")) / 3 / 2**20
    command = [sys.executable, "-c", MEASURED, str(run.parents[1] / "small"), str(run.parent), json.dumps(STEPS[kind])]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    grew = float(done.stdout.split()[-1])
    print(f"{kind}: weights {weights:.0f} MiB, largest tensor {largest:.1f} MiB, memory grew by {grew:.1f} MiB")
    assert weights > 150 and grew < 10 * largest
