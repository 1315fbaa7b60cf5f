"""Measures what each part of a model contributes on held-out data: gates, activations, and the loss without it.

Shape legend: B rows, S tokens, C channels of a projection's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fusiontree.data.batch import MicroBatch
from fusiontree.models.config import ModelConfig
from fusiontree.models.model import FusionTreeModel
from fusiontree.parallel.batch_sharding import shard_inputs
from fusiontree.pruning.shapes import BRANCH_OF, mamba_heads_of

OUTPUT = {"attention": "attention.o_proj", "mamba2": "mamba.out_proj", "mlp": "mlp.down"}
"""The projection whose input channels belong to units, by mixer."""
MLP_BLOCKS = 8
"""Parts of an MLP whose removal is measured: its channels in the order of their contribution."""


@dataclass
class LayerStatistics:
    """What was measured in one layer."""

    gate: float = 0.5
    """Mean gate: weight of the first branch in the mix."""
    squares: dict[str, Tensor] = field(default_factory=dict)
    """Mean squares of the inputs of each of :data:`OUTPUT`, ``[C]`` in fp64 on the CPU."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Sum of the squared weights of each of these inputs, ``[C]`` in fp64 on the CPU."""
    norm_weight: Tensor | None = None
    """Weight of Mamba's gated norm, ``[C]`` in fp64 on the CPU."""

    def contribution(self, name: str, channels: Sequence[int]) -> float:
        """Return the root mean square that channels of an input add to the projection's output, as if independent."""
        at = torch.tensor(channels, dtype=torch.int64)
        return float((self.squares[name][at] * self.weights[name][at]).sum().sqrt())


Batches = Callable[[], Iterator[MicroBatch]]
"""Returns the held-out rows; the same at each call."""


def unit_channels(config: ModelConfig, kind: str, unit: int) -> list[int]:
    """Return the input channels of a unit in its output projection; ``config`` has the sizes of the layer."""
    if kind == "mlp":
        return [unit]
    if kind == "mamba":
        width, heads = config.mamba.head_dim, mamba_heads_of(config, [unit])
    else:
        width, size = config.attention_head_dim, config.num_heads // config.kv_heads
        first = (config.local_heads if kind == "global" else 0) + unit * size
        heads = list(range(first, first + size))
    return [head * width + channel for head in heads for channel in range(width)]


def output_of(kind: str) -> str:
    """Return the name in :data:`OUTPUT` of a kind of units."""
    return BRANCH_OF.get(kind, "mlp")


@torch.no_grad()
def mean_loss(model: FusionTreeModel, batches: Batches) -> float:
    """Return the mean cross entropy per token on the held-out rows."""
    device = model.embed.weight.device
    total, tokens = 0.0, 0
    for micro in batches():
        output = model(**shard_inputs(micro, None, (), None).to(device)._asdict())
        assert output.loss_sum is not None
        total += float(output.loss_sum)
        tokens += int((micro.labels_BS >= 0).sum())
    return total / max(1, tokens)


@torch.no_grad()
def measure_activations(model: FusionTreeModel, batches: Batches) -> list[LayerStatistics]:
    """Return gates and mean squares of each layer on the held-out rows."""
    found = [LayerStatistics() for _ in model.layers]
    handles = []
    sums: dict[tuple[int, str], Tensor] = {}
    counts: dict[tuple[int, str], int] = {}

    def watch(layer: int, name: str, module: nn.Linear) -> None:
        def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            x_NC = inputs[0].flatten(0, -2).double()
            sums[layer, name] = sums.get((layer, name), torch.zeros(())) + x_NC.square().sum(0).cpu()
            counts[layer, name] = counts.get((layer, name), 0) + len(x_NC)

        handles.append(module.register_forward_pre_hook(note))
        found[layer].weights[name] = module.weight.double().square().sum(0).cpu()

    for layer, _ in enumerate(model.layers):
        for name, module in _outputs(model, layer):
            watch(layer, name, module)
        mixers: Any = model.layers[layer].mixers()  # type: ignore[operator]
        if "mamba" in mixers:
            found[layer].norm_weight = mixers["mamba"].norm.weight.double().cpu()
    device = model.embed.weight.device
    gates, elements = torch.zeros(len(found)), 0.0
    try:
        for micro in batches():
            sums_LB, count_B = model(**shard_inputs(micro, None, (), None).to(device)._asdict()).layer_sums
            gates += sums_LB["gate"].sum(1).cpu()
            elements += float(count_B.sum())
    finally:
        for handle in handles:
            handle.remove()
    for layer, statistics in enumerate(found):
        statistics.gate = float(gates[layer]) / max(1.0, elements)
        statistics.squares = {name: sums[at, name] / counts[at, name] for at, name in sums if at == layer}
    return found


