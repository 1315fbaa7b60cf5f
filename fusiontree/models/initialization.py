"""Initial values that depend only on the seed and on each parameter's full name and global shape.

Values are drawn in blocks of 1024 rows with one generator per block. So a rank can draw the rows it owns without the
other rows, and every layout starts from the same model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fusiontree.models.config import ModelConfig
from fusiontree.models.model import FusionTreeModel
from fusiontree.utils.hashing import stable_hash

ROWS_PER_BLOCK = 1024

_RESIDUAL_OUTPUT = re.compile(r"layers\.\d+\.(out_proj|mlp\.down)\.weight")
_NO_DECAY = ("bias", "A_log", "D", "dt_bias")


def no_weight_decay(name: str, parameter: nn.Parameter | None = None) -> bool:
    """Return True for norms, biases and the state space's A_log, D and dt_bias.

    Decides by name, not by shape: engines may pass sharded parameters.
    """
    *_, module, leaf = ("", *name.split("."))
    return leaf in _NO_DECAY or module == "norm"


def initialize_parameter(
    name: str,
    shape: Sequence[int],
    config: ModelConfig,
    seed: int,
    rows: slice | None = None,
) -> Tensor:
    """Return a parameter's initial values in fp32 on the CPU.

    Matrices are normal with standard deviation ``initializer_range``, divided by sqrt(2 num_layers) where they write
    to the residual stream (``out_proj`` and ``mlp.down`` of a block). The gate's ``up`` is zero, so gates start at
    0.5. ``A_log`` is the logarithm of a uniform draw from ``mamba.A_init_range``, ``dt_bias`` the inverse softplus of
    a log-uniform draw from ``mamba.dt_init_range``, ``D`` and norms are one, biases zero, convolutions uniform
    within 1/sqrt(width).

    Args:
        name: full name in the model, such as ``layers.3.mamba.in_proj.weight``.
        shape: of the full parameter, not of a shard.
        config: of the model.
        seed: of the run.
        rows: range of dim 0 to return, step 1; None means all. A shard of another dim is a slice of the result.

    Raises:
        ValueError: ``rows`` is not a range within the parameter.
    """
    start, stop, step = (rows or slice(None)).indices(shape[0])
    if step != 1 or start > stop:
        raise ValueError(f"rows {rows} of {name} are not a range within its {shape[0]} rows")
    blocks = []
    for block in range(start // ROWS_PER_BLOCK, -(-stop // ROWS_PER_BLOCK)):
        first = block * ROWS_PER_BLOCK
        count = min(ROWS_PER_BLOCK, shape[0] - first)
        generator = torch.Generator().manual_seed(stable_hash(seed, name, *shape, block) >> 1)
        values = _draw(name, (count, *shape[1:]), config, generator)
        blocks.append(values[max(start - first, 0) : max(stop - first, 0)])
    return torch.cat(blocks) if blocks else torch.empty(0, *shape[1:])


@torch.no_grad()
def initialize_model(model: FusionTreeModel, seed: int) -> None:
    """Set every parameter to its initial value; the model must not be on the meta device."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initialize_parameter(name, parameter.shape, model.config, seed))


def _draw(name: str, shape: tuple[int, ...], config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Draw one block of rows."""
    *_, module, leaf = ("", *name.split("."))

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=generator)

    if leaf == "D" or module == "norm":
        return torch.ones(shape)
    if leaf == "bias" or name.endswith(".gate.up.weight"):
        return torch.zeros(shape)
    if leaf == "A_log":
        return uniform(*config.mamba.A_init_range).log().float()
    if leaf == "dt_bias":
        low, high = config.mamba.dt_init_range
        dt = uniform(math.log(low), math.log(high)).exp()
        return (dt + torch.log(-torch.expm1(-dt))).float()
    if module in ("conv_x", "conv_bc"):
        bound = config.mamba.d_conv**-0.5
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    std = config.initializer_range
    if _RESIDUAL_OUTPUT.fullmatch(name):
        std /= math.sqrt(2 * config.num_layers)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
