"""Shard groups: the parameters that are materialized and sharded together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fusiontree.models.block import FusionBlock
from fusiontree.models.config import ModelConfig
from fusiontree.models.initialization import initialize_parameter
from fusiontree.models.mixers.base import Fp32Parameters
from fusiontree.models.model import FusionTreeModel
from fusiontree.parallel.context_parallel import apply_context_parallel
from fusiontree.parallel.global_tensor import ShardSpec
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.tensor_parallel import SelectedConv, SelectedLinear, apply_tensor_parallel


@dataclass(frozen=True)
class ShardGroup:
    """Parameters that an engine shards as one group."""

    modules: tuple[nn.Module, ...]
    """Modules that own the parameters; several if a parameter is tied."""
    prefixes: tuple[str, ...]
    """Names of the modules in the model; empty for the root."""
    keep_fp32: bool = False
    """Keep these parameters in fp32 in mixed precision: :class:`Fp32Parameters` of mixers (required for accuracy) and
    the final norm (free)."""
    tp_split: bool = False
    """True if tensor parallel ranks hold different shards: the group is sharded over dp x cp, not over all ranks."""

    @property
    def is_root(self) -> bool:
        """True for the group of the model itself, which holds the parameters outside all other groups."""
        return self.prefixes == ("",)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield parameters with their names in the model, including those of inner groups."""
        for prefix, module in zip(self.prefixes, self.modules, strict=True):
            yield from module.named_parameters(prefix=prefix)


@dataclass(frozen=True)
class DistributedModel:
    """This rank's part of a model, on the meta device."""

    module: FusionTreeModel
    specs: dict[str, ShardSpec]
    """This rank's shard of each parameter, by parameter name."""


def build_model(config: ModelConfig, layout: Layout) -> DistributedModel:
    """Return this rank's part of the model on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        model = FusionTreeModel(config)
    specs = apply_tensor_parallel(model, layout)
    apply_context_parallel(model, layout)
    return DistributedModel(model, specs)


def shard_groups_leaves_first(model: DistributedModel) -> Iterator[list[ShardGroup]]:
    """Yield the shard groups of each block, inner groups before outer; then those of the root (with the final norm).

    The last group of each list contains the groups before it in the list. A caller that materializes and shards one
    list before it requests the next never holds the full model.
    """
    split = {name for name, spec in model.specs.items() if spec.is_split}
    for index, block in enumerate(model.module.layers):
        prefix = f"layers.{index}"
        assert isinstance(block, FusionBlock)
        yield [*_inner_groups(block, prefix, split), ShardGroup((block,), (prefix,))]
    root = model.module
    cut = bool(split)  # the vocabulary
    if root.config.tie_word_embeddings:
        ends = [ShardGroup((root.embed, root.head), ("embed", "head"), tp_split=cut)]
    else:
        ends = [ShardGroup((root.embed,), ("embed",), tp_split=cut), ShardGroup((root.head,), ("head",), tp_split=cut)]
    if root.srte.kind == "learnable":
        ends.append(ShardGroup((root.srte,), ("srte",)))
    yield [*ends, ShardGroup((root,), ("",), keep_fp32=True)]


def _inner_groups(block: FusionBlock, prefix: str, split: set[str]) -> Iterator[ShardGroup]:
    """Yield the groups inside a block that differ from it in precision or in tensor parallel splitting."""

    def is_split(name: str, module: nn.Module) -> bool:
        return any(f"{prefix}.{name}.{leaf}" in split for leaf, _ in module.named_parameters())

    named = dict(block.named_modules())
    for name, module in named.items():
        if isinstance(module, Fp32Parameters):
            yield ShardGroup((module,), (f"{prefix}.{name}",), keep_fp32=True, tp_split=is_split(name, module))
    if not split:
        return
    for name, module in named.items():
        if isinstance(module, SelectedLinear | SelectedConv):
            yield ShardGroup((module,), (f"{prefix}.{name}",))
    for name, mixer in block.mixers().items():
        yield ShardGroup((mixer,), (f"{prefix}.{name}",), tp_split=True)


def materializer(
    config: ModelConfig, seed: int, device: torch.device, specs: dict[str, ShardSpec]
) -> Callable[[ShardGroup], None]:
    """Return a function that allocates a group's parameters on ``device`` and initializes them."""
    return partial(materialize, config=config, seed=seed, device=device, specs=specs)


def materialize(
    group: ShardGroup, config: ModelConfig, seed: int, device: torch.device, specs: dict[str, ShardSpec]
) -> None:
    """Allocate the group's meta parameters on ``device`` and set this rank's shard of their initial values, in fp32.

    The values depend only on the seed and each parameter's full name and shape, so they are the same in every layout.
    Parameters that are already allocated (those of inner groups) do not change.
    """
    done: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one parameter
    for prefix, owner in zip(group.prefixes, group.modules, strict=True):
        for module_name, module in owner.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.is_meta:
                    continue
                if parameter not in done:
                    full_name = ".".join(part for part in (prefix, module_name, name) if part)
                    values = initial_part(full_name, specs[full_name], config, seed)
                    done[parameter] = nn.Parameter(values.to(device), requires_grad=parameter.requires_grad)
                    done[parameter].__dict__.update(parameter.__dict__)  # attributes set by the tensor parallel plan
                setattr(module, name, done[parameter])
        assert not any(b.is_meta for b in owner.buffers()), "buffers must be made on first use, not at construction"


def initial_part(name: str, spec: ShardSpec, config: ModelConfig, seed: int) -> torch.Tensor:
    """Return the initial values of the shard of a parameter that ``spec`` describes, in fp32 on the CPU."""
    if spec.axis == 0:
        rows = [initialize_parameter(name, spec.global_shape, config, seed, slice(*span)) for span in spec.ranges]
        return torch.cat(rows)
    return spec.cut(initialize_parameter(name, spec.global_shape, config, seed))
