"""Cost of opening a dataset and resuming, per process: prints seconds and megabytes above the imports."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path

from fusiontree.data.config import DataConfig
from fusiontree.data.loader import TrainingData
from fusiontree.training.config import TrainingConfig


def memory_mb(field: str) -> float:
    """Resident memory of this process, now (VmRSS) or at its highest (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def main(folder: str, workers: int) -> None:
    """Resume at a random step of the second epoch and read its batch."""
    config = DataConfig(train=folder, num_workers=workers)
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    before, began = memory_mb("VmRSS"), time.perf_counter()
    training = TrainingConfig(seq_len=4096, max_steps=1, global_batch_size=256, seed=1)
    data = TrainingData(config, training, 264, dp_rank=1, dp_size=64)
    opened = time.perf_counter() - began
    step = random.Random(0).randrange(10_000, 19_000)
    position = data._position
    position.step, position.row, position.number = step, 256 * step, 256 * step
    state = position.state_dict(data.order, data.mixture.rows_before(position.row))
    batch, after = next(data.steps(state))
    seconds = time.perf_counter() - began
    assert after["step"] == step + 1 and len(batch.micro_batches) == 4
    used = memory_mb("VmHWM") - before
    print(json.dumps({"seconds": seconds, "opening": opened, "megabytes": used, "state": len(json.dumps(after))}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
