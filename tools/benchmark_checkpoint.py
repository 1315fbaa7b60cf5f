"""What a checkpoint costs: how long training waits, how long writing takes, what verification adds to a load.

python tools/benchmark_checkpoint.py --gb 1 --folder /tmp/checkpoint-benchmark
python tools/benchmark_checkpoint.py --gb 17 --device cuda    # 1.4 billion parameters with AdamW in fp32

The files are dropped from the page cache before each load; ``cached_before_load`` says whether that worked. Room for
two checkpoints is needed on the disk, and memory for one copy (two with ``--device cpu``). Every figure is printed when
it is there; the last line is one JSON object:

synchronous_s    a save that training waits for
stall_s          how long training waits for a save in the background; total_s: until that save is complete
load_s           a load that hashes nothing; verified_load_s: ours; torch_load_s: torch.distributed.checkpoint's
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.reader import CheckpointReader
from fusiontree.checkpoint.saver import Saver, SaveResult
from fusiontree.utils.errors import UserError
from fusiontree.utils.hardware import available_memory


class Unverified(CheckpointReader):
    """Reads in the same way and hashes nothing: what verification is compared with."""

    hashes = False


class Clock:
    """Says what was measured, and how much time is left."""

    def __init__(self, budget_s: float) -> None:
        self._began = time.perf_counter()
        self._budget_s = budget_s

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._began

    def fits(self, seconds: float) -> bool:
        """Tell whether so many seconds more stay within the budget."""
        return self.elapsed + seconds <= self._budget_s

    def say(self, text: str) -> None:
        """Print a line with the time."""
        print(f"{self.elapsed:6.1f} s  {text}", flush=True)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--gb", type=float, default=1.0, help="size of the state (default 1)")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="where the state lives (default cpu)")
    add("--repeats", type=int, default=3, help="rounds of saving and loading; medians are shown (default 3)")
    add("--seconds", type=float, default=120.0, help="begin no further round that would end later (default 120)")
    add("--folder", type=Path, help="where to write (default: a temporary folder)")
    return parser


def make_state(size: float, device: str) -> dict[str, Tensor]:
    """Return tensors of ``size`` bytes in all, like those of a large model: matrices of 67 MB, and norms."""
    matrices = max(1, round(size / (4 * 4096 * 4096)))
    state = {f"model.matrix{i}": torch.randn(4096, 4096, device=device) for i in range(matrices)}
    return state | {f"model.norm{i}": torch.ones(4096, device=device) for i in range(2 * matrices)}


def check_room(folder: Path, size: float, device: str) -> None:
    """Refuse what would end in the middle.

    Raises:
        UserError: there is no such device, or too little memory or room on the disk.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device; leave --device out")
    free = {f"'{folder}' (room on the disk)": (shutil.disk_usage(folder).free, 2.02 * size + 1e9)}
    if (available := available_memory()) is not None:
        free["CPU memory"] = (available, (1 if device == "cuda" else 2) * size + 2e9)
    if device == "cuda":
        free["GPU memory"] = (torch.cuda.mem_get_info()[0], size + 1e9)
    for what, (there, needed) in free.items():
        if there < needed:
            raise UserError(
                f"{what}: {there / 1e9:.1f} GB free, {needed / 1e9:.1f} needed; lower --gb or give --folder"
            )


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


def drop_from_cache(folder: Path) -> float:
    """Drop files, which are synced, from the page cache; return the share of their pages that is still there."""
    pages = resident = 0
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            count = -(-file.stat().st_size // mmap.PAGESIZE)
            with mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:  # writable, for its address
                flags = (ctypes.c_ubyte * count)()
                here = (ctypes.c_char * len(mapped)).from_buffer(mapped)
                failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(here)), len(mapped), flags)
                del here  # or the mapping could not be closed
        pages += count
        resident += count if failed else int((torch.frombuffer(flags, dtype=torch.uint8) & 1).sum())
    return resident / pages


