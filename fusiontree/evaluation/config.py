"""The ``evaluation`` section: tasks and their sizes, and the registry of tasks; importing it needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError, field_validator

from fusiontree.utils.errors import UserError
from fusiontree.utils.registry import Registry
from fusiontree.utils.settings import PathText, Section, setting

if TYPE_CHECKING:
    from fusiontree.evaluation.tasks import Task


@dataclass(frozen=True)
class TaskSpec:
    """One kind of task."""

    about: str
    """What it measures, for the help of the command."""
    load: Callable[[], Task]
    """Returns the task; may import torch."""


TASKS: Registry[TaskSpec] = Registry("evaluation task")
"""Tasks that ``evaluation.tasks`` may name; docs/evaluation.md adds one from a user's file."""


def _of_module(module: str, name: str) -> Callable[[], Task]:
    def load() -> Task:
        task: Task = getattr(import_module(f"fusiontree.evaluation.{module}"), name)()
        return task

    return load


for _name, _module, _class, _about in (
    ("perplexity", "corpus_tasks", "Perplexity", "loss on token shards"),
    ("text", "corpus_tasks", "TextFiles", "loss on text files"),
    ("positions", "corpus_tasks", "Positions", "loss on token shards and text files by tokens of context"),
    ("needle", "random_tasks", "Needle", "find a pair in random tokens"),
    ("copy", "random_tasks", "Copy", "repeat random tokens"),
    ("recall", "random_tasks", "Recall", "answer for many pairs of random tokens"),
    ("needle_single", "needle_tasks", "SingleNeedle", "find a number in sentences"),
    ("needle_multikey", "needle_tasks", "MultiKeyNeedle", "find one number among those of other keys"),
    ("needle_text", "needle_tasks", "TextNeedle", "the same in real text, of text files or else the dataset"),
    ("needle_multivalue", "needle_tasks", "MultiValueNeedle", "find all numbers of a key"),
    ("needle_multiquery", "needle_tasks", "MultiQueryNeedle", "find the numbers of several keys"),
    ("variable_tracking", "row_tasks", "VariableTracking", "follow chains of assignments"),
    ("common_words", "row_tasks", "CommonWords", "name the commonest word of a list"),
    ("frequent_words", "row_tasks", "FrequentWords", "name the three commonest words of a list"),
):
    TASKS.register(_name, TaskSpec(_about, _of_module(_module, _class)))


def task_list() -> str:
    """Return names and descriptions of all registered tasks."""
    return ", ".join(f"{name} ({spec.about})" for name, spec in TASKS.items())


class EvaluationConfig(Section):
    """Tasks and their sizes; options of the command replace them."""

    tasks: list[str] = setting(
        ["perplexity"],
        f"Tasks, in this order: {task_list()}, or one that a plugin registers.",
        min_length=1,
    )
    interval: int = setting(
        0,
        "Training: steps between evaluations on the training ranks, the last step included; 0 never evaluates.",
        unit="steps",
        ge=0,
    )
    training_tasks: list[str] = setting(
        ["needle", "copy", "recall"],
        "Training: tasks of these evaluations. They use the sizes below and at most training.micro_batch_size rows "
        "at once.",
        min_length=1,
    )
    data: PathText | None = setting(
        None,
        "Dataset folder for perplexity, positions and needle_text (which reads the first of several). Absent means "
        "every dataset of the run's data.validation.",
    )
    text: list[PathText] = setting([], "UTF-8 files for the tasks text, positions and needle_text.")
    seq_len: int | None = setting(
        None, "Row length of perplexity, text and positions. Absent means training.seq_len.", unit="tokens", ge=2
    )
    max_rows: int = setting(
        0, "Rows that perplexity and positions read, spread over the dataset; 0 reads all.", unit="rows", ge=0
    )
    stride: int | None = setting(
        None,
        "text: tokens that each row starts after the previous row; each token is scored with at least "
        "seq_len - stride tokens before it. Absent means seq_len / 2.",
        unit="tokens",
        ge=1,
    )
    lengths: list[int] | None = setting(
        None,
        "Row lengths of tasks other than perplexity, text and positions. Absent means seq_len alone.",
        unit="tokens",
        min_length=1,
    )
    depths: list[float] = setting(
        [0.0, 0.25, 0.5, 0.75, 1.0],
        "Position of the needle: 0 at the start of the row, 1 just before the question.",
        min_length=1,
    )
    alphabet: Literal["vocabulary", "data"] = setting(
        "vocabulary",
        "Tokens of needle, copy and recall: the whole vocabulary, or only those that occur in 64 rows of data (a "
        "model knows nothing of tokens that it was not trained on).",
    )
    rows: int = setting(
        16,
        "Rows of every cell (length and depth) of tasks other than perplexity, text and positions.",
        unit="rows",
        ge=1,
    )
    needle_tokens: int = setting(4, "Tokens of the needle's key, and of its value.", unit="tokens", ge=1)
    recall_pairs: int = setting(8, "Number of pairs per row of recall.", ge=1)
    distractors: int = setting(
        3,
        "Wrong answers per row of tasks in sentences, each computed as a row of its own; 0 leaves only exact_match.",
        ge=0,
    )
    needles: int = setting(
        4,
        "Needles of needle_multikey and needle_text, values of needle_multivalue, keys of needle_multiquery; at least "
        "distractors + 1 needles are hidden.",
        ge=1,
    )
    hops: int = setting(4, "variable_tracking: assignments of a variable to the next, per chain.", ge=1)
    batch_size: int = setting(4, "Rows computed together.", unit="rows", ge=1)
    seed: int = setting(0, "Seed of the random tokens.")

    @field_validator("tasks", "training_tasks")
    @classmethod
    def _known(cls, tasks: list[str]) -> list[str]:
        for name in tasks:
            TASKS.get(name)
        return tasks


def evaluation_settings(values: dict[str, Any]) -> EvaluationConfig:
    """Validate settings from the run and the command line.

    Raises:
        UserError: an option is invalid; the message names all of them.
    """
    try:
        return EvaluationConfig.model_validate(values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            given, message = problem["input"], problem["msg"].removeprefix("Value error, ")
            shown = " ".join(map(str, given)) if isinstance(given, list) else given
            option = str(problem["loc"][0]).replace("_", "-")
            problems.append(f"--{option} {shown}: {message[0].lower()}{message[1:]}")
        raise UserError("; ".join(problems)) from None
