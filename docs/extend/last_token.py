"""An evaluation task from a user's file: does the model repeat the last token of a list of letters?"""

from __future__ import annotations

import math
from collections.abc import Iterator

from fusiontree.data.answer_rows import answer_rows
from fusiontree.evaluation.config import TASKS, TaskSpec
from fusiontree.evaluation.scoring import score_answers
from fusiontree.evaluation.tasks import Record, Setup
from fusiontree.utils.errors import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class LastToken:
    """Rows of one letter, repeated."""

    def check(self, setup: Setup) -> None:
        """Refuse rows without context."""
        if min(setup.lengths) < 2:
            raise UserError(f"rows of {min(setup.lengths)} tokens hold no repetition; use lengths of at least 2")

    def run(self, setup: Setup) -> Iterator[Record]:
        """Yield a record per length."""
        tokens = [setup.tokenizer.encode(f" {letter}")[-1] for letter in LETTERS[: setup.config.rows]]
        for length in setup.lengths:
            rows = answer_rows([[token] * (length + 1) for token in tokens], first_answer=length)
            score = score_answers(setup.scorer, rows, setup.config.batch_size)
            yield {
                "length": length,
                "rows": len(tokens),
                "token_accuracy": score.token_accuracy,
                "nats_per_token": score.nats_per_token,
                "chance_nats_per_token": math.log(setup.known_ids().numel()),
            }


TASKS.register("last_token", TaskSpec("repeat a letter", LastToken))
