"""The pictures of a study: what they show agrees with the tables and can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusiontree.studying.pictures import _draw_final, _draw_ladder, _draw_losses
from fusiontree.studying.report import write_report
from fusiontree.studying.summary import summarize
from tests.studying.test_report import entry, results

__all__ = ["results"]  # the fixture


def test_pictures_agree_with_the_tables(results: dict[str, Any], tmp_path: Path) -> None:
    """The band of an arm with fewer seeds is wider than another's, and an arm with the reference's loss is none."""
    import matplotlib.pyplot as plt

    results["runs"] = [run for run in results["runs"] if run["name"] != "tiny/llama/seed-3"]
    for run in results["runs"]:
        if run["arm"] == "mean":
            run["final_loss"] -= 0.001
    (size,) = summarize(results)
    axes = plt.figure().subplots()
    _draw_final(axes, size, "fused")
    needed = {arm.arm: arm.needed for arm in size.arms}
    widths = sorted(bar.get_width() / 2 for bar in axes.patches if isinstance(bar, plt.Rectangle))
    assert widths == [pytest.approx(needed["mean"]), pytest.approx(needed["llama"])] and widths[0] < widths[1]
    assert axes.get_legend_handles_labels()[1] == ["within noise of fused"]
    plt.close("all")


def test_the_names_of_many_arms_do_not_cover_the_curves(results: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    arms = [f"arm_{number}" for number in range(20)]
    runs = [entry("fused", 0) | {"arm": arm} for arm in arms]
    (size,) = summarize(results | {"runs": runs})
    figure = plt.figure(layout="constrained")
    axes = figure.subplots()
    _draw_losses(axes, size, "tokens", 1.0, {arm: {} for arm in arms})
    figure.canvas.draw()
    legend = axes.get_legend()
    assert legend is not None and legend.get_window_extent().x0 >= axes.get_window_extent().x1
    plt.close("all")


def test_one_seed_has_no_error_bar(results: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    tokens = {"tiny": 20_000, "wide": 40_000}
    results["runs"] = [entry(arm, 0, size, tokens=tokens[size]) for arm in ("fused", "mean") for size in tokens]
    results["study"]["sizes"]["wide"] = results["study"]["sizes"]["tiny"]
    axes = plt.figure().subplots()
    _draw_ladder(axes, summarize(results), {"fused": {}, "mean": {}})
    bars = [line for drawn in axes.containers for line in drawn[2][0].get_segments() if len(line)]
    assert not bars or not np.isfinite(np.array(bars)[:, :, 1]).any()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["tiny\n6.0e+09", "wide\n1.2e+10"]
    plt.close("all")


def test_sizes_without_a_common_arm_have_no_ladder(results: dict[str, Any], tmp_path: Path) -> None:
    results["study"]["sizes"]["wide"] = results["study"]["sizes"]["tiny"]
    results["runs"] = [entry("fused", seed) for seed in (0, 3)] + [entry("mean", seed, "wide") for seed in (0, 3)]
    assert "ladder" not in write_report(results, tmp_path).read_text()
    assert not (tmp_path / "ladder.png").exists()
