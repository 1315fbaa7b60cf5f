"""Pictures of a run from its metrics."""

from __future__ import annotations

from pathlib import Path

from fusiontree.tracking.console import clock
from fusiontree.tracking.goodput import Goodput
from fusiontree.tracking.records import read_records


def plot_run(run_dir: Path, output: Path, references: dict[str, float] | None = None) -> None:
    """Draw training and validation loss, and every layer's mean gate, over steps.

    Args:
        run_dir: folder of the run.
        output: PNG file to write.
        references: named levels of loss to draw as dashed lines, in nats a token.

    Raises:
        ValueError: the run has logged nothing yet.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = read_records(run_dir / "metrics.jsonl")
    train = [r for r in records if "loss" in r]
    validation = [r for r in records if "validation_loss" in r]
    if not train:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} has no logged step to plot")
    figure, (loss_axes, gate_axes) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    loss_axes.plot([r["step"] for r in train], [r["lm_loss"] for r in train], linewidth=1, label="training")
    if validation:
        steps, losses = [r["step"] for r in validation], [r["validation_loss"] for r in validation]
        loss_axes.plot(steps, losses, marker="o", markersize=3, label="validation")
    for name, level in (references or {}).items():
        loss_axes.axhline(level, linestyle="--", color="grey", linewidth=1)
        loss_axes.annotate(f"{name} {level:.2f}", (train[-1]["step"], level), ha="right", va="bottom", fontsize=8)
    loss_axes.set(title="Loss", xlabel="optimizer step", ylabel="nats a token")
    loss_axes.legend()
    layers = len(train[-1]["gates"]["mean"])
    colours = plt.get_cmap("viridis")
    for layer in range(layers):
        means = [r["gates"]["mean"][layer] for r in train]
        colour = colours(layer / max(1, layers - 1))
        gate_axes.plot([r["step"] for r in train], means, color=colour, linewidth=1, label=f"layer {layer}")
    gate_axes.set(title="Mean gate (1 = all Mamba, 0 = all attention)", xlabel="optimizer step", ylim=(0, 1))
    if layers <= 12:
        gate_axes.legend(fontsize=8)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def plot_goodput(run_dir: Path, goodput: Goodput, output: Path) -> None:
    """Draw throughput over steps, and what the wall time went into.

    Args:
        run_dir: folder of the run.
        goodput: its account.
        output: PNG file to write.

    Raises:
        ValueError: the run has logged nothing yet.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = [r for r in read_records(run_dir / "metrics.jsonl") if "loss" in r]
    if not train:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} has no logged step to plot")
    figure, (speed_axes, time_axes) = plt.subplots(1, 2, figsize=(11, 3.0), constrained_layout=True)
    speed_axes.plot([r["step"] for r in train], [r["tokens_per_s"] for r in train], linewidth=1, color="tab:green")
    for interruption in goodput.interruptions:
        speed_axes.axvline(interruption.step, color="tab:red", linestyle=":", linewidth=1)
    speed_axes.set(title="Throughput (dotted: went on here)", xlabel="optimizer step", ylabel="tokens/s")
    speed_axes.set_ylim(bottom=0)
    left = 0.0
    for name, seconds, colour in goodput.shares():
        time_axes.barh([0], [seconds], left=left, color=colour, label=f"{name} {clock(seconds)}", height=0.5)
        left += seconds
    time_axes.set(
        title=f"Wall time: {goodput.share:.1%} became kept steps", xlabel="seconds", yticks=[], ylim=(-1.6, 0.6)
    )
    time_axes.legend(loc="lower left", ncols=2, fontsize=8, frameon=False)
    figure.savefig(output, dpi=120)
    plt.close(figure)
