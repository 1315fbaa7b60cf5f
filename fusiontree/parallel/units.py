"""Which parts of the model are materialised, sharded and recomputed together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fusiontree.models.config import ModelConfig
from fusiontree.models.initialization import initialize_parameter, no_weight_decay
from fusiontree.models.mamba import SSMParameters
from fusiontree.models.model import FusionTreeModel

__all__ = ["Unit", "build_model", "checkpoint_activations", "materializer", "no_weight_decay", "units_inside_out"]


@dataclass(frozen=True)
class Unit:
    """Parameters that an engine shards as one group."""

    name: str
    """Prefix of its parameters' names in the model; empty for the root."""
    module: nn.Module
    keep_fp32: bool
    """True where the forward must see fp32 parameters whatever the precision (the state space's A, D and dt)."""


def build_model(config: ModelConfig) -> FusionTreeModel:
    """Return the model on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        return FusionTreeModel(config)


def units_inside_out(model: FusionTreeModel) -> Iterator[list[Unit]]:
    """Yield the model's units block by block, inner units before outer, the root (embedding, head, norms) last.

    A caller that materialises and shards one list before it asks for the next never holds a whole model.
    """
    for index, block in enumerate(model.layers):
        prefix = f"layers.{index}"
        inner = [
            Unit(f"{prefix}.{name}", module, keep_fp32=True)
            for name, module in block.named_modules()
            if isinstance(module, SSMParameters)
        ]
        yield [*inner, Unit(prefix, block, keep_fp32=False)]
    yield [Unit("", model, keep_fp32=False)]


def materializer(config: ModelConfig, seed: int, device: torch.device) -> Callable[[Unit], None]:
    """Return the function that gives a unit's parameters memory on ``device`` and their initial values."""
    return partial(materialize, config=config, seed=seed, device=device)


def materialize(unit: Unit, config: ModelConfig, seed: int, device: torch.device) -> None:
    """Give the unit's meta parameters memory on ``device`` and their initial values, in fp32.

    The values depend on the seed and each parameter's full name alone, so they are the same in every layout.
    Parameters that already have memory (an inner unit's) are left as they are.
    """
    done: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one parameter
    for module_name, module in unit.module.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.is_meta:
                continue
            if parameter not in done:
                full_name = ".".join(part for part in (unit.name, module_name, name) if part)
                values = initialize_parameter(full_name, parameter.shape, config, seed)
                done[parameter] = nn.Parameter(values.to(device), requires_grad=parameter.requires_grad)
            setattr(module, name, done[parameter])
    assert not any(b.is_meta for b in unit.module.buffers()), "buffers must be made on first use, not at construction"


def checkpoint_activations(model: FusionTreeModel, mode: str, layers: int | None = None) -> None:
    """Recompute blocks in the backward pass: mode none | selective | full.

    selective keeps what is dear to compute, the results of matrix products and of global attention, and recomputes
    what lies between. ``layers`` limits it to the first so many (None: all).

    ``forward`` is wrapped, not the module, so parameter names stay. Nothing in a block draws random numbers (branch
    dropout is an input), so there is no RNG state to replay.
    """
    if mode == "none":
        return
    assert mode in ("full", "selective"), mode
    keep: dict[str, Any] = {}
    if mode == "selective":
        keep["context_fn"] = partial(create_selective_checkpoint_contexts, _kept)
    for block in model.layers[:layers]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **keep)


_ATEN = torch.ops.aten
_KEPT = {
    _ATEN.mm.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}


def _kept(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
