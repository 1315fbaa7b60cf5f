"""Draws the pictures of README.md and docs/speed.md: ``python docs/images/make.py`` writes them beside this file.

Speeds are copied from tables of docs/speed.md; sizes.png reads data/sizes.csv, see sizes.py. killed_run.py writes the
losses of killed_run.png.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from sizes import ONE_GPU, one_gpu_of, read, size_name

HERE = Path(__file__).parent
INK, GREY = "#1f2933", "#7b8794"
MAMBA, ATTENTION, MIX, OTHER = "#2f7d6d", "#3b5fa8", "#b8682a", "#5d6773"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "savefig.dpi": 160,
}

# docs/speed.md, "Row length": rows of one document, one H100 80GB HBM3
ROW_LENGTHS = ["4 × 8,192", "32,768", "131,072"]
TOKENS_PER_SECOND = [48_561, 44_096, 28_600]
MFU = [47.4, 48.5, 45.4]
FALCON_TOKENS_PER_SECOND = [18_486, 14_356, 7_212]

# docs/speed.md, "Where a step's time goes", version 7: milliseconds of one profiled step
STEP_MS = [
    ("matrix products", 396, "#3b5fa8"),
    ("attention", 128, "#6f8fce"),
    ("scan", 53, "#2f7d6d"),
    ("elementwise", 84, "#b8682a"),
    ("copies", 16, "#d9a066"),
    ("optimizer", 25, "#7b5ea7"),
    ("convolution", 17, "#7fb8aa"),
    ("loss and idle", 7, "#9aa5b1"),
]


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    """Draw a rounded box centred at ``(x, y)``; the first line of its text is bold."""
    shape = "round,pad=0,rounding_size=0.12"
    ax.add_patch(
        FancyBboxPatch((x - width / 2, y - height / 2), width, height, shape, fc=color + "22", ec=color, lw=1.6)
    )
    title, _, detail = text.partition("\n")
    lines = detail.count("\n") + 1 if detail else 0
    ax.text(x, y + 0.17 * lines, title, ha="center", va="center", fontsize=12, fontweight="bold")
    if detail:
        ax.text(x, y - 0.22, detail, ha="center", va="center", fontsize=10, linespacing=1.35)


def arrow(ax: Axes, *points: tuple[float, float], color: str = INK) -> None:
    """Draw straight lines through ``points`` with an arrow head at the last one."""
    for start, end in itertools.pairwise(points[:-1]):
        ax.plot(*zip(start, end, strict=True), color=color, lw=1.5, solid_capstyle="round")
    ax.add_patch(
        FancyArrowPatch(
            points[-2], points[-1], arrowstyle="-|>", mutation_scale=13, lw=1.5, color=color, shrinkA=0, shrinkB=0
        )
    )


def plus(ax: Axes, x: float, y: float, sign: str = "+") -> None:
    """Draw a circled sign."""
    ax.add_patch(plt.Circle((x, y), 0.2, fc="white", ec=INK, lw=1.5, zorder=3))
    ax.text(x, y - 0.01, sign, ha="center", va="center", fontsize=13, zorder=4)


def block() -> None:
    """Draw one fused layer, from fusiontree/models/block.py, with data flowing downwards."""
    fig, ax = plt.subplots(figsize=(8.2, 7.5))
    ax.set(xlim=(-0.2, 12), ylim=(-0.15, 10.85), aspect="equal")
    ax.axis("off")
    left, middle, right, mlp, stream = 3.4, 6.1, 8.8, 11.0, 0.5

    ax.text(stream - 0.2, 10.62, "residual stream x", ha="left", va="center", fontsize=11)
    arrow(ax, (stream, 10.4), (stream, 0.77))
    arrow(ax, (stream, 9.75), (middle - 1.1, 9.75))
    box(ax, middle, 9.75, 2.2, 0.7, "RMSNorm", OTHER)
    arrow(ax, (middle, 9.4), (middle, 9.05), (left, 9.05), (left, 8.2))
    arrow(ax, (middle, 9.05), (right, 9.05), (right, 8.2))
    plus(ax, left, 8.67)
    ax.text(left - 0.32, 8.67, "time encoding", ha="right", va="center", fontsize=10)
    box(ax, left, 7.4, 4.4, 1.6, "Mamba-2 branch\nprojections, convolution,\nstate-space scan, gated norm", MAMBA)
    box(
        ax,
        right,
        7.4,
        4.6,
        1.6,
        "attention branch\nlocal heads: sliding window\nglobal heads: whole document",
        ATTENTION,
    )

    arrow(ax, (left, 6.6), (left, 6.1), (middle - 0.6, 6.1), (middle - 0.6, 5.62))
    arrow(ax, (right, 6.6), (right, 6.1), (middle + 0.6, 6.1), (middle + 0.6, 5.62))
    ax.text(left + 0.12, 6.36, "m", ha="left", va="center", fontsize=12, style="italic")
    ax.text(right - 0.12, 6.36, "a", ha="right", va="center", fontsize=12, style="italic")
    arrow(ax, (left, 6.1), (left, 2.48), (middle - 2.1, 2.48), color=MAMBA)
    arrow(ax, (right, 6.1), (right, 2.48), (middle + 2.1, 2.48), color=ATTENTION)
    ax.plot([right, right], [5.1, 5.4], color="white", lw=4)  # the line of z passes over the line of a
    box(ax, middle, 5.25, 4.2, 0.7, "alignment  →  z", MIX)
    arrow(ax, (middle, 4.9), (middle, 4.42))
    box(ax, middle, 3.87, 4.2, 1.1, "gate\ng = σ(W_up tanh(W_down z))", MIX)
    arrow(ax, (middle, 3.32), (middle, 3.0))
    box(ax, middle, 2.45, 4.2, 1.1, "mix per channel\ng·m + (1−g)·a", MIX)
    arrow(ax, (middle, 1.9), (middle, 1.65))
    box(ax, middle, 1.3, 4.2, 0.66, "output projection", OTHER)
    arrow(ax, (middle, 0.97), (middle, 0.57), (stream + 0.22, 0.57))

    arrow(ax, (middle + 2.1, 5.25), (mlp, 5.25), (mlp, 1.65))
    ax.text(mlp - 0.12, 5.0, "z", ha="right", va="center", fontsize=12, style="italic")
    box(ax, mlp, 1.3, 1.5, 0.66, "MLP", OTHER)
    ax.plot([mlp, mlp, middle], [0.97, 0.57, 0.57], color=INK, lw=1.5)
    plus(ax, middle, 0.57)
    plus(ax, stream, 0.57)
    arrow(ax, (stream, 0.37), (stream, -0.1))
    ax.text(stream + 0.2, 0.05, "next layer", ha="left", va="center", fontsize=11)
    save(fig, "block.png")


def row_length() -> None:
    """Draw tokens per second and MFU against the row length."""
    fig, (speed, use) = plt.subplots(1, 2, figsize=(8, 3.5), width_ratios=[1.5, 1])
    places = range(len(ROW_LENGTHS))
    for shift, values, color, label in (
        (-0.2, TOKENS_PER_SECOND, ATTENTION, "FusionTree, 1.57B"),
        (0.2, FALCON_TOKENS_PER_SECOND, "#b4bcc6", "Falcon-H1 (transformers), 1.55B"),
    ):
        bars = speed.bar([place + shift for place in places], values, width=0.38, color=color, label=label)
        speed.bar_label(bars, labels=[f"{value:,}" for value in values], fontsize=9.5, padding=2)
    speed.set(ylim=(0, 62_000), ylabel="tokens per second", xlabel="row length (tokens)")
    speed.set_xticks(places, ROW_LENGTHS)
    speed.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}K" if value else "0")
    speed.legend(frameon=False, fontsize=10, loc="upper right")
    bars = use.bar(places, MFU, width=0.5, color=MAMBA)
    use.bar_label(bars, labels=[f"{value}%" for value in MFU], fontsize=9.5, padding=2)
    use.set(ylim=(0, 60), ylabel="MFU of FusionTree (%)", xlabel="row length (tokens)")
    use.set_xticks(places, ROW_LENGTHS)
    fig.tight_layout(w_pad=2)
    save(fig, "row_length.png")


def sizes() -> None:
    """Draw MFU by size and row on one GPU, and the speed per GPU of layouts relative to it, from data/sizes.csv."""
    rows = read()
    alone = [row for row in rows if row["layout"] == ONE_GPU and row["mfu"] is not None]
    split = [(row, one) for row in rows if row["layout"] != ONE_GPU and (one := one_gpu_of(row, rows)) is not None]
    height = 1.1 + 0.3 * max(len(alone), len(split))
    fig, (use, layouts) = plt.subplots(1, 2, figsize=(10.5, height))

    def bars(ax: Axes, names: list[str], shares: list[float], color: str, label: str) -> None:
        drawn = ax.barh(range(len(names)), shares, height=0.66, color=color)
        ax.bar_label(drawn, labels=[f"{share:.1f}%" for share in shares], fontsize=9.5, padding=3)
        ax.set_yticks(range(len(names)), names, fontsize=9.5)
        ax.set(xlim=(0, max(shares, default=1) * 1.18), xlabel=label)
        ax.invert_yaxis()

    def name(row: dict[str, Any]) -> str:
        device = row["device"].removeprefix("NVIDIA ").split()[0]
        return f"{device}: {size_name(row['parameters'])}, {row['row']}"

    bars(use, [name(row) for row in alone], [row["mfu"] * 100 for row in alone], MAMBA, "MFU on one GPU (%)")
    bars(
        layouts,
        [f"{name(row)}, {row['layout']}" for row, _ in split],
        [row["tokens_per_s_per_gpu"] / one["tokens_per_s_per_gpu"] * 100 for row, one in split],
        ATTENTION,
        "speed per GPU, one GPU = 100%",
    )
    fig.tight_layout(w_pad=2)
    save(fig, "sizes.png")


def step_time() -> None:
    """Draw the parts of a step's time as one bar."""
    fig, ax = plt.subplots(figsize=(8, 2.3))
    start = 0
    for name, milliseconds, color in STEP_MS:
        ax.barh(0, milliseconds, left=start, color=color, edgecolor="white", label=f"{name}: {milliseconds} ms")
        if milliseconds > 50:
            ax.text(
                start + milliseconds / 2, 0, str(milliseconds), ha="center", va="center", color="white", fontsize=10.5
            )
        start += milliseconds
    ax.set(xlim=(0, 740), xlabel="milliseconds", yticks=[])
    ax.spines["left"].set_visible(False)
    ax.legend(
        ncols=4,
        frameon=False,
        fontsize=9.5,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        columnspacing=1.4,
        handlelength=1.2,
    )
    fig.tight_layout()
    save(fig, "step_time.png")


