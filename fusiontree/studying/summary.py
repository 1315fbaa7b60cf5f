"""A study's results by size and arm: final losses, differences from the reference, fits, recall by length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fusiontree.studying.runs import chosen_rate
from fusiontree.studying.statistics import Fit, Noise, fit_curve, least_difference, mean_and_spread, pooled_noise

_ABOVE_CHANCE = 0.01
"""Accuracy above chance from which a task counts as solved by someone."""
_SKIPPED = 0.2
"""Fraction of a run's tokens that the fit leaves out: warm-up and the first steep fall are no power law."""
ACCURACIES = ("choice_accuracy", "found", "token_accuracy", "accuracy")
"""Fields of an evaluation's record that say how often the model was right, the first found counts."""


@dataclass(frozen=True)
class ArmResult:
    """Finished runs of an arm at a size."""

    arm: str
    runs: list[dict[str, Any]]
    mean: float
    spread: float
    """Standard deviation between seeds; NaN for one seed."""
    difference: float
    """Mean minus the reference's mean; NaN without the reference."""
    needed: float
    """Difference that exceeds the noise; NaN where there is no estimate."""
    fits: list[Fit]
    """One per seed whose curve has enough points."""

    @property
    def losses(self) -> list[float]:
        """Final losses, one per seed."""
        return [run["final_loss"] for run in self.runs]

    @property
    def verdict(self) -> str:
        """Whether the difference from the reference exceeds the noise."""
        if math.isnan(self.difference) or math.isnan(self.needed):
            return "unknown"
        if abs(self.difference) <= self.needed:
            return "within noise"
        return "better" if self.difference < 0 else "worse"


@dataclass(frozen=True)
class SizeResult:
    """Finished arms of a size, the lowest loss first."""

    size: str
    noise: Noise | None
    arms: list[ArmResult]


def used_runs(results: dict[str, Any], size: str) -> list[dict[str, Any]]:
    """Return the finished runs of a size that count: of an arm's search, only that with the chosen rate."""
    rates = found_rates(results)
    finished = [r for r in results["runs"] if r["size"] == size and r["state"] == "finished" and _finite(r)]
    return [r for r in finished if not r["searched"] or r["rate"] == rates[r["arm"]]]


def found_rates(results: dict[str, Any]) -> dict[str, float | None]:
    """Return the rate that each arm's search decided; None while it goes on, or where all its runs failed."""
    searched = [r for r in results["runs"] if r["searched"]]
    arms = {r["arm"] for r in searched}
    return {arm: chosen_rate((_searched_loss(r), r["rate"]) for r in searched if r["arm"] == arm) for arm in arms}


def summarize(results: dict[str, Any]) -> list[SizeResult]:
    """Return what the report says about every size that has finished runs."""
    found = []
    for size in results["study"]["sizes"]:
        by_arm: dict[str, list[dict[str, Any]]] = {}
        for run in used_runs(results, size):
            by_arm.setdefault(run["arm"], []).append(run)
        if by_arm:
            found.append(_size_result(size, by_arm, results["study"]["reference"]))
    return found


def _size_result(size: str, by_arm: dict[str, list[dict[str, Any]]], reference: str) -> SizeResult:
    losses = {arm: [run["final_loss"] for run in runs] for arm, runs in by_arm.items()}
    noise = pooled_noise(list(losses.values()))
    arms = []
    for arm, runs in by_arm.items():
        mean, spread = mean_and_spread(losses[arm])
        difference = needed = math.nan
        if reference in losses:
            difference = mean - mean_and_spread(losses[reference])[0]
            if noise is not None and arm != reference:
                counts = len(losses[arm]), len(losses[reference])
                needed = least_difference(noise, *counts, comparisons=len(losses) - 1)
        fits = [fit for run in runs if (fit := fit_run(run)) is not None]
        arms.append(ArmResult(arm, runs, mean, spread, difference, needed, fits))
    return SizeResult(size, noise, sorted(arms, key=lambda result: result.mean))


def curve_points(run: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Return tokens and losses of a run: of its validations, else of its training steps."""
    curve = run["curve"]
    if curve["validation_loss"]:
        return curve["validation_tokens"], curve["validation_loss"]
    return curve["tokens"], curve["loss"]


def fit_run(run: dict[str, Any]) -> Fit | None:
    """Return the power law through a run's losses against its FLOPs, without the beginning of the run."""
    tokens, losses = curve_points(run)
    kept = [(t, loss) for t, loss in zip(tokens, losses, strict=True) if t >= _SKIPPED * run["tokens"]]
    return fit_curve([t * run["flops_per_token"] for t, _ in kept], [loss for _, loss in kept])


def accuracy_by_length(
    runs: Sequence[dict[str, Any]],
) -> dict[str, dict[int, tuple[float, float]]]:
    """Return task -> row length -> mean accuracy over seeds and depths, and its standard deviation between seeds."""
    values: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        for task, records in run.get("evaluation", {}).items():
            of_run: dict[int, list[float]] = {}
            for record in records:
                name = next((name for name in ACCURACIES if isinstance(record.get(name), int | float)), None)
                if name and isinstance(record.get("length"), int):
                    of_run.setdefault(record["length"], []).append(record[name])
            for length, found in of_run.items():
                values.setdefault(task, {}).setdefault(length, []).append(sum(found) / len(found))
    return {
        task: {length: mean_and_spread(found) for length, found in sorted(lengths.items())}
        for task, lengths in values.items()
    }


def chance(size: SizeResult, task: str) -> float:
    """Return the accuracy of guessing in a task: of its records, which all have the same; 0 if none says it."""
    for run in (run for arm in size.arms for run in arm.runs):
        for record in run.get("evaluation", {}).get(task, []):
            if isinstance(record.get("chance_choice_accuracy"), int | float):
                return float(record["chance_choice_accuracy"])
            if isinstance(record.get("alphabet"), int) and "found" not in record:
                return 1 / int(record["alphabet"])
    return 0.0


def tasks_of(size: SizeResult) -> dict[str, bool]:
    """Return each task that arms were evaluated on, and whether an arm is above chance in it at any row length."""
    above: dict[str, bool] = {}
    for arm in size.arms:
        for task, by_length in accuracy_by_length(arm.runs).items():
            best = max(mean for mean, _ in by_length.values())
            above[task] = above.get(task, False) or best > chance(size, task) + _ABOVE_CHANCE
    return dict(sorted(above.items()))


def search_losses(results: dict[str, Any]) -> dict[str, dict[float, float | None]]:
    """Return arm -> rate -> final loss of the search for a learning rate; None where there is none."""
    found: dict[str, dict[float, float | None]] = {}
    for run in results["runs"]:
        if run["searched"] and run["rate"] is not None and _searched_loss(run) is not None:
            found.setdefault(run["arm"], {})[run["rate"]] = run["final_loss"] if _finite(run) else None
    return found


def shares_gpus(size: SizeResult) -> bool:
    """Return whether several runs were trained on one GPU at a time, so that their speeds compare nothing."""
    return any(run.get("runs_per_gpu", 1) > 1 for arm in size.arms for run in arm.runs)


def _searched_loss(run: dict[str, Any]) -> float | None:
    """Return a run's loss as :func:`chosen_rate` takes it."""
    if run["state"] == "finished" or run.get("trained"):
        return run["final_loss"] if _finite(run) else math.nan
    return math.nan if run["state"] == "failed" else None


def _finite(run: dict[str, Any]) -> bool:
    return run.get("final_loss") is not None and math.isfinite(run["final_loss"])
