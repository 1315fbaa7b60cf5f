"""A picture of an evaluation: loss by tokens of context, and accuracy by length of the row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fusiontree.tracking.plots import STYLE
from fusiontree.utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACCURACIES = (("choice_accuracy", "chance_choice_accuracy"), ("found", None), ("token_accuracy", None))
"""Field to draw, the first that a record has, and the field of its chance."""
_NO_PICTURE = ("perplexity", "text")


def check_plot(tasks: Sequence[str]) -> None:
    """Check that there is something to draw.

    Raises:
        UserError: no task has a curve.
    """
    if all(task in _NO_PICTURE for task in tasks):
        raise UserError(f"--plot has nothing to draw of {', '.join(tasks)}; add positions, or a task with lengths")


def plot_results(results: dict[str, list[dict[str, Any]]], output: Path) -> None:
    """Draw ``results``, the records by task, into a PNG: one panel per kind of curve."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    positions = results.get("positions", [])
    by_length = {task: records for task, records in results.items() if records and _accuracy(records[0])}
    panels: list[Any] = [(_draw_positions, positions)] * bool(positions) + [(_draw_lengths, by_length)] * bool(
        by_length
    )
    if not panels:
        return
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(6.5 * len(panels), 4.5), constrained_layout=True, squeeze=False
        )
        for panel, (draw, values) in zip(axes[0], panels, strict=True):
            draw(panel, values)
        figure.savefig(output, dpi=130)
        plt.close(figure)


def _accuracy(record: dict[str, Any]) -> tuple[str, str | None] | None:
    return next((pair for pair in _ACCURACIES if pair[0] in record and "length" in record), None)


def _draw_positions(axes: Axes, records: list[dict[str, Any]]) -> None:
    for data, name in dict.fromkeys((record["data"], record["set"]) for record in records):
        mine = [record for record in records if (record["data"], record["set"]) == (data, name)]
        context = [(record["from"] * record["to"]) ** 0.5 for record in mine]  # middle of the bucket on a log axis
        loss = [record["nats_per_token"] for record in mine]
        error = [record["standard_error"] for record in mine]
        label = name or Path(data).name
        axes.errorbar(context, loss, yerr=error, marker="o", markersize=4, linewidth=1.5, capsize=2, label=label)
    axes.set_xscale("log", base=2)
    axes.set(title="Loss by context", xlabel="tokens before the predicted token", ylabel="nats per token")
    axes.legend()


def _draw_lengths(axes: Axes, by_task: dict[str, list[dict[str, Any]]]) -> None:
    for task, records in by_task.items():
        pair = _accuracy(records[0])
        assert pair is not None
        lengths = list(dict.fromkeys(record["length"] for record in records))
        mean = [fmean(record[pair[0]] for record in records if record["length"] == length) for length in lengths]
        (line,) = axes.plot(lengths, mean, marker="o", markersize=4, linewidth=1.5, label=task)
        if pair[1]:
            axes.axhline(records[0][pair[1]], color=line.get_color(), linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(
        title="Accuracy by length",
        xlabel="tokens of the row",
        ylabel="mean over depths (dotted: chance)",
        ylim=(-0.03, 1.03),
    )
    axes.legend(fontsize=9)
