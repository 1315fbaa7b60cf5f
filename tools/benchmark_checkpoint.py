"""What a checkpoint costs: how long training waits, how long writing takes, what verification adds to a load.

python tools/benchmark_checkpoint.py --gb 1 --folder /tmp/checkpoint-benchmark
python tools/benchmark_checkpoint.py --gb 17 --device cuda    # 1.4 billion parameters with AdamW in fp32

The files are dropped from the page cache before each load. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.metadata import Chunk
from fusiontree.checkpoint.reader import CheckpointReader, _Job
from fusiontree.checkpoint.saver import Saver, SaveResult


class Unverified(CheckpointReader):
    """Reads in the same way and hashes nothing: what verification is compared with."""

    def _has_parts(self, job: _Job) -> bool:
        return True

    def _part(self, chunk: Chunk) -> str | None:
        return None


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--gb", type=float, default=1.0, help="size of the state (default 1)")
    add("--device", default="cpu", help="where the state lives: cpu or cuda")
    add("--repeats", type=int, default=3, help="times each figure is taken; the median is shown")
    add("--folder", type=Path, help="where to write (default: a temporary folder)")
    return parser


def make_state(size: float, device: str) -> dict[str, Tensor]:
    """Return tensors of ``size`` bytes in all, like those of a large model: matrices of 67 MB, and norms."""
    matrices = max(1, round(size / (4 * 4096 * 4096)))
    state = {f"model.matrix{i}": torch.randn(4096, 4096, device=device) for i in range(matrices)}
    return state | {f"model.norm{i}": torch.ones(4096, device=device) for i in range(2 * matrices)}


def save(saver: Saver, state: dict[str, Tensor], step: int, wait: bool) -> SaveResult:
    """Save once.

    Raises:
        OSError: it failed.
    """
    saver.save(step, state, {"config": {}}, wait=wait)
    saver.wait()
    (result,) = saver.poll()
    if result.error:
        raise OSError(result.error)
    return result


def timed_cold(folder: Path, load: Callable[[], object]) -> float:
    """Return the seconds of a load whose files are not in the page cache."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    load()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(folder: Path, gb: float, device: str, repeats: int) -> dict[str, float | str]:
    """Save and load a few times; return medians in seconds."""
    state = make_state(gb * 1e9, device)
    config = CheckpointConfig(keep_last=1)
    waiting = Saver(folder, config.model_copy(update={"async_": False}))
    background = Saver(folder, config)
    began = time.perf_counter()
    background.prepare(state)
    prepare = time.perf_counter() - began
    together: list[float] = []
    results: list[SaveResult] = []
    for step in range(repeats):  # in turns, so that a busy disk hits both alike
        together.append(save(waiting, state, 2 * step, True).write_s)
        results.append(save(background, state, 2 * step + 1, False))
    checkpoint = results[-1].folder
    loads: dict[str, list[float]] = {"torch": [], "unverified": [], "verified": []}
    for _ in range(repeats):
        loads["torch"].append(timed_cold(checkpoint, lambda: dcp.load(state, checkpoint_id=checkpoint, no_dist=True)))
        loads["unverified"].append(timed_cold(checkpoint, lambda: Unverified(checkpoint).fill(state)))
        loads["verified"].append(timed_cold(checkpoint, lambda: CheckpointReader(checkpoint).fill(state)))
    synchronous = statistics.median(together)
    stall = statistics.median(result.stall_s for result in results)
    torch_s, plain_s, verified_s = (statistics.median(times) for times in loads.values())
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "gb": round(results[-1].size / 1e9, 3),
        "prepare_s": prepare,
        "synchronous_save_s": synchronous,
        "stall_s": stall,
        "stall_share": stall / synchronous,
        "background_save_s": statistics.median(result.write_s for result in results),
        "torch_load_s": torch_s,
        "unverified_load_s": plain_s,
        "verified_load_s": verified_s,
        "verification_adds": verified_s / plain_s - 1,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, clean up."""
    args = build_parser().parse_args(argv)
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=args.folder, prefix="checkpoint-"))
    try:
        result = measure(folder, args.gb, args.device, args.repeats)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, value in result.items():
        print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
