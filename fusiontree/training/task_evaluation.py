"""Evaluation tasks between training steps, on the training ranks, layout and engine.

Tasks are given as a function: this module does not import them. They draw no random number of the process, read no
training batch and change no parameter, so training computes the same with and without them.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fusiontree.data.batch import MicroBatch
from fusiontree.engines.base import Engine, TokenScores
from fusiontree.supervision.watchdog import Watchdog
from fusiontree.tracking.console import Console
from fusiontree.tracking.records import Records
from fusiontree.training.observers import Observer
from fusiontree.training.pipeline import FinishedStep
from fusiontree.training.settings import RunSettings

MOST_SHARE = 0.01
"""Share of the step time that evaluations may take without a warning."""
_PACE_STEPS = 64
"""Steps over which the step time is taken."""


class EngineScorer:
    """The model under training, as tasks ask for it (:class:`fusiontree.evaluation.scorer.Scorer`)."""

    def __init__(self, engine: Engine, never: Sequence[int], watchdog: Watchdog, limit_s: float) -> None:
        """Score with ``engine``.

        Args:
            engine: of the run.
            never: ids of tokens that generation never draws.
            watchdog: is told each forward pass.
            limit_s: seconds that a forward pass may take; 0 sets no limit.
        """
        self.dp_rank, self.dp_size = engine.dp_rank, engine.dp_size
        self._engine, self._watchdog, self._limit_s = engine, watchdog, limit_s
        self._never_M = torch.tensor(list(never), dtype=torch.int64)
        self._known: set[torch.Size] = set()
        self.warm_up_s = 0.0
        """Seconds that went into the first pass of each shape, whose kernels compile; that pass is repeated."""

    def score(self, micro: MicroBatch) -> TokenScores:
        """Return the scores of all labels, ``[B, S]`` on the CPU."""
        shape = micro.input_ids_BS.shape
        if shape not in self._known:  # on all ranks alike
            self._known.add(shape)
            began = time.perf_counter()
            self._score(micro)
            self.warm_up_s += time.perf_counter() - began
        return self._score(micro)

    def _score(self, micro: MicroBatch) -> TokenScores:
        with self._watchdog.section("evaluation pass", self._limit_s):
            return self._engine.score(micro, self._never_M)

    def sum_over_rows(self, values: Tensor) -> Tensor:
        """Return ``values`` summed over the ranks that compute different rows."""
        return self._engine.sum_over_rows(values.to(self._engine.device)).cpu()


RunTasks = Callable[[], dict[str, dict[str, float]]]
"""Runs all tasks, on all ranks together; returns each task's measures by name, the main one first."""


class TaskEvaluation(Observer):
    """Runs tasks every ``evaluation.interval`` steps and after the last; records measures and what they cost."""

    def __init__(
        self,
        settings: RunSettings,
        records: Records,
        watchdog: Watchdog,
        console: Console,
        scorer: EngineScorer,
        run_tasks: RunTasks,
    ) -> None:
        """Run nothing yet.

        Args:
            settings: the run's configuration.
            records: takes measures, and an event if evaluations take more than :data:`MOST_SHARE` of the step time.
            watchdog: is told the section.
            console: shows measures.
            scorer: used by ``run_tasks``.
            run_tasks: runs the tasks.
        """
        self._settings, self._records = settings, records
        self._watchdog, self._console = watchdog, console
        self._scorer, self._run_tasks = scorer, run_tasks
        self._interval = settings.config.evaluation.interval
        self._step_s: deque[float] = deque(maxlen=_PACE_STEPS)
        self._warned = False

    def needs_finished_step(self, step: int) -> bool:
        """Return whether an evaluation follows ``step``."""
        return step % self._interval == 0 or step == self._settings.training.max_steps

    def after_step(self, step: FinishedStep) -> None:
        """Run the tasks where they are due."""
        self._step_s.append(step.host_s)
        if not self.needs_finished_step(step.number):
            return
        self._scorer.warm_up_s, began = 0.0, time.perf_counter()
        with self._watchdog.section("evaluate", self._settings.limits.slow_s):
            measures = self._run_tasks()
        seconds = time.perf_counter() - began - self._scorer.warm_up_s
        share = seconds / (self._interval * statistics.median(self._step_s))
        values = {f"evaluation/{task}/{name}": v for task, found in measures.items() for name, v in found.items()}
        cost = {"evaluation_s": seconds, "evaluation_share": share}
        self._records.metrics({"step": step.number, "tokens": step.tokens, **values, **cost})
        self._console.evaluated(step.number, measures, seconds, share)
        self._warn(step.number, share)

    def _warn(self, step: int, share: float) -> None:
        """Say once that evaluations are expensive, and which interval would make them cheap."""
        if share <= MOST_SHARE or self._warned:
            return
        self._warned = True
        fitting = int(self._interval * share / MOST_SHARE) + 1
        reason = (
            f"evaluations take {share:.1%} of the step time at evaluation.interval {self._interval}; from "
            f"{fitting} on they take less than {MOST_SHARE:.0%}; evaluation.rows and evaluation.training_tasks "
            f"reduce them too"
        )
        self._records.event("evaluation_expensive", step=step, reason=reason)
        self._console.say(reason)
