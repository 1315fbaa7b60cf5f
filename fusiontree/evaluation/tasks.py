"""The tasks of an evaluation, each returning plain records for JSON and table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fusiontree.data.config import DataConfig
from fusiontree.data.tokenizers import Tokenizer
from fusiontree.data.validation import ValidationData
from fusiontree.evaluation.config import EvaluationConfig
from fusiontree.evaluation.scoring import AnswerScore, CorpusScore, score_answers, score_batches, score_text
from fusiontree.evaluation.synthetic import AnswerRows, copy_rows, needle_rows, recall_rows
from fusiontree.models.model import FusionTreeModel
from fusiontree.utils.errors import UserError

Record = dict[str, Any]

ALPHABET_ROWS = 64
"""Rows of the (first) dataset whose tokens form the alphabet ``data``."""


@dataclass(frozen=True)
class Evaluation:
    """A model, its tokenizer, and the tasks to run."""

    model: FusionTreeModel
    tokenizer: Tokenizer
    config: EvaluationConfig
    seq_len: int
    """Row length of perplexity and text, in tokens."""
    data_settings: dict[str, Any] = field(default_factory=dict)
    """The run's ``data`` section: its validation sets, and how remote datasets are read."""

    def run(self, report: Callable[[str], None]) -> dict[str, list[Record]]:
        """Return the records of every task; calls ``report`` with the name of each task that begins.

        Raises:
            UserError: a dataset or file cannot be read, or a length does not fit; found before the first task runs.
        """
        self._check()
        tasks: dict[str, Callable[[], Iterator[Record]]] = {
            "perplexity": self._perplexity,
            "text": self._text,
            "needle": self._needle,
            "copy": self._copy,
            "recall": self._recall,
        }
        results: dict[str, list[Record]] = {}
        for name in dict.fromkeys(self.config.tasks):
            report(name)
            results[name] = list(tasks[name]())
        return results

    @property
    def _lengths(self) -> list[int]:
        return self.config.lengths or [self.seq_len]

    @cached_property
    def _alphabet(self) -> torch.Tensor:
        """Tokens that random rows are made of, without the end of a document."""
        info = self.tokenizer.info
        unknown = torch.tensor(self.tokenizer.unknown_ids(info.vocab_size), dtype=torch.int64)
        tokens = torch.arange(info.vocab_size)
        tokens = tokens[~torch.isin(tokens, unknown)]
        if self.config.alphabet == "data":
            batches = next(iter(self._datasets(ALPHABET_ROWS).values())).micro_batches()
            tokens = torch.cat([batch.input_ids_BS[batch.row_weight_B > 0].flatten() for batch in batches]).unique()
        return tokens[tokens != info.eos_id]

    def _check(self) -> None:
        config, limit = self.config, self.model.config.max_position_embeddings
        lengths = set()
        if {"perplexity", "text"} & set(config.tasks):
            lengths.add(self.seq_len)
        if {"needle", "copy", "recall"} & set(config.tasks):
            lengths |= set(self._lengths)
        if max(lengths) > limit and self.model.config.srte_encoding == "learnable":
            raise UserError(
                f"rows of {max(lengths)} tokens are longer than the model's max_position_embeddings {limit}, and its "
                f"learnable srte_encoding has no entries there; evaluate at most {limit}"
            )
        if "perplexity" in config.tasks:
            self._datasets(config.max_rows)
        if "text" in config.tasks:
            if not config.text:
                raise UserError("the task text needs a file; give --text FILE")
            for file in config.text:
                self._read(file)
            if not 1 <= self._stride <= self.seq_len:
                raise UserError(
                    f"stride {self._stride} is not between 1 and seq_len {self.seq_len}; tokens would be left out"
                )
        for length in self._lengths:  # cheap: the errors of rows that are too short
            if "needle" in config.tasks:
                for depth in config.depths:
                    needle_rows(self._alphabet, length, depth, 1, config.needle_tokens, 0)
            if "copy" in config.tasks:
                copy_rows(self._alphabet, length, 1, 0)
            if "recall" in config.tasks:
                recall_rows(self._alphabet, length, config.recall_pairs, 1, 0)

    @property
    def _stride(self) -> int:
        return self.config.stride or max(1, self.seq_len // 2)

    def _datasets(self, max_rows: int) -> dict[str, ValidationData]:
        """Open the datasets to evaluate, by name: ``config.data``, else every validation set of the run."""
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
                vocab_size=self.model.config.vocab_size,
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

    def _perplexity(self) -> Iterator[Record]:
        for name, data in self._datasets(self.config.max_rows).items():
            score = score_batches(self.model, data.micro_batches(), self.tokenizer)
            labels = {"set": name} if name else {}
            path = data.source.place
            yield {**labels, "data": path, "seq_len": self.seq_len, "rows": data.rows, **_corpus(score)}

    def _read(self, file: str) -> tuple[list[int], int]:
        """Return a file's tokens and its size in bytes."""
        try:
            text = Path(file).read_bytes().decode("utf-8")  # reading it as text would change line ends
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"text file '{file}' cannot be read as UTF-8: {error}") from None
        tokens = self.tokenizer.encode(text)
        if len(tokens) < 2:
            raise UserError(f"text file '{file}' has {len(tokens)} tokens; at least 2 are needed to predict one")
        return tokens, len(text.encode())

    def _text(self) -> Iterator[Record]:
        sizes = {"seq_len": self.seq_len, "stride": self._stride}
        for file in self.config.text:
            tokens, size = self._read(file)
            score = score_text(self.model, tokens, **sizes, batch_size=self.config.batch_size, size=size)
            yield {"file": file, **sizes, **_corpus(score)}

    def _needle(self) -> Iterator[Record]:
        config = self.config
        for length in self._lengths:
            for depth in config.depths:
                arguments = (self._alphabet, length, depth, config.rows, config.needle_tokens, config.seed)
                score = self._score(needle_rows(*arguments))
                control = self._score(needle_rows(*arguments, with_needle=False))
                labels = {"length": length, "depth": depth, "rows": config.rows, "found": score.row_accuracy}
                yield self._answered(labels, score, nats_per_token_without_needle=control.nats_per_token)

    def _copy(self) -> Iterator[Record]:
        for length in self._lengths:
            rows = copy_rows(self._alphabet, length, self.config.rows, self.config.seed)
            yield self._answered({"length": length, "rows": self.config.rows}, self._score(rows))

    def _recall(self) -> Iterator[Record]:
        config = self.config
        for length in self._lengths:
            rows = recall_rows(self._alphabet, length, config.recall_pairs, config.rows, config.seed)
            labels = {"length": length, "pairs": config.recall_pairs, "rows": config.rows}
            yield self._answered(labels, self._score(rows))

    def _score(self, rows: AnswerRows) -> AnswerScore:
        never = self.tokenizer.unknown_ids(self.model.config.vocab_size)
        return score_answers(self.model, rows, self.config.batch_size, never)

    def _answered(self, labels: Record, score: AnswerScore, **control: float) -> Record:
        """Return the record of a cell, with the score of uniform guessing among the tokens."""
        return {
            **labels,
            "token_accuracy": score.token_accuracy,
            "nats_per_token": score.nats_per_token,
            **control,
            "alphabet": self._alphabet.numel(),
            "chance_nats_per_token": math.log(self._alphabet.numel()),
        }


def _corpus(score: CorpusScore) -> Record:
    return {
        "tokens": score.tokens,
        "nats_per_token": score.nats_per_token,
        "perplexity": score.perplexity,
        "bits_per_token": score.bits_per_token,
        "bits_per_byte": score.bits_per_byte,
    }


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
