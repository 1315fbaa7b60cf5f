"""A picture of a run: losses, gates, throughput and learning rate over optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.tracking.curves import COLORS, RunCurves, read_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLORS["mark"],
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def plot_run(run_dir: Path, output: Path, references: dict[str, float] | None = None) -> None:
    """Draw losses, mean gate per layer, throughput and learning rate.

    Args:
        run_dir: folder of the run.
        output: PNG file to write.
        references: named loss levels to draw as dashed lines, in nats per token.

    Raises:
        ValueError: the run has logged no step.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = read_curves(run_dir)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(11, 7), width_ratios=(1.35, 1), constrained_layout=True)
        (loss_axes, gate_axes), (speed_axes, rate_axes) = axes
        _draw_loss(loss_axes, curves, references or {})
        _draw_gates(figure, gate_axes, curves)
        _draw_speed(speed_axes, curves)
        rate_axes.plot(curves.step_N, curves.lr_N, color=COLORS["lr"], linewidth=2)
        rate_axes.set(title="Learning rate", xlabel="optimizer step", ylim=(0, None))
        rate_axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        figure.savefig(output, dpi=130)
        plt.close(figure)


def _draw_loss(axes: Axes, curves: RunCurves, references: dict[str, float]) -> None:
    axes.plot(curves.step_N, curves.loss_N, color=COLORS["loss"], alpha=0.3, linewidth=0.8)
    axes.plot(curves.step_N, curves.smoothed_N, color=COLORS["loss"], linewidth=2, label="training, smoothed")
    if curves.validation_step_V:
        style: Any = {"color": COLORS["validation"], "marker": "o", "markersize": 4, "linewidth": 1.2}
        axes.plot(curves.validation_step_V, curves.validation_loss_V, label="validation", **style)
    for name, level in references.items():
        axes.axhline(level, linestyle="--", color=COLORS["mark"], linewidth=1)
        axes.annotate(f"{name} {level:.2f}", (curves.step_N[-1], level), ha="right", va="bottom", fontsize=10)
    axes.set(title="Loss", xlabel="optimizer step", ylabel="nats per token")
    axes.legend()


def _draw_gates(figure: Figure, axes: Axes, curves: RunCurves) -> None:
    """Draw the mean gate as a heat map: one row per layer, the first at the top."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator

    colors = LinearSegmentedColormap.from_list("gate", [COLORS["attention"], "#f7f7f7", COLORS["mamba"]])
    gate_LN = np.array(curves.gate_NL).T
    layers, reach = len(gate_LN), curves.gate_range
    step_N = np.array(curves.step_N, dtype=float)
    edges = np.concatenate([[step_N[0]], (step_N[1:] + step_N[:-1]) / 2, [step_N[-1] + (len(step_N) == 1)]])
    mesh = axes.pcolormesh(edges, np.arange(layers + 1) - 0.5, gate_LN, cmap=colors, vmin=0.5 - reach, vmax=0.5 + reach)
    axes.invert_yaxis()
    axes.grid(False)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title="Mean gate", xlabel="optimizer step", ylabel="layer")
    bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.03)
    bar.set_label("attention  ←  gate  →  recurrent branch")
    bar.outline.set_visible(False)


def _draw_speed(axes: Axes, curves: RunCurves) -> None:
    axes.plot(curves.step_N, [speed / 1e3 for speed in curves.tokens_per_s_N], color=COLORS["speed"], linewidth=1.2)
    for number, step in enumerate(curves.resumes):
        label = "resumed" if number == 0 else None
        axes.axvline(step, color=COLORS["mark"], linestyle=":", linewidth=1.2, label=label)
    axes.set(title="Throughput", xlabel="optimizer step", ylabel="1,000 tokens per second", ylim=(0, None))
    if curves.resumes:
        axes.legend(loc="lower right")
