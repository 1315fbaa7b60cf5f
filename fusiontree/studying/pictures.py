"""Pictures of a study, one per question."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.studying.summary import SizeResult, accuracy_by_length, curve_points
from fusiontree.tracking.curves import COLORS
from fusiontree.tracking.plots import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7f4f24")
"""Okabe and Ito (2008), with a brown; further arms repeat them with other lines."""
_LINES = ("-", "--", ":")
_SHOWN = 0.3
"""Fraction of a run at its start that the loss axis need not show."""
AXES = {
    "tokens": ("loss_tokens.png", "Which arm learns most per token?", "training tokens, millions", 1e6),
    "flops": ("loss_flops.png", "Which arm learns most per operation?", "training FLOPs, 10$^{15}$", 1e15),
    "seconds": ("loss_time.png", "Which arm learns most per second?", "seconds of training steps", 1.0),
}


def draw(results: dict[str, Any], sizes: list[SizeResult], folder: Path) -> list[tuple[str, str]]:
    """Write the pictures that the results allow; return file name and question of each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    style = {arm: _style(number) for number, arm in enumerate(results["study"]["arms"])}

    def save(name: str, title: str, columns: int, panel: Any, width: float = 6.4) -> None:
        with plt.rc_context(STYLE):
            figure, grid = plt.subplots(1, columns, figsize=(width * columns, 4.6), squeeze=False, layout="constrained")
            for axes, part in zip(grid[0], panel[1], strict=True):
                panel[0](axes, part)
            figure.suptitle(title, x=0.01, ha="left", fontsize=13)
            figure.savefig(folder / name, dpi=110)
            plt.close(figure)
        drawn.append((name, title))

    save("final.png", "Which differences exceed the noise between seeds?", len(sizes), (_draw_final, sizes))
    for axis, (name, title, label, unit) in AXES.items():

        def losses(axes: Axes, size: SizeResult, axis: str = axis, label: str = label, unit: float = unit) -> None:
            _draw_losses(axes, size, axis, unit, style)
            axes.set_xlabel(label)

        save(name, title, len(sizes), (losses, sizes))
    if len(sizes) > 1:
        save(
            "ladder.png",
            "Do the differences hold at larger sizes?",
            1,
            (lambda a, s: _draw_ladder(a, s, style), [sizes]),
        )
    tasks = sorted({task for size in sizes for arm in size.arms for task in accuracy_by_length(arm.runs)})
    for task in tasks:

        def accuracies(axes: Axes, size: SizeResult, task: str = task) -> None:
            _draw_accuracy(axes, size, task, style)

        save(f"{task}.png", f"How well is {task} solved at which length?", len(sizes), (accuracies, sizes))
    return drawn


def _style(number: int) -> dict[str, Any]:
    return {"color": _COLORS[number % len(_COLORS)], "linestyle": _LINES[number // len(_COLORS) % len(_LINES)]}


def _draw_final(axes: Axes, size: SizeResult) -> None:
    """Draw every run's final loss, the arms' means, and the band around the reference that the test calls noise."""
    arms = size.arms[::-1]
    for row, arm in enumerate(arms):
        axes.plot(arm.losses, [row] * len(arm.losses), "o", color=COLORS["loss"], alpha=0.55, markersize=6)
        axes.plot([arm.mean], [row], "|", color=COLORS["validation"], markersize=18, markeredgewidth=2.5)
    needed = max((arm.needed for arm in arms if not math.isnan(arm.needed)), default=None)
    reference = next((arm for arm in arms if arm.difference == 0), None)
    if needed is not None and reference is not None:
        label = f"within noise of {reference.arm}"
        axes.axvspan(reference.mean - needed, reference.mean + needed, color=COLORS["mark"], alpha=0.2, label=label)
        axes.legend(loc="lower right")
    axes.set_yticks(range(len(arms)), [arm.arm for arm in arms])
    axes.set_ylim(-0.7, len(arms) - 0.3)
    axes.set(title=size.size, xlabel="final loss, nats per token")


def _draw_losses(axes: Axes, size: SizeResult, axis: str, unit: float, style: dict[str, dict[str, Any]]) -> None:
    """Draw the first seed's loss of every arm; the loss axis shows the later part of the runs."""
    shown: list[float] = []
    for arm in size.arms:
        run = arm.runs[0]
        tokens, losses = curve_points(run)
        scale = {"tokens": 1.0, "flops": run["flops_per_token"], "seconds": _seconds_per_token(run)}[axis]
        label = f"{arm.arm} {arm.mean:.3f}"
        axes.plot([t * scale / unit for t in tokens], losses, linewidth=1.6, label=label, **style[arm.arm])
        shown += [loss for t, loss in zip(tokens, losses, strict=True) if t >= _SHOWN * tokens[-1]]
    if shown and max(shown) > min(shown):
        margin = 0.05 * (max(shown) - min(shown))
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set(title=size.size, ylabel="loss, nats per token", xlim=(0, None))
    axes.legend(fontsize=8.5, title="arm, mean final loss", title_fontsize=8.5)


def _seconds_per_token(run: dict[str, Any]) -> float:
    curve = run["curve"]
    return curve["seconds"][-1] / curve["tokens"][-1] if curve["tokens"] else math.nan


def _draw_ladder(axes: Axes, sizes: list[SizeResult], style: dict[str, dict[str, Any]]) -> None:
    by_arm: dict[str, list[tuple[float, float, float]]] = {}
    for size in sizes:
        for arm in size.arms:
            run = arm.runs[0]
            by_arm.setdefault(arm.arm, []).append((run["tokens"] * run["flops_per_token"], arm.mean, arm.spread))
    for name, points in by_arm.items():
        if len(points) < 2:
            continue
        flops, means, spreads = zip(*points, strict=True)
        errors = [0.0 if math.isnan(spread) else spread for spread in spreads]
        axes.errorbar(flops, means, yerr=errors, marker="o", capsize=3, label=name, **style[name])
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="final loss, nats per token")
    axes.legend()


def _draw_accuracy(axes: Axes, size: SizeResult, task: str, style: dict[str, dict[str, Any]]) -> None:
    for arm in size.arms:
        found = accuracy_by_length(arm.runs).get(task, {})
        if found:
            axes.plot(list(found), [mean for mean, _ in found.values()], marker="o", label=arm.arm, **style[arm.arm])
    axes.set(title=size.size, xlabel="tokens per row", ylabel="accuracy", ylim=(-0.03, 1.03), xscale="log")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=8.5)
