"""Loss and accuracy of a model on labelled tokens. Shape legend: B rows, S tokens, V vocabulary, K last columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from fusiontree.data.batch import IGNORED, MicroBatch
from fusiontree.data.tokenizers import Tokenizer
from fusiontree.evaluation.synthetic import AnswerRows
from fusiontree.generation.text import REPLACEMENT
from fusiontree.models.model import FusionTreeModel
from fusiontree.models.token_layout import documents_of_positions


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


@torch.inference_mode()
def score_answers(
    model: FusionTreeModel, answers: AnswerRows, batch_size: int, never: Sequence[int] = ()
) -> AnswerScore:
    """Score labelled tokens, each given all tokens before it; ``never`` are ids that generation does not draw.

    Logits are computed from the first labelled column on, so long rows cost no more memory than their answers.
    """
    device = model.embed.weight.device
    never_N = torch.tensor(list(never), dtype=torch.int64, device=device)
    labelled_S = (answers.labels_BS != IGNORED).any(dim=0)
    keep = answers.labels_BS.shape[1] - int(labelled_S.nonzero()[0])
    nats, right, tokens, whole = 0.0, 0, 0, 0
    for input_ids_BS, labels_BS in zip(
        answers.input_ids_BS.split(batch_size), answers.labels_BS.split(batch_size), strict=True
    ):
        logits_BKV = model(input_ids_BS.to(device), logits_to_keep=keep).logits_BSV
        for logits_KV, labels_K in zip(logits_BKV, labels_BS[:, -keep:].to(device), strict=True):
            asked_K = labels_K != IGNORED
            logits_KV, labels_K = logits_KV[asked_K].float(), labels_K[asked_K]
            nats += float(torch.nn.functional.cross_entropy(logits_KV, labels_K, reduction="sum"))
            hits = int((logits_KV.index_fill(1, never_N, -torch.inf).argmax(dim=-1) == labels_K).sum())
            right, tokens, whole = right + hits, tokens + labels_K.numel(), whole + (hits == labels_K.numel())
    return AnswerScore(nats / tokens, right / tokens, whole / len(answers.labels_BS))


@torch.inference_mode()
def score_batches(
    model: FusionTreeModel, batches: Iterable[MicroBatch], tokenizer: Tokenizer | None = None
) -> CorpusScore:
    """Return the loss over packed rows, with document boundaries as in training.

    Args:
        model: on its device.
        batches: packed rows.
        tokenizer: counts the bytes of the text; None leaves them 0.
    """
    device = model.embed.weight.device
    nats, tokens, size = 0.0, 0, 0
    for batch in batches:
        labels_BS = batch.labels_BS.masked_fill(batch.row_weight_B[:, None] == 0, IGNORED)
        output = model(
            batch.input_ids_BS.to(device),
            labels_BS=labels_BS.to(device),
            documents=documents_of_positions(batch.positions_BS, device),
        )
        nats += float(output.loss_sum)
        tokens += int((labels_BS != IGNORED).sum())
        if tokenizer is not None:
            size += sum(text_bytes(tokenizer, labels_S[labels_S != IGNORED].tolist()) for labels_S in labels_BS)
    return CorpusScore(nats, tokens, size)


def text_bytes(tokenizer: Tokenizer, tokens: Sequence[int]) -> int:
    """Return the UTF-8 bytes of the text that a row's tokens decode to, without ends of documents.

    Counts no byte of a character that the row's edges cut, which decoders replace by U+FFFD: at most 6 bytes per row.
    """
    size = 0
    for is_end, document in groupby(tokens, lambda token: token == tokenizer.eos_id):
        if not is_end:
            size += len(tokenizer.decode(list(document)).strip(REPLACEMENT).encode())
    return size


@torch.inference_mode()
def score_text(
    model: FusionTreeModel, tokens: Sequence[int], *, seq_len: int, stride: int, batch_size: int, size: int = 0
) -> CorpusScore:
    """Return the loss of one text of ``size`` bytes. Every token but the first is scored once.

    Rows of ``seq_len`` tokens start ``stride`` tokens apart and score only tokens that no earlier row scored, so the
    tokens of all rows but the first have at least ``seq_len - stride`` tokens before them. The first token's share of
    the bytes is not counted.
    """
    device = model.embed.weight.device
    nats, scored = 0.0, 0
    rows = list(text_rows(tokens, seq_len, stride))
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        labels_BS = torch.stack([labels_S for _, labels_S in batch])
        output = model(torch.stack([ids_S for ids_S, _ in batch]).to(device), labels_BS=labels_BS.to(device))
        nats += float(output.loss_sum)
        scored += int((labels_BS != IGNORED).sum())
    return CorpusScore(nats, scored, size * scored / len(tokens))


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