def _outputs(model: FusionTreeModel, layer: int) -> Iterator[tuple[str, nn.Linear]]:
    names: dict[str, Any] = dict(model.layers[layer].named_modules())
    for name, path in OUTPUT.items():
        if path in names:
            yield name, names[path]


@contextmanager
def without_channels(model: FusionTreeModel, layer: int, name: str, channels: Sequence[int]) -> Iterator[None]:
    """Compute as if the given input channels of an output projection did not exist."""
    module = dict(_outputs(model, layer))[name]
    keep_C = torch.ones(module.in_features, device=module.weight.device)
    keep_C[torch.tensor(channels, dtype=torch.int64)] = 0.0
    handle = module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * keep_C.to(inputs[0].dtype),))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def without_branch(model: FusionTreeModel, layer: int, mixer: str) -> Iterator[None]:
    """Compute as if the output of a branch were zero: what a layer without the branch computes."""
    block: Any = model.layers[layer]
    (module,) = [module for module in block.mixers().values() if module.name == mixer]
    handle = module.register_forward_hook(lambda _, inputs, output: torch.zeros_like(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def without_layer(model: FusionTreeModel, layer: int) -> Iterator[None]:
    """Compute as if a layer did not exist."""
    handle = model.layers[layer].register_forward_hook(lambda _, inputs, output: (inputs[0], output[1]))
    try:
        yield
    finally:
        handle.remove()


def mlp_blocks(statistics: LayerStatistics) -> list[list[int]]:
    """Return the channels of an MLP in parts of about equal size, those that contribute least first."""
    order = (statistics.squares["mlp"] * statistics.weights["mlp"]).argsort().tolist()
    count = min(MLP_BLOCKS, len(order))
    edges = [len(order) * part // count for part in range(count + 1)]
    return [sorted(order[start:stop]) for start, stop in pairwise(edges)]


def norm_scale(config: ModelConfig, statistics: LayerStatistics, units: Sequence[int]) -> Tensor:
    """Return the factor of each kept channel of Mamba's gated norm that keeps its mean output.

    The norm divides by the root mean square of its group's channels, from which the removed channels are missing.

    Args:
        config: with the sizes of the layer.
        statistics: of the layer; the norm's outputs are the inputs of ``out_proj``.
        units: kept units.
    """
    sizes, width = config.mamba, config.mamba.head_dim
    heads = mamba_heads_of(config, units)
    at = torch.tensor([head * width + channel for head in heads for channel in range(width)])
    groups = at * sizes.norm_groups // config.d_inner
    scale = torch.ones(len(at), dtype=torch.float64)
    assert statistics.norm_weight is not None
    normed_C = statistics.squares["mamba2"] / statistics.norm_weight.square().clamp(min=1e-12)
    for group in groups.unique().tolist():
        mine = groups == group
        first, last = (config.d_inner * edge // sizes.norm_groups for edge in (group, group + 1))
        full, kept = normed_C[first:last].mean(), normed_C[at[mine]].mean()
        scale[mine] = float((kept / full).sqrt()) if float(full) > 0 and float(kept) > 0 else 1.0
    return scale.float()