# One colour per rank of the picture of layouts, in pairs of the tensor parallel ranks.
RANK_COLORS = ["#2f6db3", "#8fb8e3", "#b8682a", "#e8b98c", "#2f7d6d", "#8ecabb", "#7b5ea7", "#c3b1de"]


def layouts() -> None:
    """Draw which rank computes which part of a batch in four layouts."""
    panels = [
        ("dp 2", "each rank has its own sequences", 2, 1, 1),
        ("cp 2", "each rank has a chunk of every sequence", 1, 2, 1),
        ("tp 2", "each rank has half of the heads and channels", 1, 1, 2),
        ("dp 2 × cp 2 × tp 2", "8 ranks", 2, 2, 2),
    ]
    fig, axes = plt.subplots(2, 2, figsize=(8.6, 5.6))
    for ax, (title, subtitle, dp, cp, tp) in zip(axes.flat, panels, strict=True):
        draw_layout(ax, dp, cp, tp)
        ax.set_title(title, loc="left", fontweight="bold", fontsize=13, pad=22)
        ax.text(0, 1.05, subtitle, transform=ax.transAxes, fontsize=10.5, color=OTHER)
    fig.tight_layout(h_pad=1.6, w_pad=2.2)
    save(fig, "layouts.png")


def draw_layout(ax: Axes, dp: int, cp: int, tp: int, sequences: int = 2) -> None:
    """Draw ``sequences`` as boxes, tokens from left to right and channels from top to bottom, coloured by rank."""
    for sequence, chunk, part in itertools.product(range(sequences), range(cp), range(tp)):
        rank = (sequence * dp // sequences * cp + chunk) * tp + part
        height = 0.8 / tp
        x, y = chunk / cp, sequences - sequence - 0.1 - (part + 1) * height
        color = RANK_COLORS[rank * (2 if tp == 1 else 1) % len(RANK_COLORS)]
        ax.add_patch(Rectangle((x, y), 1 / cp, height, fc=color, ec="white", lw=2))
        dark = color in RANK_COLORS[::2]
        ax.text(
            *(x + 0.5 / cp, y + height / 2, f"rank {rank}"),
            **{"ha": "center", "va": "center", "fontsize": 11, "color": "white" if dark else INK},
        )
    ax.set(xlim=(0, 1), ylim=(0, sequences), xticks=[], yticks=[])
    ax.set_yticks([n + 0.5 for n in range(sequences)], [f"sequence {sequences - n}" for n in range(sequences)])
    ax.tick_params(length=0)
    ax.set_xlabel("tokens  →", loc="left", fontsize=10.5)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)