def timed(load: Callable[[], object]) -> float:
    """Return the seconds that a load takes, its copies to the GPU included."""
    began = time.perf_counter()
    load()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(folder: Path, gb: float, device: str, repeats: int, clock: Clock) -> dict[str, Any]:
    """Save and load for some rounds; return medians in seconds."""
    check_room(folder, gb * 1e9, device)
    state = make_state(gb * 1e9, device)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    clock.say(f"state of {gb:g} GB on {name}; checkpoints in {folder} ({file_system(folder)})")
    config = CheckpointConfig(keep_last=1)
    waiting = Saver(folder, config.model_copy(update={"async_": False}))
    background = Saver(folder, config)
    prepare = timed(lambda: background.prepare(state))
    clock.say(f"buffers for saving in the background made in {prepare:.2f} s")
    together: list[float] = []
    results: list[SaveResult] = []
    loads: dict[str, list[float]] = {"load_s": [], "verified_load_s": []}
    cached: list[float] = []
    readers = {"load_s": Unverified, "verified_load_s": CheckpointReader}
    round_s = 0.0

    def cold(load: Callable[[], object]) -> float:
        cached.append(drop_from_cache(results[-1].folder))
        return timed(load)

    for number in range(repeats):
        if number and not clock.fits(round_s):
            clock.say(f"no time for round {number + 1} of {repeats} in the seconds given")
            break
        began = clock.elapsed
        together.append(save(waiting, state, 2 * number, True).write_s)  # in turns: a busy disk hits both alike
        clock.say(f"saved while training waits: {together[-1]:.2f} s")
        results.append(save(background, state, 2 * number + 1, False))
        clock.say(
            f"saved in the background: stall {results[-1].stall_s:.3f} s, complete after {results[-1].write_s:.2f} s"
        )
        for kind in list(readers)[:: -1 if number % 2 else 1]:
            seconds = cold(lambda reader=readers[kind]: reader(results[-1].folder).fill(state))  # type: ignore[misc]
            loads[kind].append(seconds)
            clock.say(
                f"{kind.removesuffix('_s').replace('_', ' ')}: {seconds:.2f} s, {cached[-1]:.0%} of it cached before"
            )
        round_s = clock.elapsed - began
    plain, verified = (statistics.median(times) for times in loads.values())
    torch_s = None
    if clock.fits(2 * verified):
        checkpoint = results[-1].folder
        torch_s = cold(lambda: dcp.load(state, checkpoint_id=checkpoint, no_dist=True))
        clock.say(f"load by torch.distributed.checkpoint: {torch_s:.2f} s")
    synchronous = statistics.median(together)
    stall = statistics.median(result.stall_s for result in results)
    return {
        "device": name,
        "gb": round(results[-1].size / 1e9, 3),
        "file_system": file_system(folder),
        "rounds": len(results),
        "cached_before_load": max(cached),
        "page_locked": background.page_locked,
        "prepare_s": prepare,
        "synchronous_s": synchronous,
        "stall_s": stall,
        "stall_share": stall / synchronous,
        "total_s": statistics.median(result.write_s for result in results),
        "load_s": plain,
        "verified_load_s": verified,
        "verification_adds": verified / plain - 1,
        "torch_load_s": torch_s,
    }


def file_system(folder: Path) -> str:
    """Return the kind of file system that a folder lies on (tmpfs is memory)."""
    here, found = folder.resolve(), ("", "unknown")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if here.is_relative_to(place) and len(place) >= len(found[0]):
            found = (place, kind)
    return found[1]


def main(argv: list[str] | None = None) -> int:
    """Measure, print, clean up."""
    args = build_parser().parse_args(argv)
    clock = Clock(args.seconds)
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=args.folder, prefix="checkpoint-"))
    try:
        result = measure(folder, args.gb, args.device, args.repeats, clock)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, value in result.items():
        print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
