"""Pictures of a study, one per question."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.studying.summary import SizeResult, accuracy_by_length, chance, curve_points, shares_gpus, tasks_of
from fusiontree.tracking.curves import COLORS
from fusiontree.tracking.plots import STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7f4f24")
"""Okabe and Ito (2008), with a brown; further arms repeat them with other lines."""
_LINES = ("-", "--", ":", "-.")
_SHOWN = 0.3
"""Fraction of a run at its start that the loss axis need not show."""
_CORNER = 8
"""Names that a legend in a corner of the axes holds."""
AXES = {
    "tokens": ("loss_tokens.png", "Which arm learns most per token?", "training tokens, millions", 1e6),
    "flops": ("loss_flops.png", "Which arm learns most per FLOP?", "training FLOPs, 10$^{15}$", 1e15),
    "seconds": ("loss_time.png", "Which arm learns most per second?", "seconds of training steps", 1.0),
}


def draw(results: dict[str, Any], sizes: list[SizeResult], folder: Path) -> list[tuple[str, str]]:
    """Write the pictures that the results allow; return file name and question of each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    style = _styles(results, sizes)

    def save(name: str, title: str, columns: int, panel: Any, width: float = 6.4) -> None:
        with plt.rc_context(STYLE):
            figure, grid = plt.subplots(1, columns, figsize=(width * columns, 4.6), squeeze=False, layout="constrained")
            for axes, part in zip(grid[0], panel[1], strict=True):
                panel[0](axes, part)
            figure.suptitle(title, x=0.01, ha="left", fontsize=13)
            figure.savefig(folder / name, dpi=110)
            plt.close(figure)
        drawn.append((name, title))

    reference = results["study"]["reference"]
    final = (lambda axes, size: _draw_final(axes, size, reference), sizes)
    save("final.png", "Which differences exceed the noise between seeds?", len(sizes), final)
    for axis, (name, title, label, unit) in AXES.items():
        shown = [size for size in sizes if axis != "seconds" or not shares_gpus(size)]
        if not shown:
            continue

        def losses(axes: Axes, size: SizeResult, axis: str = axis, label: str = label, unit: float = unit) -> None:
            _draw_losses(axes, size, axis, unit, style)
            axes.set_xlabel(label)

        save(name, title, len(shown), (losses, shown))
    at_sizes = [arm.arm for size in sizes for arm in size.arms]
    if len(at_sizes) > len(set(at_sizes)):  # an arm has two sizes
        save(
            "ladder.png",
            "Do the differences hold at larger sizes?",
            1,
            (lambda a, s: _draw_ladder(a, s, style), [sizes]),
        )
    above = [(task, size) for size in sizes for task, solved in tasks_of(size).items() if solved]
    for task in dict.fromkeys(task for task, _ in above):

        def accuracies(axes: Axes, size: SizeResult, task: str = task) -> None:
            _draw_accuracy(axes, size, task, style)

        solved = [size for of_task, size in above if of_task == task]
        save(f"{task}.png", f"How well is {task} solved at which length?", len(solved), (accuracies, solved))
    return drawn


def _styles(results: dict[str, Any], sizes: list[SizeResult]) -> dict[str, dict[str, Any]]:
    """Return color and line of each arm that has results, the same in all pictures."""
    shown = {arm.arm for size in sizes for arm in size.arms}
    return {arm: _style(number) for number, arm in enumerate(arm for arm in results["study"]["arms"] if arm in shown)}


def _style(number: int) -> dict[str, Any]:
    return {"color": _COLORS[number % len(_COLORS)], "linestyle": _LINES[number // len(_COLORS) % len(_LINES)]}


def _draw_final(axes: Axes, size: SizeResult, reference: str) -> None:
    """Draw every run's final loss, the arms' means, and around the reference's what each arm's test calls noise."""
    arms = size.arms[::-1]
    labelled = False
    for row, arm in enumerate(arms):
        axes.plot(arm.losses, [row] * len(arm.losses), "o", color=COLORS["loss"], alpha=0.55, markersize=6)
        axes.plot([arm.mean], [row], "|", color=COLORS["validation"], markersize=18, markeredgewidth=2.5)
        if not math.isnan(arm.needed):
            label = None if labelled else f"within noise of {reference}"
            left, color = arm.mean - arm.difference - arm.needed, COLORS["mark"]
            axes.barh(row, 2 * arm.needed, 0.9, left, color=color, alpha=0.25, label=label, zorder=0)
            labelled = True
    if labelled:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1)
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
    _legend(axes, title="arm, mean final loss")


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
        axes.errorbar(flops, means, yerr=spreads, marker="o", capsize=3, label=name, **style[name])
    axes.set(xscale="log", xlabel="size, training FLOPs", ylabel="final loss, nats per token")
    spent = {size.size: size.arms[0].runs[0]["tokens"] * size.arms[0].runs[0]["flops_per_token"] for size in sizes}
    axes.set_xticks(list(spent.values()), [f"{name}\n{flops:.1e}" for name, flops in spent.items()])
    axes.minorticks_off()
    _legend(axes)


def _draw_accuracy(axes: Axes, size: SizeResult, task: str, style: dict[str, dict[str, Any]]) -> None:
    lengths: set[int] = set()
    for arm in size.arms:
        found = accuracy_by_length(arm.runs).get(task, {})
        lengths |= found.keys()
        if found:
            axes.plot(list(found), [mean for mean, _ in found.values()], marker="o", label=arm.arm, **style[arm.arm])
    guessing = chance(size, task)
    axes.axhline(guessing, color=COLORS["mark"], linewidth=1.0, linestyle=":", label=f"chance {guessing:.1%}")
    axes.set(title=size.size, xlabel="tokens per row", ylabel="accuracy", ylim=(-0.03, 1.03), xscale="log")
    if lengths:
        axes.set_xticks(sorted(lengths), [f"{length:,}" for length in sorted(lengths)], fontsize=8.5)
        axes.minorticks_off()
        _legend(axes)


def _legend(axes: Axes, title: str | None = None) -> None:
    """Name the lines, beside the axes where they are too many for a corner."""
    beside = len(axes.get_legend_handles_labels()[1]) > _CORNER
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if beside else {}
    axes.legend(fontsize=8.5, title=title, title_fontsize=8.5, **place)
