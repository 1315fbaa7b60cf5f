"""A process of megatron-core's own: loads or saves our tensors by its loader, at some tensor parallel size.

python tests/convert/megatron_side.py load FOLDER TP OUTPUT    every rank's parts, put together again
python tests/convert/megatron_side.py save FOLDER TP TENSORS   the same tensors, as megatron writes them
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def main(action: str, folder: str, tp: int, file: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    tensors = torch.load(file, weights_only=True)  # name: (tensor of one block, axis or None)

    def part_of(key: str, tensor: torch.Tensor, axis: int | None, rank: int, empty: bool) -> Any:
        part = tensor if axis is None else tensor.chunk(tp, dim=axis)[rank]
        part = torch.full_like(part, float("nan")) if empty else part.clone()
        cut = () if axis is None else ((axis, rank, tp),)
        return ShardedTensor.from_rank_offsets(key, part, *cut)

    if action == "save":
        # Its writer asks a GPU to wait, and for the device to agree on errors; there is none here.
        torch.cuda.synchronize = lambda *_: None
        torch.cuda.current_device = lambda: "cpu"
        state = {
            f"{key}/{rank}": part_of(key, tensor, axis, rank, empty=False)
            for key, (tensor, axis) in tensors.items()
            for rank in range(tp if axis is not None else 1)
        }
        Path(folder).mkdir()
        dist_checkpointing.save({"sharded": state, "iteration": 7}, folder)
        return
    loaded: dict[str, list[torch.Tensor]] = {key: [] for key in tensors}
    for rank in range(tp):
        wanted = {key: part_of(key, tensor, axis, rank, empty=True) for key, (tensor, axis) in tensors.items()}
        state = dist_checkpointing.load(wanted, folder, validate_access_integrity=False)
        assert state["iteration"] == 7
        for key in tensors:
            loaded[key].append(state[key])
    whole = {k: v[0] if tensors[k][1] is None else torch.cat(v, dim=tensors[k][1]) for k, v in loaded.items()}
    torch.save(whole, file + ".loaded")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
