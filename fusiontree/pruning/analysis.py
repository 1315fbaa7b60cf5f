"""Ranks the parts of a model by the loss that the removal of each costs alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from fusiontree.models.config import ModelConfig
from fusiontree.models.model import FusionTreeModel
from fusiontree.pruning.shapes import BRANCH_OF, unit_counts
from fusiontree.pruning.statistics import (
    Batches,
    LayerStatistics,
    mean_loss,
    measure_activations,
    mlp_blocks,
    output_of,
    unit_channels,
    without_branch,
    without_channels,
    without_layer,
)


class Part(NamedTuple):
    """A removable part of a model."""

    layer: int
    kind: str
    """``layer``, ``branch``, or a kind of units (:data:`fusiontree.pruning.shapes.KINDS`)."""
    mixer: str
    """Mixer of a branch; empty for other kinds."""
    units: tuple[int, ...]
    """Units that are removed together: one head, one group, or an eighth of an MLP's channels."""
    loss: float
    """Nats per token by which the loss grows without the part."""
    contribution: float
    """Root mean square of what the part adds to its projection's output; 0 for layers and branches."""

    @property
    def name(self) -> str:
        """Name in tables."""
        if self.kind == "layer":
            return "whole layer"
        if self.kind == "branch":
            return f"branch {self.mixer}"
        if self.kind == "mlp":
            return f"{len(self.units)} MLP channels"
        what = {"local": "local head", "global": "global head", "mamba": "state space unit"}[self.kind]
        return f"{what} {self.units[0]}"


class Analysis(NamedTuple):
    """What was measured in a model."""

    loss: float
    """Mean cross entropy per token of the full model, in nats."""
    parts: list[Part]
    statistics: list[LayerStatistics]

    def ranked(self) -> list[Part]:
        """Return the parts, the cheapest removal first."""
        return sorted(self.parts, key=lambda part: part.loss)

    def values(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "loss": self.loss,
            "gates": [statistics.gate for statistics in self.statistics],
            "parts": [part._asdict() | {"units": list(part.units)} for part in self.ranked()],
        }


def analyze(model: FusionTreeModel, batches: Batches, report: Callable[[int, int], None]) -> Analysis:
    """Measure the full model and the model without each part.

    Args:
        model: on one device, in evaluation mode.
        batches: held-out rows.
        report: called with the number of parts measured and their total.
    """
    statistics = measure_activations(model, batches)
    loss = mean_loss(model, batches)
    found = list(candidates(model.config, statistics))
    parts = []
    for index, part in enumerate(found):
        with _without(model, part):
            parts.append(part._replace(loss=mean_loss(model, batches) - loss))
        report(index + 1, len(found))
    return Analysis(loss, parts, statistics)


def candidates(config: ModelConfig, statistics: list[LayerStatistics]) -> Iterator[Part]:
    """Yield every part that can be removed, its loss not yet measured."""
    for layer, names in enumerate(config.branches):
        counts, sized = unit_counts(config, layer), config.of_layer(layer)
        if config.num_layers > 1:
            yield Part(layer, "layer", "", (), 0.0, 0.0)
        if len(names) > 1:
            yield from (Part(layer, "branch", name, (), 0.0, 0.0) for name in names)
        for kind in ("local", "global", "mamba"):
            others = counts["local"] + counts["global"] if kind != "mamba" else counts["mamba"]
            for unit in range(counts[kind]) if others > 1 else ():
                added = statistics[layer].contribution(BRANCH_OF[kind], unit_channels(sized, kind, unit))
                yield Part(layer, kind, "", (unit,), 0.0, added)
        blocks = mlp_blocks(statistics[layer])
        for channels in blocks if len(blocks) > 1 else ():
            yield Part(layer, "mlp", "", tuple(channels), 0.0, statistics[layer].contribution("mlp", channels))


def _without(model: FusionTreeModel, part: Part) -> AbstractContextManager[None]:
    if part.kind == "layer":
        return without_layer(model, part.layer)
    if part.kind == "branch":
        return without_branch(model, part.layer, part.mixer)
    sized = model.config.of_layer(part.layer)
    channels = [channel for unit in part.units for channel in unit_channels(sized, part.kind, unit)]
    return without_channels(model, part.layer, output_of(part.kind), channels)