def killed_run() -> None:
    """Draw the loss of a run that was killed many times over that of an undisturbed run."""
    values = json.loads((HERE / "data" / "killed_run.json").read_text(encoding="utf-8"))
    fig, ax = plt.subplots(figsize=(8, 3.6))
    ax.plot(
        *zip(*values["undisturbed"], strict=True), color="#9cc3ea", lw=6, label="undisturbed", solid_capstyle="round"
    )
    ax.plot(*zip(*values["killed"], strict=True), color=INK, lw=1.1, label=f"killed {len(values['kills'])} times")
    loss = dict(values["killed"])
    ax.plot(
        values["kills"], [loss[step] for step in values["kills"]], "X", color=MIX, ms=8, mec="white", label="SIGKILL"
    )
    ax.set(xlabel="optimizer step", ylabel="loss (nats per byte)", xlim=(0, len(loss) + 4))
    ax.legend(frameon=False, loc="upper right")
    difference = values["largest_relative_difference"] * 1e6
    ax.text(
        *(0.985, 0.5, f"resumed on 1 and 2 ranks in turn\nlargest relative difference {difference:.0f} × 10⁻⁶"),
        **{"transform": ax.transAxes, "ha": "right", "fontsize": 10.5, "color": OTHER, "linespacing": 1.5},
    )
    fig.tight_layout()
    save(fig, "killed_run.png")


def save(fig: plt.Figure, name: str) -> None:
    """Write a figure beside this file."""
    fig.savefig(HERE / name, bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
    plt.close(fig)


if __name__ == "__main__":
    with plt.rc_context(STYLE):
        block()
        row_length()
        sizes()
        step_time()
        layouts()
        killed_run()
