"""Rotary encoding in plain PyTorch. Shape legend: B rows, S tokens, H heads, D channels of a head."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions_BS: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [B, S, D/2] in fp32 of position x theta^(-2i/D).

    The angles are computed in float64: at position 131,072 fp32 would be off by 1e-2 rad.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_BS.device) / head_dim
    angles_BSD = positions_BS.unsqueeze(-1).double() * theta**-exponent
    return angles_BSD.cos().float(), angles_BSD.sin().float()


def apply_rotary(x_BSHD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    """Rotate channels i and i + D/2 by the tables' angles, in fp32 or better; returns the dtype of ``x``."""
    compute = torch.promote_types(x_BSHD.dtype, torch.float32)
    first, second = x_BSHD.to(compute).chunk(2, dim=-1)
    cos, sin = cos_BSD.unsqueeze(2).to(compute), sin_BSD.unsqueeze(2).to(compute)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x_BSHD.dtype)


def rotate_and_cut(
    q_BSHD: Tensor, k_BSKD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, first: tuple[int, int]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Rotate queries and keys; return the ``first`` heads and the remaining heads of each as separate tensors."""
    q_first, q_rest = q_BSHD.split([first[0], q_BSHD.shape[2] - first[0]], dim=2)
    k_first, k_rest = k_BSKD.split([first[1], k_BSKD.shape[2] - first[1]], dim=2)
    queries = apply_rotary(q_first, cos_BSD, sin_BSD), apply_rotary(q_rest, cos_BSD, sin_BSD)
    return queries, (apply_rotary(k_first, cos_BSD, sin_BSD), apply_rotary(k_rest, cos_BSD, sin_BSD))


def rotate_back(
    q_first: Tensor, q_rest: Tensor, k_first: Tensor, k_rest: Tensor, cos_BSD: Tensor, sin_BSD: Tensor
) -> tuple[Tensor, Tensor]:
    """Invert :func:`rotate_and_cut`: rotate back and concatenate. A rotation's inverse is also its gradient."""
    q_BSHD = torch.cat([apply_rotary(q_first, cos_BSD, -sin_BSD), apply_rotary(q_rest, cos_BSD, -sin_BSD)], dim=2)
    k_BSKD = torch.cat([apply_rotary(k_first, cos_BSD, -sin_BSD), apply_rotary(k_rest, cos_BSD, -sin_BSD)], dim=2)
    return q_BSHD, k_BSKD
