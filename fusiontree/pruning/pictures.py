"""A picture of an analysis: gates, and the loss that each removal costs, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fusiontree.pruning.analysis import Analysis
from fusiontree.tracking.curves import COLORS
from fusiontree.tracking.plots import STYLE

_COLUMNS = ("whole layer", "branch mamba2", "branch attention", "local heads", "global heads", "state space", "MLP")
_UNITS = {"local": 3, "global": 4, "mamba": 5, "mlp": 6}


def plot_analysis(analysis: Analysis, output: Path) -> None:
    """Draw mean gates and, for each layer, the loss without its parts (of units: the mean over one kind) as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    from matplotlib.colors import SymLogNorm

    layers = len(analysis.statistics)
    losses: list[list[list[float]]] = [[[] for _ in _COLUMNS] for _ in range(layers)]
    for part in analysis.parts:
        column = _UNITS.get(part.kind)
        if column is None:
            column = _COLUMNS.index(part.name) if part.name in _COLUMNS else None
        if column is not None:
            losses[part.layer][column].append(part.loss)
    grid = np.array([[np.mean(cell) if cell else np.nan for cell in row] for row in losses])
    most = max(1e-4, float(np.nanmax(np.abs(grid)))) if np.isfinite(grid).any() else 1.0
    style: Any = {"norm": SymLogNorm(most / 1000, vmin=-most, vmax=most), "cmap": "RdBu_r", "aspect": "auto"}
    with plt.rc_context(STYLE):
        figure, (gate_axes, axes) = plt.subplots(
            1, 2, figsize=(11, max(3.0, 0.3 * layers + 2)), width_ratios=(1, 2.2), constrained_layout=True
        )
        gate_axes.barh(range(layers), [s.gate for s in analysis.statistics], color=COLORS["mamba"])
        gate_axes.axvline(0.5, color=COLORS["mark"], linewidth=1, linestyle="--")
        gate_axes.set(title="Mean gate", xlabel="weight of the first branch", ylabel="layer", xlim=(0, 1))
        gate_axes.set_ylim(layers - 0.5, -0.5)
        image = axes.imshow(grid, **style)
        axes.grid(False)
        axes.set(title="Loss without the part", ylabel="layer")
        axes.set_xticks(range(len(_COLUMNS)), _COLUMNS, rotation=30, ha="right")
        figure.colorbar(image, ax=axes, label="nats per token; of units, the mean of one")
        figure.savefig(output, dpi=130)
        plt.close(figure)
