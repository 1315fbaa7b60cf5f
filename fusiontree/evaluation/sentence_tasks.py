"""Retrieval tasks in sentences, of the kinds of RULER (Hsieh et al. 2024): needles, variable tracking, aggregation.

Each row ends with a question. The right answer is scored against wrong ones by likelihood, and by whether greedy
decoding writes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fusiontree.data.batch import FILLER, IGNORED, MicroBatch
from fusiontree.evaluation.scorer import TokenScores, micro_batch, row_table, shares
from fusiontree.evaluation.sentences import Question, Tokens, Writer, encoder
from fusiontree.evaluation.tasks import Record, Setup
from fusiontree.utils.errors import UserError


class SentenceRow(NamedTuple):
    """A row before its answer is chosen."""

    context: list[int]
    question: Question
    guesses: float
    """Number of equally likely answers for one who knows only their form."""


class SentenceTask:
    """A task whose rows end with a question."""

    name: str
    by_depth = False
    """Whether the place of the answer in the row is set by ``depths``; else it is random."""

    def row(self, setup: Setup, writer: Writer, length: int, depth: float) -> SentenceRow:
        """Return a row whose context, prompt and answer have ``length + 1`` tokens together.

        Raises:
            UserError: the row is too short.
        """
        raise NotImplementedError

    def check(self, setup: Setup) -> None:
        """Write one row of the shortest length at each depth."""
        setup.check_length(max(setup.lengths))
        for depth in self._depths(setup):
            if not 0 <= depth <= 1:
                raise UserError(f"depth {depth} is not between 0 and 1")
            self.row(setup, Writer(encoder(setup.tokenizer), 0), min(setup.lengths), depth)

    def run(self, setup: Setup) -> Iterator[Record]:
        """Yield a record per length and, if the task has depths, per depth."""
        encode = encoder(setup.tokenizer)
        config = setup.config
        for length in setup.lengths:
            for depth in self._depths(setup):

                def write(number: int, length: int = length, depth: float = depth) -> SentenceRow:
                    seed = (self.name, config.seed, length, round(depth * 1e6), number)
                    return self.row(setup, Writer(encode, *seed), length, depth)

                labels = {"length": length, **({"depth": depth} if self.by_depth else {}), "rows": config.rows}
                yield labels | _score(setup, _Rows(write, config.rows, config.distractors + 1))

    def _depths(self, setup: Setup) -> list[float]:
        return setup.config.depths if self.by_depth else [0.0]


class _Rows:
    """The rows of a cell, each once per answer: row ``number`` has answer ``number % choices``."""

    def __init__(self, write: Callable[[int], SentenceRow], rows: int, choices: int) -> None:
        self.write, self.rows, self.choices = write, rows, choices
        self._last: tuple[int, SentenceRow] | None = None

    def text(self, number: int) -> SentenceRow:
        number //= self.choices
        if self._last is None or self._last[0] != number:
            self._last = (number, self.write(number))
        return self._last[1]

    def __len__(self) -> int:
        return self.rows * self.choices

    def labelled(self, number: int) -> tuple[list[int], list[int]]:
        """Return the tokens of a row and whether each is scored."""
        row = self.text(number)
        tokens = [*row.context, *row.question.prompt]
        scored = [0] * len(tokens)
        for piece, is_scored in row.question.answers[number % self.choices]:
            tokens += piece
            scored += [int(is_scored)] * len(piece)
        return tokens, scored

    def batch(self, numbers: list[int]) -> MicroBatch:
        rows = [self.labelled(0 if number == FILLER else number) for number in numbers]
        text_BL = torch.tensor([tokens for tokens, _ in rows])
        scored_BL = torch.tensor([scored for _, scored in rows]) > 0
        return micro_batch(text_BL[:, :-1], text_BL[:, 1:].masked_fill(~scored_BL[:, 1:], IGNORED), numbers)


def _score(setup: Setup, rows: _Rows) -> Record:
    """Return the scores of a cell's rows, with those of guessing."""
    config = setup.config

    def measure(micro: MicroBatch, scores: TokenScores) -> torch.Tensor:
        asked_BS = micro.labels_BS != IGNORED
        nats_B = -scores.log_likelihood.sum(1, dtype=torch.float64)
        return torch.stack([nats_B, (scores.chosen | ~asked_BS).all(1), asked_BS.sum(1)], dim=1)

    batches = (rows.batch(numbers) for numbers in shares(len(rows), config.batch_size, setup.scorer))
    table_RCK = row_table(setup.scorer, batches, len(rows), 3, measure).view(rows.rows, rows.choices, 3)
    nats_RC, exact_R, tokens_R = table_RCK[..., 0], table_RCK[:, 0, 1], table_RCK[:, 0, 2]
    best_RC = nats_RC == nats_RC.min(dim=1, keepdim=True).values
    credit_R = best_RC[:, 0] / best_RC.sum(1, dtype=torch.float64)  # several best answers share the credit
    return {
        "choice_accuracy": float(credit_R.mean()),
        "chance_choice_accuracy": 1 / rows.choices,
        "exact_match": float(exact_R.mean()),
        "chance_exact_match": 1 / rows.text(0).guesses,
        "nats_per_token": float(nats_RC[:, 0].sum() / tokens_R.sum()),
        "chance_nats_per_token": math.log(setup.known_ids().numel()),
        "choices": rows.choices,
        "answer_tokens": float(tokens_R.mean()),
    }


def spread_depths(writer: Writer, count: int) -> list[float]:
    """Return random depths in ascending order."""
    return sorted(writer.random.random() for _ in range(count))


def single_values(writer: Writer, values: list[str]) -> list[list[tuple[Tokens, bool]]]:
    """Return answers of one value each."""
    return [[(writer.encode(" " + value), True)] for value in values]
