"""Metrics that each layer computes of its branches' outputs. docs/extend/metric.md shows how to add one.

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fusiontree.utils.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LayerMetric:
    """A metric with one list of values per field in metrics.jsonl, ordered by layer."""

    row_sums: Callable[[dict[str, Tensor], Tensor | None], dict[str, Tensor]]
    """Returns sums over each row's tokens and channels, ``[B]`` by field.

    Called without gradients in every layer, with the branches' outputs ``[B, S, C]`` by mixer and with the tokens that
    count, bool ``[B, S]`` (None: all). Under tensor and context parallelism a rank has a part of each row's tokens;
    the sums are added over the ranks.
    """
    values: Callable[[dict[str, float]], dict[str, float]]
    """Returns the values of a layer from the means of its sums per token and channel over the global batch. A field
    that a layer does not have is 0."""


LAYER_METRICS: Registry[LayerMetric] = Registry("layer metric")
"""Metrics that ``logging.layer_metrics`` may name."""


def layer_metric_sums(
    names: tuple[str, ...], branches_BSC: dict[str, Tensor], counted_BS: Tensor | None
) -> dict[str, Tensor]:
    """Return the sums of the named metrics as ``{"metric.field": [B]}`` in fp32.

    Raises:
        UserError: a metric is not registered.
    """
    return {
        f"{name}.{field}": total.float()
        for name in names
        for field, total in LAYER_METRICS.get(name).row_sums(branches_BSC, counted_BS).items()
    }


def layer_metric_values(name: str, means_L: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the values of a metric per layer.

    Args:
        name: the metric.
        means_L: means per token and channel, by ``metric.field``; those of other metrics are left out.
    """
    fields = {key.removeprefix(f"{name}."): mean_L for key, mean_L in means_L.items() if key.startswith(f"{name}.")}
    layers = zip(*fields.values(), strict=True)
    values = [LAYER_METRICS.get(name).values(dict(zip(fields, layer, strict=True))) for layer in layers]
    return {field: [layer[field] for layer in values] for field in values[0]}
