"""Joins training and the tasks that it evaluates between steps. Imports torch in functions, as ``train.py`` does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from fusiontree.config.root import Config

if TYPE_CHECKING:
    from fusiontree.engines.base import Engine
    from fusiontree.supervision.watchdog import Watchdog
    from fusiontree.tracking.console import Console
    from fusiontree.tracking.records import Records
    from fusiontree.training.settings import RunSettings
    from fusiontree.training.task_evaluation import TaskEvaluation


def check_tasks(config: Config) -> None:
    """Check the tasks that a run would evaluate, before it has a folder.

    Raises:
        UserError: a dataset or file cannot be read, or a length does not fit.
    """
    if not config.evaluation.interval:
        return
    from fusiontree.data.sources.base import open_source

    with TemporaryDirectory() as folder:
        open_source(config.data.sources[0], config.data).save_tokenizer(Path(folder))
        check_run_tasks(config, Path(folder))


def check_run_tasks(config: Config, folder: Path) -> None:
    """Check the tasks that a run evaluates; ``folder`` holds its tokenizer. Errors as in :func:`check_tasks`."""
    if not config.evaluation.interval:
        return
    from fusiontree.data.tokenizers import load_tokenizer
    from fusiontree.evaluation.in_training import check_training_tasks

    check_training_tasks(config, load_tokenizer(folder))


def task_evaluation(
    settings: RunSettings, engine: Engine, records: Records, watchdog: Watchdog, console: Console
) -> list[TaskEvaluation]:
    """Return the observer that evaluates tasks between steps, if the run does so."""
    from fusiontree.data.tokenizers import load_tokenizer
    from fusiontree.evaluation.in_training import measure, training_setup
    from fusiontree.training.task_evaluation import EngineScorer, TaskEvaluation

    config = settings.config
    if not config.evaluation.interval:
        return []
    tokenizer = load_tokenizer(settings.run_dir)
    scorer = EngineScorer(engine, tokenizer.unknown_ids(config.model.vocab_size), watchdog, settings.limits.slow_s)
    run_tasks = partial(measure, training_setup(config, tokenizer, scorer))
    return [TaskEvaluation(settings, records, watchdog, console, scorer, run_tasks)]
