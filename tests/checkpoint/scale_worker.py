"""Simulates 1,024 ranks that save and resume a model of 11.5 billion parameters under fsdp2; prints times and memory.

``scale_worker.py FOLDER RANK``. The process does what that rank does, at start, save and resume, with tensors on the
meta device; what the other ranks would send to rank 0 is made here, some tensors at a time, as it would arrive.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from fusiontree.checkpoint.exchange import _FILLER, _ROWS, Rounds
from fusiontree.checkpoint.load import read_state
from fusiontree.checkpoint.metadata import Chunk
from fusiontree.checkpoint.reader import CheckpointReader, _Job
from fusiontree.checkpoint.rows import Tensors, place_type, row_type
from fusiontree.checkpoint.save_plan import Assignment, holdings_of, places_of
from fusiontree.checkpoint.tables import _joined, write_tables, written_rows
from fusiontree.checkpoint.write_files import Written, write_small_files
from fusiontree.models.config import ModelConfig
from fusiontree.models.model import FusionTreeModel
from fusiontree.parallel.global_tensor import GlobalTensor

RANKS = 1024
CONFIG = Path(__file__).parents[2] / "configs" / "pretrain_v1.yaml"


def state_shapes() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return the shapes of the flagship's parameters and moments, from one of its layers, which are all alike."""
    values = yaml.safe_load(CONFIG.read_text())["model"]
    layers = values["num_layers"]
    with torch.device("meta"):
        model = FusionTreeModel(ModelConfig.model_validate(values | {"num_layers": 1}))
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        for layer in range(layers if name.startswith("layers.0.") else 1):
            shapes[name.replace("layers.0.", f"layers.{layer}.")] = tuple(parameter.shape)
    kinds = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    return {f"{kind}.{name}": (shape, torch.float32) for name, shape in shapes.items() for kind in kinds}


def share(rows: int, rank: int) -> tuple[int, int]:
    """Return first row and number of rows of a rank's shard."""
    most = -(-rows // RANKS)
    begin = min(rank * most, rows)
    return begin, min(most, rows - begin)


def state_of(tensors: Tensors, rank: int) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, (shape, dtype) in tensors.items():
        begin, rows = share(shape[0], rank)
        part = torch.empty(rows, *shape[1:], dtype=dtype, device="meta")
        pieces = [((begin, *(0,) * (len(shape) - 1)), part)] if rows else []
        state[name] = GlobalTensor(shape, pieces, dtype, "meta")
    return state


def arriving(tensors: Tensors, kind: np.dtype) -> Iterator[np.ndarray]:
    """Yield the messages of all ranks, round by round."""
    ranks = np.arange(RANKS)[:, None]
    step = _ROWS // RANKS
    shapes = [shape for shape, _ in tensors.values()]
    starts = np.zeros(RANKS, np.int64)
    for first in range(0, len(shapes), step):
        part = shapes[first : first + step]
        height = np.array([shape[0] for shape in part])
        most = -(-height // RANKS)
        rows = np.zeros((RANKS, len(part)), kind)
        begin = np.minimum(ranks * most, height)
        rows["offset"][..., 0] = begin
        rows["shape"][..., 0] = np.minimum(most, height - begin)
        rows["shape"][..., 1] = [shape[1] if len(shape) > 1 else 1 for shape in part]
        rows["tensor"] = np.where(begin < height, first + np.arange(len(part)), _FILLER)
        if kind.names and "length" in kind.names:
            length = np.where(begin < height, rows["shape"].astype(np.int64).prod(axis=-1) * 4 + 1000, 0)
            ends = starts[:, None] + np.cumsum(length, axis=1)
            rows["start"], rows["length"], starts = ends - length, length, ends[:, -1]
            rows["digest"] = np.random.default_rng(first).integers(0, 256, (*rows.shape, 32), np.uint8)
        yield rows


def start(tensors: Tensors, rank: int) -> None:
    """The plan: what this rank sends; on rank 0 also what it answers."""
    holdings = holdings_of(state_of(tensors, rank))
    held = [(name, offset, size) for name in tensors for offset, size in holdings[name][2]]
    assert Rounds(places_of(held, tensors), len(tensors), None)._rows.nbytes < 1 << 20
    if rank == 0:
        assignment = Assignment(tensors, RANKS)
        for rows in arriving(tensors, place_type(shape for shape, _ in tensors.values())):
            answer = assignment.take(rows)
            assert answer is not None and answer.sum() == (rows["tensor"] != _FILLER).sum()
        assert assignment.problem() is None


def save(tensors: Tensors, rank: int, folder: Path) -> None:
    """What is sent after the tensor files were written; on rank 0 also the tables and small files."""
    chunks = []
    for name, (offset, view) in ((n, p) for n, t in state_of(tensors, rank).items() for p in t.pieces):  # type: ignore[attr-defined]
        chunks.append((name, Chunk(offset, tuple(view.shape), "f", 0, 9, "ab" * 32)))
    assert len(written_rows([Written(f"__{rank}_0.distcp", 9 * len(chunks), chunks)], tensors)) == len(chunks)
    if rank == 0:
        files = {f"__{other}_0.distcp": 200 << 20 for other in range(RANKS)}
        rounds = arriving(tensors, row_type(shape for shape, _ in tensors.values()))
        before = np.arange(RANKS, dtype=np.uint32)
        entries = write_tables(folder, tensors, files, (_joined(rows, before) for rows in rounds))
        write_small_files(folder, {"step": 1}, [], entries)


def resume(tensors: Tensors, rank: int, folder: Path) -> list[_Job]:
    """Everything before the tensor files are read."""
    reader = CheckpointReader(folder)
    if rank == 0:
        reader.check_small_files()
    assert read_state(folder)["step"] == 1
    jobs = reader._jobs(state_of(tensors, rank))
    assert {job.chunk.file for job in jobs} == {f"__{rank}_0.distcp"}
    return jobs


def peak() -> float:
    """Return the most memory that this process has held, in MiB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    tensors = state_shapes()
    before, found = peak(), {}

    def timed(name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        began = time.process_time()
        result = work(tensors, rank, *arguments)
        found[name] = {"seconds": round(time.process_time() - began, 2), "mib": round(peak() - before)}
        return result

    timed("start", start)
    timed("save", save, folder)
    jobs = timed("resume", resume, folder)
    print(json.dumps({"tensors": len(tensors), "jobs": len(jobs), "phases": found}))


if __name__ == "__main__":
    main()
