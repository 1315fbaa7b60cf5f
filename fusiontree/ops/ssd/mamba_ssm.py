"""The scan by mamba_ssm's Triton kernels (CUDA). The first call tunes them for one to two minutes."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from fusiontree.ops.documents import Documents

_INT32 = 2**31


def unavailable(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``, or None."""
    if device.type != "cuda":
        return "its kernels need a GPU"
    missing = [name for name in ("mamba_ssm", "triton", "einops") if find_spec(name) is None]
    return f"{', '.join(missing)} is not installed (pip install 'fusiontree[cuda]')" if missing else None


def ssd_mamba_ssm(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor,
    *,
    chunk_size: int,
    documents: Documents | None = None,
    initial_state_BHPN: Tensor | None = None,
    state_exchange: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.ssd.ssd_scan`.

    Raises:
        ValueError: a row so long that the kernels' 32-bit offsets would overflow (they do so silently), or
            ``state_exchange``, for which the kernels have no place.
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    if state_exchange is not None:
        raise ValueError(
            "kernels.ssd=mamba_ssm cannot pass states between ranks; use kernels.ssd=reference under cp > 1"
        )
    rows, length, heads, width = x_BSHP.shape
    size = B_BSGN.shape[-1]
    states = rows * -(-length // chunk_size) * heads * width * size
    largest = max(states, *(t.stride(0) * (rows - 1) + t.stride(1) * length for t in (x_BSHP, B_BSGN, C_BSGN)))
    if largest >= _INT32:
        raise ValueError(
            f"rows of {length} tokens need offsets of {largest} elements, beyond the 32 bits of mamba_ssm's kernels; "
            f"use shorter rows, fewer rows a micro batch, or kernels.ssd=reference"
        )
    # Segment 0 continues the initial state, which is what the kernels take a first seq_idx of 0 to mean.
    seq_idx = None if documents is None or documents.whole_rows else documents.segments_BS
    initial = initial_state_BHPN
    if initial is not None and documents is not None and documents.whole_rows:
        initial = None  # every row begins with a document of its own
    y_BSHP, final_BHPN = mamba_chunk_scan_combined(
        x_BSHP,
        dt_BSH.float(),
        A_H.float(),
        B_BSGN,
        C_BSGN,
        chunk_size=_power_of_two(chunk_size),
        D=D_H.float(),
        initial_states=initial,
        seq_idx=seq_idx,
        return_final_states=True,
    )
    return y_BSHP, final_BHPN.float()


def _power_of_two(chunk_size: int) -> int:
    """The kernels' chunks are powers of two of 16 at least; padding costs nothing in the result."""
    return max(16, 1 << (chunk_size - 1).bit_length())
