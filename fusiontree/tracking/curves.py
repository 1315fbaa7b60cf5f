"""The curves of a run as lists, and the colours in which plot and report draw them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusiontree.tracking.console import RunningMean
from fusiontree.tracking.records import read_records

# Okabe and Ito, "Color Universal Design" (2008): distinguishable with every common colour blindness.
COLORS = {
    "loss": "#0072B2",
    "validation": "#D55E00",
    "lr": "#CC79A7",
    "speed": "#009E73",
    "mark": "#7f8790",
    "mamba": "#D55E00",
    "attention": "#0072B2",
}


@dataclass(frozen=True)
class TaskCurves:
    """The main measure of an evaluation task over optimizer steps."""

    task: str
    measure: str
    """Its name, such as ``token_accuracy``."""
    steps: list[int]
    values: dict[str, list[float]]
    """``mean`` over the cells (lengths, depths, sets), and each cell's own; NaN at steps that did not measure it."""


@dataclass(frozen=True)
class RunCurves:
    """Curves over optimizer steps. L layers, N logged steps, V validations."""

    step_N: list[int]
    loss_N: list[float]
    """Cross-entropy in nats per token."""
    smoothed_N: list[float]
    lr_N: list[float]
    tokens_per_s_N: list[float]
    gate_NL: list[list[float]]
    """Mean gate of each layer: 1 is the recurrent branch alone, 0 attention alone."""
    validation_step_V: list[int]
    validation_loss_V: list[float]
    resumes: list[int]
    """Steps after which the run continued from a checkpoint."""
    tasks: list[TaskCurves] = field(default_factory=list)

    @property
    def gate_range(self) -> float:
        """Largest distance of a gate from 0.5, at least 0.05: the scale of the heat map."""
        return max(0.05, max((abs(gate - 0.5) for gates in self.gate_NL for gate in gates), default=0.0))

    def thinned(self, points: int) -> dict[str, Any]:
        """Return plain values with at most about ``points`` logged steps, evenly chosen; the last one is kept."""
        stride = max(1, -(-len(self.step_N) // points))
        last = len(self.step_N) - 1
        chosen = [i for i in range(last + 1) if (last - i) % stride == 0]
        values: dict[str, Any] = dict(vars(self)) | {"gate_range": self.gate_range}
        values["tasks"] = [vars(task) for task in self.tasks]
        for name, curve in values.items():
            if name.endswith(("_N", "_NL")):
                values[name] = [curve[i] for i in chosen]
        return values


def read_curves(run_dir: Path) -> RunCurves:
    """Read metrics.jsonl and events.jsonl of a run.

    Raises:
        ValueError: the run has logged no step.
    """
    records = read_records(run_dir / "metrics.jsonl")
    train = [r for r in records if {"lm_loss", "lr", "tokens_per_s", "gates"} <= r.keys()]  # others are damaged
    validation = [r for r in records if "validation_loss" in r]
    if not train:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} has no logged step to plot")
    loss_N = [_number(r["lm_loss"]) for r in train]
    return RunCurves(
        step_N=[r["step"] for r in train],
        loss_N=loss_N,
        smoothed_N=smooth(loss_N),
        lr_N=[_number(r["lr"]) for r in train],
        tokens_per_s_N=[_number(r["tokens_per_s"]) for r in train],
        gate_NL=[[_number(gate) for gate in r["gates"]["mean"]] for r in train],
        validation_step_V=[r["step"] for r in validation],
        validation_loss_V=[_number(r["validation_loss"]) for r in validation],
        resumes=[e.get("to_step", e.get("step", 0)) for e in read_records(run_dir / "events.jsonl") if _continues(e)],
        tasks=task_curves(records),
    )


def task_curves(records: list[dict[str, Any]]) -> list[TaskCurves]:
    """Return the curve of each task from ``evaluation/TASK/MEASURE`` and ``evaluation/TASK/MEASURE/CELL``.

    The first measure of a record is the task's main one.
    """
    evaluations = [record for record in records if "evaluation_s" in record]
    found: dict[str, TaskCurves] = {}
    for index, record in enumerate(evaluations):
        for key, value in record.items():
            prefix, _, rest = key.partition("/")
            task, _, rest = rest.partition("/")
            measure, _, cell = rest.partition("/")
            if prefix != "evaluation" or not measure:
                continue
            curves = found.setdefault(task, TaskCurves(task, measure, [r["step"] for r in evaluations], {}))
            if measure == curves.measure:
                values = curves.values.setdefault(cell or "mean", [math.nan] * len(evaluations))
                values[index] = _number(value)
    return list(found.values())


def _number(value: Any) -> float:
    """Return a recorded number; null, of a number that was not finite, is NaN."""
    return value if isinstance(value, int | float) else math.nan


def smooth(values: list[float]) -> list[float]:
    """Return the mean of two exponential means, forwards and backwards, so that the curve does not lag behind."""
    span = max(5.0, len(values) / 40)
    forwards, backwards = RunningMean(span), RunningMean(span)
    after = [backwards.add(value) for value in reversed(values)][::-1]
    return [(forwards.add(value) + mean) / 2 for value, mean in zip(values, after, strict=True)]


def _continues(event: dict[str, Any]) -> bool:
    return event["event"] in ("resume", "rewind")
