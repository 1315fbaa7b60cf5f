"""One rank of the tests with several ranks: ``python -m tests.checkpoint.ranks_worker FOLDER TEST``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fusiontree.checkpoint import saver as saver_module
from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.load import load_newest
from fusiontree.checkpoint.manifest import CheckpointDamage
from fusiontree.checkpoint.saver import Saver
from fusiontree.parallel.global_tensor import GlobalTensor, ShardSpec
from fusiontree.parallel.layout import Layout
from fusiontree.utils.errors import UserError

WHOLE = torch.arange(12 * 6, dtype=torch.float32).view(12, 6)


def state(layout: Layout, factor: float = 1.0) -> dict[str, Tensor]:
    """A tensor of each kind; rows and columns do not divide by the ranks."""
    rank, ranks = layout.place.rank, layout.place.world_size
    spec = ShardSpec((12, 6), 1, ((rank * 2, rank * 2 + 2),))
    return {
        "whole": WHOLE.clone() * factor,
        "another": torch.ones(64) * factor,
        "sharded": distribute_tensor(WHOLE[:7].clone() * factor, layout.parameter_mesh(shard=True), [Shard(0)]),
        "short": distribute_tensor(torch.ones(ranks - 1, 3) * factor, layout.parameter_mesh(shard=True), [Shard(0)]),
        "cut": GlobalTensor((12, 6), spec.pieces(spec.cut(WHOLE * factor).reshape(-1).clone()), torch.float32),
    }


def local(tensor: Tensor) -> list[Tensor]:
    if isinstance(tensor, GlobalTensor):
        return [view for _, view in tensor.pieces]
    return [tensor.to_local()] if isinstance(tensor, DTensor) else [tensor]


def check(layout: Layout, found: dict[str, Tensor], factor: float) -> None:
    for name, tensor in state(layout, factor).items():
        for a, b in zip(local(found[name]), local(tensor), strict=True):
            assert torch.equal(a, b), (name, factor)


def kinds(layout: Layout, folder: Path, saver: Saver) -> None:
    """Saved and loaded by the same ranks, in the background and not; whole tensors are written once."""
    saver.save(1, state(layout, 2.0), {})
    saver.wait()
    saver.save(2, state(layout, 3.0), {}, wait=True)
    results = saver.poll()
    assert [r.error for r in results] == [None, None]
    found = state(layout, 0.0)
    loaded = load_newest(folder, found, group=saver.group)
    assert loaded is not None and loaded[1]["step"] == 2
    check(layout, found, 3.0)
    sizes = [None] * layout.place.world_size
    assert saver._plan is not None
    written = sum(saver._plan.nbytes(rectangle) for rectangle in saver._plan.mine)
    dist.all_gather_object(sizes, written, group=layout.cpu_group)
    assert results[0].size == sum(sizes) == 4 * (72 + 64 + 42 + 6 + 72), sizes  # type: ignore[arg-type]
    assert max(sizes) - min(sizes) < 4 * 72, sizes  # type: ignore[type-var, operator]


def one_rank_fails(layout: Layout, folder: Path, saver: Saver) -> None:
    """A disk error on one rank is every rank's result; the next save is whole."""
    saver.save(1, state(layout, 1.0), {}, wait=True)
    real = saver_module.write_files

    def fails(partial: Path, *_: object) -> None:
        raise OSError(28, "No space left on device", str(partial / "__1_0.distcp"))

    if layout.place.rank == 1:
        saver_module.write_files = fails  # type: ignore[assignment]
    for step, wait in ((2, False), (3, True)):
        saver.save(step, state(layout, 2.0), {}, wait=wait)
    saver_module.write_files = real
    saver.save(4, state(layout, 4.0), {})
    saver.wait()
    results = saver.poll()
    errors = [r.error or "" for r in results]
    assert [bool(e) for e in errors] == [False, True, True, False]
    assert "__1_0.distcp: No space left on device" in errors[1]
    layout.barrier()
    assert sorted(f.name for f in folder.iterdir()) == ["step-00000001", "step-00000004"]


def damage_on_one_rank(layout: Layout, folder: Path, saver: Saver) -> None:
    """Damage that only one rank reads makes all ranks load the older checkpoint."""
    for step in (1, 2, 3):
        saver.save(step, state(layout, float(step)), {}, wait=True)
    layout.barrier()
    if layout.place.rank == 0:
        file = next((folder / "step-00000003").glob("__2_*.distcp"))
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    layout.barrier()
    said: list[str] = []
    found = state(layout, 0.0)
    loaded = load_newest(folder, found, group=saver.group, on_damage=said.append)
    assert loaded is not None and loaded[1]["step"] == 2 and "__2_" in said[0]
    check(layout, found, 2.0)

    def refuse(name: Path, values: dict) -> None:
        if layout.place.rank == 2:
            raise UserError("another model")

    try:
        load_newest(folder, found, group=saver.group, check=refuse)
    except CheckpointDamage as error:
        raise AssertionError("a mistake is no damage") from error
    except UserError as error:
        assert "another model" in str(error)
    else:
        raise AssertionError("rank 2 refused, the others went on")


def main() -> None:
    folder = Path(sys.argv[1])
    with Layout("cpu", timeout_s=120) as layout:
        saver = Saver(folder, CheckpointConfig(keep_last=0), layout.checkpoint_group)
        globals()[sys.argv[2]](layout, folder, saver)
        layout.barrier()
    print(json.dumps("done"))


if __name__ == "__main__":
    main()
