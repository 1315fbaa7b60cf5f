"""Initial values that depend only on the seed and on each parameter's full name and global shape.

Values are drawn in blocks of 1024 rows with one generator per block. So a rank can draw the rows it owns without the
other rows, and every layout starts from the same model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers import mixer_of
from fusiontree.models.model import FusionTreeModel
from fusiontree.utils.hashing import stable_hash

ROWS_PER_BLOCK = 1024

_GATE_UP = re.compile(r"layers\.\d+\.gate\.up\.weight")
_RESIDUAL_OUTPUT = re.compile(r"layers\.\d+\.(out_proj|mlp\.down)\.weight")
_NORMS = ("norm", "branch_norm")


def no_weight_decay(name: str, config: ModelConfig) -> bool:
    """Return True for norms, biases and the parameters that a mixer leaves out (:attr:`Mixer.no_decay`).

    Decides by name, not by shape: engines shard parameters.
    """
    *_, module, leaf = ("", *name.split("."))
    owner = mixer_of(name, config)
    return leaf == "bias" or module in _NORMS or (owner is not None and owner[1] in owner[0].no_decay)


def initialize_parameter(
    name: str,
    shape: Sequence[int],
    config: ModelConfig,
    seed: int,
    rows: slice | None = None,
) -> Tensor:
    """Return a parameter's initial values in fp32 on the CPU.

    Matrices are normal with standard deviation ``initializer_range``, divided by sqrt(2 num_layers) where they write
    to the residual stream (``out_proj`` and ``mlp.down`` of a block; :attr:`Mixer.output_projection` if ``branch_mix``
    is gated_sum or sum). The gate's ``up`` is zero, so gates start at 0.5. Norms are one, biases zero. Mixers can have
    other rules (:meth:`Mixer.initial_values`).

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
    owner = mixer_of(name, config)
    values = owner[0].initial_values(owner[1], shape, config, generator) if owner else None
    if values is not None:
        return values
    if module in _NORMS:
        return torch.ones(shape)
    if leaf == "bias" or _GATE_UP.fullmatch(name):
        return torch.zeros(shape)
    std = config.initializer_range
    is_output = owner is not None and owner[1] == f"{owner[0].output_projection}.weight"
    if _RESIDUAL_OUTPUT.fullmatch(name) or (is_output and not config.projects_mix):
        std /= math.sqrt(2 * config.num_layers)
    return torch.empty(shape).normal_(0.0, std, generator=generator)
