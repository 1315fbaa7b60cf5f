"""Sizes of the scan's Triton kernels: scan chunks and tiles that fit into a GPU's shared memory, grids, launch options.

Shape legend: B rows, S tokens, Q tokens of a scan chunk, H heads, G groups, P channels of a head, N state size.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

WIDTHS, STATES = (16, 32, 64, 128), (16, 32, 64, 128, 256)
"""Supported channels per head and state sizes: powers of two with tiles that fit into a multiprocessor."""
_MOST_HEADS = 8
"""Maximum number of heads per program."""
_ENOUGH = 128
"""Number of programs that keep a large GPU busy."""
_KIB = 1024


def tiles(itemsize: int, width: int, size: int, room: int) -> tuple[int, int] | None:
    """Return the tokens per scan chunk and the number of prefetched loads, or None if no tile fits.

    Chunks of 128 tokens need the registers of Hopper or newer. The kernel ``chunk_outputs`` needs the most shared
    memory: C of a chunk, and x and the state of each prefetched head. Triton 3.6 uses this amount for 16-bit inputs on
    sm_90, less on other GPUs, and at most 0.83 of it for 32-bit inputs.

    Args:
        itemsize: bytes per input value.
        width: channels of a head.
        size: state size of a head.
        room: bytes of shared memory per multiprocessor.
    """
    large = itemsize == 2 and width <= 64 and size <= 128 and room >= 200 * _KIB
    share = 1.0 if itemsize == 2 else 0.85
    for chunk, ahead in ((128, 3), (64, 3), (64, 2), (32, 2)):
        values = max(chunk * size + ahead * (chunk + size) * width, 2 * chunk * size)  # or B and C of a chunk
        need = share * itemsize * values + 4 * _KIB
        if need <= room and (chunk < 128 or large):
            return chunk, ahead
    return None


@functools.cache
def _fast_memory(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return 256 * _KIB
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


class ScanSizes(NamedTuple):
    """Sizes of one scan, and the grids and tiles of its kernels that follow from them."""

    rows: int
    length: int
    heads: int
    groups: int
    width: int
    size: int
    Q: int
    ahead: int
    """Number of prefetched loads."""
    blocks: int
    """Number of programs that share the heads of a group."""

    @property
    def chunks(self) -> int:
        """Number of chunks per row."""
        return -(-self.length // self.Q)

    @property
    def heads_per_program(self) -> int:
        """Number of heads that one program processes."""
        return self.heads // self.groups // self.blocks

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs over heads, chunks and rows."""
        return self.groups * self.blocks, self.chunks, self.rows

    @property
    def extents(self) -> tuple[int, int, int, int]:
        """Sizes that the kernels take as numbers: tokens, chunks, heads, and heads per group."""
        return self.length, self.chunks, self.heads, self.heads // self.groups

    @property
    def columns(self) -> int:
        """Columns of the state per program of ``chunk_walk``; with fewer columns, inputs are read more often."""
        many = self.rows * self.heads * self.size // 64 >= _ENOUGH
        return min(self.size, 64 if many else 32)

    @property
    def tile(self) -> dict[str, int]:
        """Compile-time constants of the kernels."""
        return {"Q": self.Q, "P": self.width, "N": self.size}

    def launch(self, warps: int) -> dict[str, int]:
        """Return a kernel's launch options."""
        return {"num_warps": warps, "num_stages": self.ahead}

    @classmethod
    def of(cls, x_BSHP: Tensor, B_BSGN: Tensor) -> ScanSizes | None:
        """Derive the sizes from the inputs; None if there is no kernel for them."""
        rows, length, heads, width = x_BSHP.shape
        groups, size = B_BSGN.shape[2:]
        if x_BSHP.dtype == torch.float64 or width not in WIDTHS or size not in STATES:
            return None
        fitting = tiles(x_BSHP.dtype.itemsize, width, size, _fast_memory(x_BSHP.device))
        if fitting is None:
            return None
        shared = heads // groups
        blocks = next(n for n in range(1, shared + 1) if shared % n == 0 and shared // n <= _MOST_HEADS)
        return cls(rows, length, heads, groups, width, size, *fitting, blocks)
