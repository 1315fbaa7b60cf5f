"""A copy of this rank's part of the state in CPU memory, taken while training pauses for a save.

The memory is allocated once and reused by every save. Its size is the bytes that this rank writes. It is touched in
advance, since the first access to a page costs more than the copy, and page-locked if the state is on a GPU, so that
the copy runs at full link speed.
"""

from __future__ import annotations

import contextlib
import weakref

import torch
from torch import Tensor

from fusiontree.checkpoint.save_plan import Rectangle, SavePlan, pieces_of

_ALIGN = 64


class Snapshot:
    """Buffers for the rectangles of a save plan."""

    def __init__(self, plan: SavePlan, device: torch.device) -> None:
        """Allocate the buffers.

        Args:
            plan: has the rectangles that this rank writes.
            device: of the state's tensors.
        """
        self.plan = plan
        starts, end = [], 0
        for rectangle in plan.mine:
            starts.append(end)
            end += -(-plan.nbytes(rectangle) // _ALIGN) * _ALIGN
        memory = torch.zeros(max(end, 1), dtype=torch.uint8)
        self.locked = device.type == "cuda" and _page_lock(memory)
        flat = self._memory = memory.numpy()
        # Memory must be unlocked before it is freed: CUDA would take later memory at its address for locked.
        self._unlock = weakref.finalize(flat, _page_unlock, memory.data_ptr()) if self.locked else None
        self.buffers: dict[Rectangle, Tensor] = {}
        for rectangle, start in zip(plan.mine, starts, strict=True):
            # From numpy, so that each buffer has a separate storage: torch.save writes complete storages.
            part = torch.from_numpy(flat[start : start + plan.nbytes(rectangle)])
            self.buffers[rectangle] = part.view(plan.tensors[rectangle[0]][1]).view(rectangle[2])

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> None:
        """Copy the current values; after this returns, training may change them."""
        for rectangle, view in live_pieces(self.plan, tensors).items():
            self.buffers[rectangle].copy_(view, non_blocking=self.locked)
        if self.locked:
            torch.cuda.synchronize()

    def close(self) -> None:
        """Unlock the memory; it is also unlocked when no buffer is in use any more."""
        if self._unlock is not None:
            self._unlock()
        self.locked = False


def live_pieces(plan: SavePlan, tensors: dict[str, Tensor]) -> dict[Rectangle, Tensor]:
    """Return views of the current values of the rectangles that this rank writes."""
    mine = set(plan.mine)
    found: dict[Rectangle, Tensor] = {}
    for name, tensor in tensors.items():
        for offset, view in pieces_of(tensor):
            rectangle = (name, tuple(offset), tuple(view.shape))
            if rectangle in mine:
                found[rectangle] = view
    return found


def _page_lock(memory: Tensor) -> bool:
    """Page-lock exactly this memory (torch's pinned allocator rounds up to a power of two); False if that fails."""
    if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)) == 0:
        return True
    with contextlib.suppress(RuntimeError):  # clears the error, which CUDA would report again at the next kernel
        torch.zeros(1, device="cuda")
    return False


def _page_unlock(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
