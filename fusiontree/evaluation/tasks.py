"""An evaluation: tasks over one model, each returning plain records for JSON and table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from fusiontree.data.config import DataConfig
from fusiontree.data.tokenizers import Tokenizer
from fusiontree.data.validation import ValidationData
from fusiontree.evaluation.config import TASKS, EvaluationConfig
from fusiontree.evaluation.long_text import LongText
from fusiontree.evaluation.scorer import Scorer
from fusiontree.models.config import ModelConfig
from fusiontree.utils.errors import UserError

Record = dict[str, Any]

ALPHABET_ROWS = 64
"""Rows of the (first) dataset whose tokens form the alphabet ``data``."""


@dataclass(frozen=True)
class Setup:
    """Everything that a task reads: model sizes, tokenizer, settings and data; and the scorer that it calls."""

    model: ModelConfig
    tokenizer: Tokenizer
    config: EvaluationConfig
    seq_len: int
    """Row length of tasks on text, in tokens."""
    scorer: Scorer
    data_settings: dict[str, Any] = field(default_factory=dict)
    """The run's ``data`` section: its validation sets, and how remote datasets are read."""

    @property
    def lengths(self) -> list[int]:
        """Row lengths of tasks on made-up rows, in tokens."""
        return self.config.lengths or [self.seq_len]

    def known_ids(self) -> torch.Tensor:
        """Return the ids of the tokenizer's tokens without the end of a document, int64."""
        info = self.tokenizer.info
        unknown = torch.tensor([*self.tokenizer.unknown_ids(info.vocab_size), info.eos_id], dtype=torch.int64)
        tokens = torch.arange(info.vocab_size)
        return tokens[~torch.isin(tokens, unknown)]

    @cached_property
    def alphabet(self) -> torch.Tensor:
        """Tokens that random rows are made of, without the end of a document."""
        if self.config.alphabet == "vocabulary":
            return self.known_ids()
        data = next(iter(self.datasets(ALPHABET_ROWS, shared=False).values()))
        tokens = [batch.input_ids_BS[batch.row_weight_B > 0].flatten() for batch in data.micro_batches()]
        unique = torch.cat(tokens).unique()
        return unique[unique != self.tokenizer.eos_id]

    @cached_property
    def long_text(self) -> LongText:
        """Text to hide needles in: that of ``config.text``, else that of the (first) dataset.

        Raises:
            UserError: a file cannot be read, or there is no dataset.
        """
        if self.config.text:
            return LongText.of_files(self.tokenizer, [self.read_text(file)[0] for file in self.config.text])
        return LongText.of_source(self.tokenizer, next(iter(self.datasets(0).values())).source)

    def read_text(self, file: str) -> tuple[list[int], int]:
        """Return a file's tokens and its size in bytes.

        Raises:
            UserError: it cannot be read as UTF-8, or is too short to predict a token.
        """
        try:
            text = Path(file).read_bytes().decode("utf-8")  # reading it as text would change line ends
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"text file '{file}' cannot be read as UTF-8: {error}") from None
        tokens = self.tokenizer.encode(text)
        if len(tokens) < 2:
            raise UserError(f"text file '{file}' has {len(tokens)} tokens; at least 2 are needed to predict one")
        return tokens, len(text.encode())

    def datasets(self, max_rows: int, *, shared: bool = True) -> dict[str, ValidationData]:
        """Open the datasets to evaluate, by name: ``config.data``, else every validation set of the run.

        Args:
            max_rows: of each dataset; 0 means all.
            shared: read this rank's share of the rows instead of all.

        Raises:
            UserError: there is no dataset, it cannot be read, or another tokenizer made it.
        """
        given = self.config.data or self.data_settings.get("validation")
        if given is None:
            raise UserError("no dataset is given, and the run has no data.validation; give --data DIR")
        config = DataConfig.model_validate({**self.data_settings, "train": "(not read)", "validation": given})
        found = {}
        for name, dataset in config.validation_sets.items():
            data = found[name] = ValidationData(
                config,
                seq_len=self.seq_len,
                micro_batch_size=self.config.batch_size,
                max_rows=max_rows,
                vocab_size=self.model.vocab_size,
                dp_rank=self.scorer.dp_rank if shared else 0,
                dp_size=self.scorer.dp_size if shared else 1,
                name=name,
            )
            made_with = data.source.tokenizer
            used = self.tokenizer.info
            if (made_with.sha256, made_with.eos_id) != (used.sha256, used.eos_id):
                raise UserError(
                    f"dataset '{dataset.path}' was made with tokenizer '{made_with.name}' and the model was trained "
                    f"with '{used.name}'; perplexity would mean nothing"
                )
        return found

    def check_length(self, length: int) -> None:
        """Raise UserError if the model has no position encoding for rows of ``length`` tokens."""
        limit = self.model.max_position_embeddings
        if length > limit and self.model.srte_encoding == "learnable":
            raise UserError(
                f"rows of {length} tokens are longer than the model's max_position_embeddings {limit}, and its "
                f"learnable srte_encoding has no entries there; evaluate at most {limit}"
            )


class Task(Protocol):
    """Measures one ability of a model. ``TASKS.register(NAME, TaskSpec(ABOUT, MyTask))`` adds one."""

    def check(self, setup: Setup) -> None:
        """Find errors in settings and inputs; called before the first task runs, and cheap.

        Raises:
            UserError: a setting or an input is wrong.
        """
        ...

    def run(self, setup: Setup) -> Iterator[Record]:
        """Yield the records, all with the same keys, equal on every rank.

        All ranks call this together. Each calls ``setup.scorer`` for its share of the rows, equally often.
        """
        ...


def run_tasks(setup: Setup, report: Callable[[str], None] = lambda name: None) -> dict[str, list[Record]]:
    """Return the records of every task of ``setup.config.tasks``; all ranks call this together.

    Args:
        setup: model, tokenizer, settings, data.
        report: called with the name of each task that begins.

    Raises:
        UserError: a dataset or file cannot be read, or a length does not fit; found before the first task runs.
    """
    tasks = {name: TASKS.get(name).load() for name in setup.config.tasks}
    for task in tasks.values():
        task.check(setup)
    results: dict[str, list[Record]] = {}
    for name, task in tasks.items():
        report(name)
        results[name] = list(task.run(setup))
    return results


def table(results: dict[str, list[Record]]) -> str:
    """Return the records as aligned text, one block per task."""
    blocks = []
    for task, records in results.items():
        header = list(records[0])
        lines = [header, *([_cell(record[name]) for name in header] for record in records)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        rows = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        blocks.append("\n".join([task, *rows]))
    return "\n\n".join(blocks)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
