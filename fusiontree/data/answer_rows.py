"""Rows of random tokens that contain their answers: needle, copy and recall.

Random tokens have no meaning, so a score above chance shows that the model retrieved the answer from the row.

Shape legend: B rows, S tokens of a row, A tokens of the alphabet, L tokens of a row and its last label.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusiontree.data.batch import IGNORED
from fusiontree.utils.errors import UserError
from fusiontree.utils.hashing import stable_hash


@dataclass(frozen=True)
class AnswerRows:
    """Rows with labels only on answers."""

    input_ids_BS: Tensor
    labels_BS: Tensor
    """The next token of each token; IGNORED on tokens that are not scored."""


def needle_rows(
    alphabet_A: Tensor, length: int, depth: float, rows: int, needle_tokens: int, seed: int, *, with_needle: bool = True
) -> AnswerRows:
    """Return rows of random tokens that contain a key and its value, and end with the key again; the value is scored.

    Args:
        alphabet_A: int64, tokens to draw from.
        length: tokens of a row.
        depth: position of the needle: 0 at the start, 1 just before the question.
        rows: number of rows.
        needle_tokens: tokens of the key, and of the value.
        seed: of the tokens, which are the same with and without the needle, apart from the needle.
        with_needle: False replaces the needle by random tokens, as a control that no model can answer.

    Raises:
        UserError: the row is too short, or the depth is not between 0 and 1.
    """
    if not 0 <= depth <= 1:
        raise UserError(f"depth {depth} is not between 0 and 1")
    haystack = length + 1 - 4 * needle_tokens
    if haystack < 0:
        raise UserError(
            f"a row of {length} tokens holds no needle and question of 4 x {needle_tokens} tokens; use longer rows or "
            f"shorter needles"
        )
    generator = _generator("needle", seed, length, round(depth * 1e6))
    pair_BP = _draw(alphabet_A, (rows, 2 * needle_tokens), generator)
    filler_BH = _draw(alphabet_A, (rows, haystack), generator)
    decoy_BP = _draw(alphabet_A, (rows, 2 * needle_tokens), generator)
    at = round(depth * haystack)
    hidden_BP = pair_BP if with_needle else decoy_BP
    text_BL = torch.cat([filler_BH[:, :at], hidden_BP, filler_BH[:, at:], pair_BP], dim=1)
    return answer_rows(text_BL, first_answer=length + 1 - needle_tokens)


def copy_rows(alphabet_A: Tensor, length: int, rows: int, seed: int) -> AnswerRows:
    """Return rows of random tokens, repeated once; every token of the repetition but the first is scored.

    Raises:
        UserError: the row is too short.
    """
    half = (length + 1) // 2
    if half < 2:
        raise UserError(f"a row of {length} tokens holds no repetition; copy needs at least 3")
    first_BH = _draw(alphabet_A, (rows, half), _generator("copy", seed, length))
    return answer_rows(torch.cat([first_BH, first_BH], dim=1), first_answer=half + 1)


def recall_rows(alphabet_A: Tensor, length: int, pairs: int, rows: int, seed: int) -> AnswerRows:
    """Return rows of random tokens that contain pairs of key and value, and end with all keys and their values.

    Multi-query associative recall (Arora et al. 2023, "Zoology"). The first half of the alphabet are keys, distinct
    within a row; values and filler come from the other half.

    Raises:
        UserError: the row is too short for the pairs, or the alphabet has too few keys.
    """
    half = alphabet_A.numel() // 2
    context = length + 1 - 2 * pairs
    if context < 2 * pairs:
        raise UserError(f"a row of {length} tokens holds no {pairs} pairs and questions; recall needs {4 * pairs - 1}")
    if pairs > half:
        raise UserError(f"{pairs} different keys cannot be drawn from {half} tokens; use fewer recall_pairs")
    generator = _generator("recall", seed, length, pairs)
    text_BL = _draw(alphabet_A[half:], (rows, length + 1), generator)
    labels_BL = torch.full_like(text_BL, IGNORED)
    for row in range(rows):
        key_P = alphabet_A[:half][torch.randperm(half, generator=generator)[:pairs]]
        value_P = _draw(alphabet_A[half:], (pairs,), generator)
        place_P = torch.randperm(context // 2, generator=generator)[:pairs] * 2
        text_BL[row, place_P], text_BL[row, place_P + 1] = key_P, value_P
        asked_P = torch.randperm(pairs, generator=generator)
        question_P = context + 2 * torch.arange(pairs)
        text_BL[row, question_P], text_BL[row, question_P + 1] = key_P[asked_P], value_P[asked_P]
        labels_BL[row, question_P + 1] = value_P[asked_P]
    return AnswerRows(text_BL[:, :-1], labels_BL[:, 1:])


def answer_rows(text_BL: Tensor | list[list[int]], first_answer: int) -> AnswerRows:
    """Return rows whose tokens from index ``first_answer`` on are scored; the last token is a label only."""
    text_BL = torch.as_tensor(text_BL)
    labels_BS = text_BL[:, 1:].clone()
    labels_BS[:, : first_answer - 1] = IGNORED
    return AnswerRows(text_BL[:, :-1], labels_BS)


def _generator(*parts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(stable_hash(*parts) >> 1)


def _draw(alphabet_A: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return alphabet_A[torch.randint(alphabet_A.numel(), shape, generator=generator)]
