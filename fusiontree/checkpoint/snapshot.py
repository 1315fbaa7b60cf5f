"""A copy of this rank's part of the state in CPU memory, taken in the pause of training that a save costs.

The memory is made once and used by every save: as much as the rank writes, touched beforehand (a first touch costs more
than the copy), and page-locked where the state lives on a GPU, so that the copy runs at the link's full speed.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from fusiontree.checkpoint.pieces import pieces_of
from fusiontree.checkpoint.save_plan import Rectangle, SavePlan

_ALIGN = 64


class Snapshot:
    """Buffers for the pieces of a plan."""

    def __init__(self, plan: SavePlan, device: torch.device) -> None:
        """Allocate.

        Args:
            plan: what this rank writes.
            device: where the live tensors are.
        """
        self.plan = plan
        starts, end = [], 0
        for rectangle in plan.mine:
            starts.append(end)
            end += -(-plan.nbytes(rectangle) // _ALIGN) * _ALIGN
        self._memory = torch.zeros(max(end, 1), dtype=torch.uint8)
        self.locked = device.type == "cuda" and _page_lock(self._memory)
        self.buffers: dict[Rectangle, Tensor] = {}
        flat = self._memory.numpy()
        for rectangle, start in zip(plan.mine, starts, strict=True):
            # From numpy, so that each buffer is a storage of its own: torch.save writes whole storages.
            part = torch.from_numpy(flat[start : start + plan.nbytes(rectangle)])
            self.buffers[rectangle] = part.view(plan.tensors[rectangle[0]][1]).view(rectangle[2])

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Copy the live values; when this returns, training may change them."""
        for rectangle, view in live_pieces(self.plan, tensors).items():
            self.buffers[rectangle].copy_(view, non_blocking=self.locked)
        if self.locked:
            torch.cuda.synchronize()

    def close(self) -> None:
        """Unlock the memory."""
        if self.locked:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
            self.locked = False


def live_pieces(plan: SavePlan, tensors: dict[str, Tensor]) -> dict[Rectangle, Tensor]:
    """Return the views of live values that this rank writes."""
    mine = set(plan.mine)
    found: dict[Rectangle, Tensor] = {}
    for name, tensor in tensors.items():
        for offset, view in pieces_of(tensor):
            rectangle = (name, tuple(offset), tuple(view.shape))
            if rectangle in mine:
                found[rectangle] = view
    return found


def _page_lock(memory: Tensor) -> bool:
    """Lock exactly this memory: torch's own pinned allocator rounds up to a power of two. False where it is refused."""
    if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0:
        return True
    with contextlib.suppress(RuntimeError):  # CUDA would report the refusal once more, at the next kernel
        torch.zeros(1, device="cuda")
    return False
