"""Scorers without a model: each computes logits by hand."""

from __future__ import annotations

import re
from collections import Counter

import torch
from torch import Tensor

from fusiontree.data.batch import MicroBatch
from fusiontree.data.tokenizers import Tokenizer
from fusiontree.ops.cross_entropy import TokenScores


class LogitsScorer:
    """Scores labels by the logits that a subclass computes for each row."""

    dp_rank, dp_size = 0, 1

    def logits(self, text: list[int]) -> Tensor:
        """Return the logits ``[S, V]`` of the tokens after each token of a row."""
        raise NotImplementedError

    def score(self, micro: MicroBatch) -> TokenScores:
        """Return the scores of all labels."""
        logits_BSV = torch.stack([self.logits(text) for text in micro.input_ids_BS.tolist()])
        asked_BS = micro.labels_BS >= 0
        labels_BS = micro.labels_BS.clamp(min=0)
        likelihood_BS = logits_BSV.log_softmax(-1).gather(-1, labels_BS[..., None])[..., 0]
        return TokenScores(likelihood_BS.masked_fill(~asked_BS, 0), (logits_BSV.argmax(-1) == labels_BS) & asked_BS)

    def sum_over_rows(self, values: Tensor) -> Tensor:
        """Return ``values``: one process has all rows."""
        return values


class Uniform(LogitsScorer):
    """Knows nothing."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def logits(self, text: list[int]) -> Tensor:
        """Return equal logits."""
        return torch.zeros(len(text), self.vocab_size)


class Reader(Uniform):
    """Reads the row's text up to a question and answers it, knowing the questions but not how rows are made."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer.info.vocab_size)
        self.tokenizer = tokenizer

    def score(self, micro: MicroBatch) -> TokenScores:
        """Return the scores of all labels; an answer's tokens are predicted from the text before it alone."""
        likelihood_BS = torch.zeros(micro.labels_BS.shape)
        chosen_BS = torch.zeros_like(micro.labels_BS, dtype=torch.bool)
        for row, (ids, labels) in enumerate(zip(micro.input_ids_BS.tolist(), micro.labels_BS.tolist(), strict=True)):
            expected: list[int] = []
            for at, label in enumerate(labels):
                if label < 0:
                    expected = []
                    continue
                if at == 0 or labels[at - 1] < 0:  # an answer begins
                    pieces = answer(self.tokenizer.decode(ids[: at + 1]))
                    expected = [token for piece in pieces for token in self.tokenizer.encode(piece)]
                hit = bool(expected) and expected.pop(0) == label
                chosen_BS[row, at], likelihood_BS[row, at] = hit, -0.01 if hit else -10.0
        return TokenScores(likelihood_BS, chosen_BS)


def answer(text: str) -> list[str]:
    """Return the answer to the question on the text's last line, in pieces that are encoded each by itself."""
    context, _, question = text.rpartition("\n")
    if match := re.fullmatch(r"The code of (\w+) is", question):
        return [" " + re.findall(rf"The code of {match[1]} is (\d+)\.", context)[0]]
    if match := re.fullmatch(r"The codes of (\w+), from first to last, are", question):
        return _listing(re.findall(rf"The code of {match[1]} is (\d+)\.", context))
    if match := re.fullmatch(r"The variables that are (\d+) are", question):
        found: list[str] = []
        for name, source in re.findall(r"Set (\w+) to (\w+)\.", context):
            if source in (match[1], *found):
                found.append(name)
        return _listing(found)
    counts = [word for word, _ in Counter(re.findall(r"\w+", context)).most_common(3)]
    return _listing(counts[:1] if question.startswith("The word that") else counts)


def _listing(items: list[str]) -> list[str]:
    return [" " + items[0], *(piece for item in items[1:] for piece in (",", " " + item))]
