"""The tasks on random tokens: needle, copy and recall."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fusiontree.data.answer_rows import AnswerRows, copy_rows, needle_rows, recall_rows
from fusiontree.evaluation.scoring import AnswerScore, score_answers
from fusiontree.evaluation.tasks import Record, Setup


class Needle:
    """Finds a pair of key and value in random tokens."""

    def check(self, setup: Setup) -> None:
        """Make the smallest part of every cell."""
        for length in _checked_lengths(setup):
            for depth in setup.config.depths:
                needle_rows(setup.alphabet, length, depth, 1, setup.config.needle_tokens, 0)

    def run(self, setup: Setup) -> Iterator[Record]:
        """Yield a record per length and depth."""
        config = setup.config
        for length in setup.lengths:
            for depth in config.depths:
                arguments = (setup.alphabet, length, depth, config.rows, config.needle_tokens, config.seed)
                score = _score(setup, needle_rows(*arguments))
                control = _score(setup, needle_rows(*arguments, with_needle=False))
                labels = {"length": length, "depth": depth, "rows": config.rows, "found": score.row_accuracy}
                yield _record(setup, labels, score, nats_per_token_without_needle=control.nats_per_token)


class Copy:
    """Repeats random tokens."""

    def check(self, setup: Setup) -> None:
        """Make the smallest part of every cell."""
        for length in _checked_lengths(setup):
            copy_rows(setup.alphabet, length, 1, 0)

    def run(self, setup: Setup) -> Iterator[Record]:
        """Yield a record per length."""
        for length in setup.lengths:
            rows = copy_rows(setup.alphabet, length, setup.config.rows, setup.config.seed)
            yield _record(setup, {"length": length, "rows": setup.config.rows}, _score(setup, rows))


class Recall:
    """Answers for many pairs of key and value in random tokens."""

    def check(self, setup: Setup) -> None:
        """Make the smallest part of every cell."""
        for length in _checked_lengths(setup):
            recall_rows(setup.alphabet, length, setup.config.recall_pairs, 1, 0)

    def run(self, setup: Setup) -> Iterator[Record]:
        """Yield a record per length."""
        config = setup.config
        for length in setup.lengths:
            rows = recall_rows(setup.alphabet, length, config.recall_pairs, config.rows, config.seed)
            labels = {"length": length, "pairs": config.recall_pairs, "rows": config.rows}
            yield _record(setup, labels, _score(setup, rows))


def _checked_lengths(setup: Setup) -> list[int]:
    setup.check_length(max(setup.lengths))
    return setup.lengths


def _score(setup: Setup, rows: AnswerRows) -> AnswerScore:
    return score_answers(setup.scorer, rows, setup.config.batch_size)


def _record(setup: Setup, labels: Record, score: AnswerScore, **control: float) -> Record:
    """Return the record of a cell, with the score of uniform guessing among the tokens."""
    return {
        **labels,
        "token_accuracy": score.token_accuracy,
        "nats_per_token": score.nats_per_token,
        **control,
        "alphabet": setup.alphabet.numel(),
        "chance_nats_per_token": math.log(setup.alphabet.numel()),
    }
