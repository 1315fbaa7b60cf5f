"""No accidental quadratic: what a token costs in the Mamba branch and in local heads does not grow with the row.

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fusiontree.models.mixers.attention import LocalGlobalAttention
from fusiontree.models.mixers.base import MixerInputs
from fusiontree.models.mixers.mamba2 import Mamba2Mixer
from fusiontree.ops.rotary import rotary_tables
from tests.helpers import tiny_config, tiny_model

CONFIG = {
    "hidden_size": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "global_heads": 0,
    "window_size": 128,
    "mamba": {"head_dim": 16, "d_state": 16, "chunk_size": 64},
}


def mamba() -> Callable[[Tensor], Tensor]:
    mixer = tiny_model(num_layers=1, layer_pattern="M", **CONFIG).layers[0].mamba
    assert isinstance(mixer, Mamba2Mixer)
    return lambda u_BSC: mixer(u_BSC, MixerInputs())


def local_heads() -> Callable[[Tensor], Tensor]:
    heads = tiny_model(num_layers=1, layer_pattern="A", **CONFIG).layers[0].attention
    assert isinstance(heads, LocalGlobalAttention)
    head_dim = tiny_config(**CONFIG).attention_head_dim

    def run(u_BSC: Tensor) -> Tensor:
        cos_BSD, sin_BSD = rotary_tables(torch.arange(u_BSC.shape[1])[None], head_dim, 10000.0)
        return heads(u_BSC, MixerInputs(None, cos_BSD, sin_BSD))

    return run


def _sdpa_flops(q_shape: torch.Size, k_shape: torch.Size, *args: object, **kwargs: object) -> int:
    rows, heads, queries, channels = q_shape
    return 4 * rows * heads * queries * k_shape[2] * channels


# torch does not count attention on CPUs.
SDPA = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa_flops}


def train(part: Callable[[Tensor], Tensor], length: int) -> None:
    u_BSC = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    part(u_BSC).square().sum().backward()


class WrittenElements(TorchDispatchMode):
    """Counts the elements of all tensors that operations return: what copies and elementwise operations cost."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.count += sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


@pytest.mark.parametrize("make", [mamba, local_heads])
def test_operations_a_token(make: Callable[[], Callable[[Tensor], Tensor]]) -> None:
    """Counts, not times: they are the same on a busy machine."""
    part, operations, written = make(), [], []
    for length in (4096, 16384):
        with FlopCounterMode(display=False, custom_mapping=SDPA) as counter:
            train(part, length)
        operations.append(counter.get_total_flops() / length)
        with WrittenElements() as elements:
            train(part, length)
        written.append(elements.count / length)
    assert operations[0] > 0
    assert operations[1] <= 1.01 * operations[0], f"{operations} operations per token at 4,096 and 16,384 tokens"
    assert written[1] <= 1.01 * written[0], f"{written} elements written per token at 4,096 and 16,384 tokens"
