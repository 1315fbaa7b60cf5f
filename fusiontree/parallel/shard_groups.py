"""Which parts of the model are materialised and sharded together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fusiontree.models.config import ModelConfig
from fusiontree.models.initialization import initialize_parameter, no_weight_decay
from fusiontree.models.mamba import SSMParameters
from fusiontree.models.model import FusionTreeModel
from fusiontree.parallel.context_parallel import apply_context_parallel
from fusiontree.parallel.global_tensor import ShardSpec
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.tensor_parallel import SelectedConv, SelectedLinear, apply_tensor_parallel

__all__ = [
    "DistributedModel",
    "ShardGroup",
    "build_model",
    "materializer",
    "no_weight_decay",
    "shard_groups_leaves_first",
]


@dataclass(frozen=True)
class ShardGroup:
    """Parameters that an engine shards as one group."""

    modules: tuple[nn.Module, ...]
    """What owns them; more than one where a parameter is tied."""
    prefixes: tuple[str, ...]
    """Names of the modules in the model; empty for the root."""
    keep_fp32: bool = False
    """True where the forward sees fp32 parameters whatever the precision: the state space's A, D and dt, which must,
    and the root's last norm, which costs nothing."""
    tp_split: bool = False
    """True where tensor parallel ranks hold different parts: the group is sharded over dp x cp, not over all ranks."""

    @property
    def is_root(self) -> bool:
        """True for what is left of the model when its blocks are taken out."""
        return self.prefixes == ("",)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield its parameters by their names in the model, those of inner groups too."""
        for prefix, module in zip(self.prefixes, self.modules, strict=True):
            yield from module.named_parameters(prefix=prefix)


@dataclass(frozen=True)
class DistributedModel:
    """A model cut to this rank's part, on the meta device."""

    module: FusionTreeModel
    specs: dict[str, ShardSpec]
    """What this rank holds of each parameter, by name."""


def build_model(config: ModelConfig, layout: Layout) -> DistributedModel:
    """Return this rank's part of the model on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        model = FusionTreeModel(config)
    specs = apply_tensor_parallel(model, layout)
    apply_context_parallel(model, layout)
    return DistributedModel(model, specs)


def shard_groups_leaves_first(model: DistributedModel) -> Iterator[list[ShardGroup]]:
    """Yield the model's groups block by block, inner groups before outer, the root (with the last norm) last.

    A caller that materialises and shards one list before it asks for the next never holds a whole model. The last group
    of a list contains the others.
    """
    split = {name for name, spec in model.specs.items() if spec.is_split}
    for index, block in enumerate(model.module.layers):
        prefix = f"layers.{index}"
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


def _inner_groups(block: nn.Module, prefix: str, split: set[str]) -> Iterator[ShardGroup]:
    """Yield what of a block cannot be in one group with the rest of it."""

    def is_split(name: str, module: nn.Module) -> bool:
        return any(f"{prefix}.{name}.{leaf}" in split for leaf, _ in module.named_parameters())

    named = dict(block.named_modules())
    for name, module in named.items():
        if isinstance(module, SSMParameters):
            yield ShardGroup((module,), (f"{prefix}.{name}",), keep_fp32=True, tp_split=is_split(name, module))
    if not split:
        return
    for name, module in named.items():
        if isinstance(module, SelectedLinear | SelectedConv):
            yield ShardGroup((module,), (f"{prefix}.{name}",))
    for name in ("mamba", "attention"):
        if name in named:
            yield ShardGroup((named[name],), (f"{prefix}.{name}",), tp_split=True)


def materializer(
    config: ModelConfig, seed: int, device: torch.device, specs: dict[str, ShardSpec]
) -> Callable[[ShardGroup], None]:
    """Return the function that gives a group's parameters memory on ``device`` and their initial values."""
    return partial(materialize, config=config, seed=seed, device=device, specs=specs)


def materialize(
    group: ShardGroup, config: ModelConfig, seed: int, device: torch.device, specs: dict[str, ShardSpec]
) -> None:
    """Give the group's meta parameters memory on ``device`` and this rank's part of their initial values, in fp32.

    The values depend on the seed and each parameter's full name alone, so they are the same in every layout.
    Parameters that already have memory (an inner group's) are left as they are.
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
                    done[parameter].__dict__.update(parameter.__dict__)  # tags of the tensor parallel plan
                setattr(module, name, done[parameter])
        assert not any(b.is_meta for b in owner.buffers()), "buffers must be made on first use, not at construction"


def initial_part(name: str, spec: ShardSpec, config: ModelConfig, seed: int) -> torch.Tensor:
    """Return the initial values of the part of a parameter that ``spec`` names, in fp32 on the CPU."""
    if spec.axis == 0:
        rows = [initialize_parameter(name, spec.global_shape, config, seed, slice(*span)) for span in spec.ranges]
        return torch.cat(rows)
    return spec.cut(initialize_parameter(name, spec.global_shape, config, seed))
