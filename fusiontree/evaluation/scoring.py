"""Loss and accuracy of a model on labelled tokens. Shape legend: B rows, S tokens, V vocabulary, K last columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusiontree.data.answer_rows import AnswerRows
from fusiontree.data.batch import IGNORED, MicroBatch
from fusiontree.evaluation.scorer import Scorer, TokenScores, micro_batch, row_table, shares
from fusiontree.evaluation.text_bytes import ByteCount


@dataclass(frozen=True)
class CorpusScore:
    """Loss over a text."""

    nats: float
    """Cross entropy summed over the scored tokens."""
    tokens: int
    """Number of scored tokens, ends of documents included."""
    text_bytes: float = 0.0
    """UTF-8 bytes of the scored tokens' text; ends of documents have none."""

    @property
    def nats_per_token(self) -> float:
        """Mean cross entropy; NaN if no token was scored."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_token(self) -> float:
        """Mean cross entropy in bits."""
        return self.nats_per_token / math.log(2)

    @property
    def bits_per_byte(self) -> float:
        """Cross entropy of all scored tokens in bits, divided by the bytes of their text; NaN if there is no text.

        Comparable between tokenizers. Source: Gao et al. 2020, "The Pile", section 3.1: BPB = (L_T / L_B) l / ln 2.
        """
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan

    @property
    def perplexity(self) -> float:
        """Exponential of the mean cross entropy; infinite if that overflows."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class AnswerScore:
    """Accuracy of the answers in several rows."""

    nats_per_token: float
    token_accuracy: float
    """Fraction of the labelled tokens that were the most likely tokens."""
    row_accuracy: float
    """Fraction of the rows in which every labelled token was the most likely token, as greedy decoding needs."""


def score_answers(scorer: Scorer, answers: AnswerRows, batch_size: int) -> AnswerScore:
    """Score labelled tokens, each given all tokens before it; all ranks call this together."""
    table_RK = answer_table(scorer, answers, batch_size)
    nats, right, tokens = (float(column) for column in table_RK.sum(0))
    whole = float((table_RK[:, 1] == table_RK[:, 2]).double().mean())
    return AnswerScore(nats / tokens, right / tokens, whole)


def answer_table(scorer: Scorer, answers: AnswerRows, batch_size: int) -> Tensor:
    """Return each row's nats, labels that greedy decoding chooses, and number of labels, fp64 ``[R, 3]``."""

    def measure(micro: MicroBatch, scores: TokenScores) -> Tensor:
        nats_B = -scores.log_likelihood.sum(1, dtype=torch.float64)
        return torch.stack([nats_B, scores.chosen.sum(1), (micro.labels_BS != IGNORED).sum(1)], dim=1)

    batches = answer_batches(scorer, answers, batch_size)
    return row_table(scorer, batches, len(answers.labels_BS), 3, measure)


def answer_batches(scorer: Scorer, answers: AnswerRows, batch_size: int) -> Iterator[MicroBatch]:
    """Yield this rank's share of rows of one document each."""
    count = len(answers.labels_BS)
    for numbers in shares(count, batch_size, scorer):
        rows = [min(number, count - 1) for number in numbers]  # a filler has some row's tokens and no label
        yield micro_batch(answers.input_ids_BS[rows], answers.labels_BS[rows], numbers)


def score_positions(scorer: Scorer, batches: Iterable[MicroBatch], rows: int, seq_len: int) -> Tensor:
    """Return nats and tokens by row and bucket of context, fp64 ``[R, K, 2]``; all ranks call this together.

    Bucket 0 holds labels with one token of their document before them in the row, bucket ``k`` those with
    2^(k-1) + 1 to 2^k tokens, so that rows of a power of two end with a full bucket.
    """
    buckets = (seq_len - 1).bit_length() + 1

    def measure(micro: MicroBatch, scores: TokenScores) -> Tensor:
        asked_BS = micro.labels_BS != IGNORED
        exponents_BS = torch.frexp(micro.positions_BS.double()).exponent.long()  # the bit length
        values_BS2 = torch.stack([-scores.log_likelihood.double(), asked_BS.double()], dim=-1)
        values_BS2 = values_BS2.masked_fill(~asked_BS[..., None], 0)
        table_BK2 = torch.zeros(len(asked_BS), buckets, 2, dtype=torch.float64)
        return table_BK2.scatter_add_(1, exponents_BS[..., None].expand_as(values_BS2), values_BS2).flatten(1)

    return row_table(scorer, batches, rows, 2 * buckets, measure).view(rows, buckets, 2)


def score_batches(
    scorer: Scorer, batches: Iterable[MicroBatch], rows: int, byte_count: ByteCount | None = None
) -> CorpusScore:
    """Return the loss over packed rows, with document boundaries as in training; all ranks call this together.

    Args:
        scorer: the model.
        batches: this rank's share of the rows.
        rows: of all ranks, numbered from 0.
        byte_count: counts the bytes of the text; None leaves them 0.
    """

    def measure(micro: MicroBatch, scores: TokenScores) -> Tensor:
        labels_BS = micro.labels_BS
        size = [0 if byte_count is None else byte_count.count(row[row != IGNORED].tolist()) for row in labels_BS]
        nats_B = -scores.log_likelihood.sum(1, dtype=torch.float64)
        return torch.stack([nats_B, (labels_BS != IGNORED).sum(1), torch.tensor(size)], dim=1)

    nats, tokens, size = row_table(scorer, batches, rows, 3, measure).sum(0).tolist()
    return CorpusScore(nats, int(tokens), int(size))


def score_text(
    scorer: Scorer,
    tokens: Sequence[int],
    *,
    seq_len: int,
    stride: int,
    batch_size: int,
    size: int = 0,
    byte_count: ByteCount | None = None,
) -> CorpusScore:
    """Return the loss of one text of ``size`` bytes. Every token but the first is scored once.

    Rows of ``seq_len`` tokens start ``stride`` tokens apart and score only tokens that no earlier row scored, so the
    tokens of all rows but the first have at least ``seq_len - stride`` tokens before them. The first token's bytes are
    not counted; without an exact ``byte_count`` these are its share of ``size``. All ranks call this together.
    """
    ids_RS, labels_RS = (torch.stack(part) for part in zip(*text_rows(tokens, seq_len, stride), strict=True))
    nats, _, scored = answer_table(scorer, AnswerRows(ids_RS, labels_RS), batch_size).sum(0).tolist()
    if byte_count is not None and byte_count.is_exact:
        return CorpusScore(nats, int(scored), byte_count.count(tokens[1:]))
    return CorpusScore(nats, int(scored), size * scored / len(tokens))


def text_rows(tokens: Sequence[int], seq_len: int, stride: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Yield ``(input_ids_S, labels_S)`` of :func:`score_text`; all rows have the same length.

    Raises:
        ValueError: ``stride`` is longer than a row, so that tokens would be left out.
    """
    if not 1 <= stride <= seq_len:
        raise ValueError(f"stride {stride} is not between 1 and seq_len {seq_len}")
    text_T = torch.tensor(tokens)
    length = min(seq_len, len(tokens) - 1)
    scored = 1  # the first token has nothing before it
    start = 0
    while scored < len(tokens):
        start = min(start, len(tokens) - 1 - length)  # the last row ends with the text
        labels_S = text_T[start + 1 : start + length + 1].clone()
        labels_S[: scored - start - 1] = IGNORED
        yield text_T[start : start + length], labels_S
        scored = start + length + 1
        start += stride
