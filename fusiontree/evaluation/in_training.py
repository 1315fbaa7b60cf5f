"""Tasks of a training run: their settings, and their records as named measures for its metrics."""

from __future__ import annotations

import statistics
from typing import Any

from fusiontree.config.root import Config
from fusiontree.data.tokenizers import Tokenizer
from fusiontree.evaluation.config import TASKS
from fusiontree.evaluation.scorer import Scorer
from fusiontree.evaluation.tasks import Record, Setup, run_tasks

_SIZES = frozenset({"rows", "tokens", "answer_tokens", "choices", "alphabet", "bytes", "bytes_from", "data"})
"""Entries that describe the input of a record and do not name it; beside ``data`` may stand the name of the set."""


def training_setup(config: Config, tokenizer: Tokenizer, scorer: Scorer) -> Setup:
    """Return the setup of the tasks that a run evaluates; rows per pass are at most training's.

    Args:
        config: of the run.
        tokenizer: of its data.
        scorer: the model under training.
    """
    section, training = config.evaluation, config.training
    settings = section.model_copy(
        update={
            "tasks": section.training_tasks,
            "batch_size": min(section.batch_size, training.micro_batch_size),
        }
    )
    data = config.data.model_dump(mode="json", by_alias=True)
    return Setup(config.model, tokenizer, settings, section.seq_len or training.seq_len, scorer, data)


class NoScorer:
    """Stands for the model where tasks are checked before there is one."""

    dp_rank, dp_size = 0, 1

    def score(self, micro: Any) -> Any:
        """Fail: a check scores nothing."""
        raise AssertionError("the check of a task calls no model")

    def sum_over_rows(self, values: Any) -> Any:
        """Fail: a check scores nothing."""
        raise AssertionError("the check of a task calls no model")


def check_training_tasks(config: Config, tokenizer: Tokenizer) -> None:
    """Check the tasks that a run evaluates, without a model.

    Raises:
        UserError: a dataset or file cannot be read, or a length does not fit.
    """
    setup = training_setup(config, tokenizer, NoScorer())
    for name in setup.config.tasks:
        TASKS.get(name).load().check(setup)


def measure(setup: Setup) -> dict[str, dict[str, float]]:
    """Run the tasks and return each task's measures (:func:`measures`); all ranks call this together."""
    return {task: measures(records) for task, records in run_tasks(setup).items()}


def measures(records: list[Record]) -> dict[str, float]:
    """Return the numbers of a task's records by name, the task's first number first.

    Numbers of type float measure the model, apart from ``depth`` and what begins with ``chance``. Each gives ``NAME``,
    the mean over the records, and if there are several records ``NAME/LABELS`` for each. Labels are the other entries
    that differ between the records, such as ``length_4096_depth_0.5``; of a path its last part.
    """
    first = records[0]
    rest = [name for name in first if not name.startswith("chance") and name not in _SIZES]
    names = [name for name in rest if isinstance(first[name], float) and name != "depth"]
    labels = [name for name in rest if name not in names and any(record[name] != first[name] for record in records)]
    if "data" in first and len({tuple(record[name] for name in labels) for record in records}) < len(records):
        labels.append("data")  # of files, which are in no named set
    found = {name: statistics.fmean(record[name] for record in records) for name in names}
    for record in records if len(records) > 1 else ():
        cell = "_".join(f"{label}_{str(record[label]).rpartition('/')[2]}" for label in labels)
        found |= {f"{name}/{cell}": record[name] for name in names}
    return found
