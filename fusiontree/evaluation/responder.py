"""Answers to the requests of lm-evaluation-harness: log-likelihoods and continuations of texts.

Needs no lm_eval; :mod:`fusiontree.evaluation.lm_eval_model` makes the harness's model of it. How a continuation is
tokenized, how long texts are cut, and which windows score a whole text follow the harness's adapter of Hugging Face
models, so that an exported model gets the same answers there.

Shape legend: B rows, S tokens, C channels, N scored tokens, M token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

from fusiontree.data.tokenizers import Tokenizer
from fusiontree.evaluation.generation_options import GenerationOptions
from fusiontree.generation.decoding import generate
from fusiontree.generation.running_batch import pad_rows
from fusiontree.models.model import FusionTreeModel
from fusiontree.ops.cross_entropy import linear_token_scores
from fusiontree.utils.errors import UserError
from fusiontree.utils.hashing import stable_hash

LOGITS_AT_ONCE = 1 << 26
"""Maximum number of logits computed together; 256 MiB in fp32."""

COLUMNS = {"cuda": 64}
"""Rows are padded to a multiple of it, so that kernels which are compiled per length see few lengths."""

Answered = Callable[[int, Any], None]


class Scored(NamedTuple):
    """A continuation given its context."""

    logprob: float
    """Sum of the tokens' log-probabilities, in nats."""
    is_greedy: bool
    """Whether greedy decoding writes the continuation."""


class ScoreRequest(NamedTuple):
    """Tokens of a context, at least one, and of its continuation, at least one."""

    context: list[int]
    continuation: list[int]


def nobody(index: int, answer: Any) -> None:
    """Ignore an answer."""


@dataclass(frozen=True)
class Responder:
    """A model that answers requests. Rows of a batch are sorted by length; answers have the requests' order.

    Raises:
        UserError: a size is wrong, or longer than a learnable SRTE's table.
    """

    model: FusionTreeModel
    tokenizer: Tokenizer
    batch_size: int = 4
    """Rows computed together."""
    max_length: int = 0
    """Maximum number of tokens of a row; longer contexts lose their first tokens. 0 means the model's length."""
    max_gen_toks: int = 256
    """New tokens of a continuation whose request names no number."""
    padding_side: Literal["left", "right"] = "left"
    """Where rows of log-likelihoods are padded; no answer depends on it. Prompts are always padded on the left."""
    seed: int = 0
    """Of sampled continuations."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_length", 0), ("max_gen_toks", 1)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"{name} is {value}; it must be at least {least}")
        if self.padding_side not in ("left", "right"):
            raise UserError(f"padding_side is '{self.padding_side}'; use left or right")
        self.model.check_length(self.length)

    @property
    def length(self) -> int:
        """Maximum number of tokens of a row."""
        return self.max_length or self.model.config.max_position_embeddings

    @cached_property
    def never(self) -> list[int]:
        """Ids that stand for no token; generation does not draw them."""
        return self.tokenizer.unknown_ids(self.model.config.vocab_size)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]], on_answer: Answered = nobody) -> list[Scored]:
        """Score each ``(context, continuation)``; an empty context is the end-of-document token.

        Args:
            pairs: the texts.
            on_answer: called with index and answer as soon as a batch is done.

        Raises:
            UserError: a continuation adds no token, or is longer than a row; found before any computation.
        """
        return self.score([self.encode_pair(*pair) for pair in pairs], on_answer)

    def loglikelihood_rolling(self, texts: Sequence[str], on_answer: Answered = nobody) -> list[float]:
        """Return each text's log-probability after an end-of-document token, in windows of at most a row."""
        windows: list[ScoreRequest] = []
        text_of_window: list[int] = []
        for index, text in enumerate(texts):
            mine = list(rolling_windows(self.tokenizer.encode(text), self.tokenizer.eos_id, self.length))
            windows += mine
            text_of_window += [index] * len(mine)
        totals = [0.0] * len(texts)
        for index, scored in zip(text_of_window, self.score(windows), strict=True):
            totals[index] += scored.logprob
        for index, total in enumerate(totals):
            on_answer(index, total)
        return totals

    def generate_until(self, requests: Sequence[tuple[str, dict[str, Any]]], on_answer: Answered = nobody) -> list[str]:
        """Continue each context as its options say; contexts of one batch have equal options.

        A sampled text depends on seed, context, options and the number of equal requests before it, not on its batch.

        Raises:
            UserError: an option is unknown or wrong, or leaves no room for a context; found before any computation.
        """
        groups: dict[GenerationOptions, list[int]] = {}
        prompts: list[list[int]] = []
        seeds: list[int] = []
        times: dict[tuple[str, GenerationOptions], int] = {}
        for index, (context, given) in enumerate(requests):
            options = GenerationOptions.of(given, self.max_gen_toks)
            room = self.length - options.max_new_tokens
            if room < 1:
                raise UserError(
                    f"a request asks for {options.max_new_tokens} new tokens, and rows of at most {self.length} tokens "
                    f"leave no room for its context; lower max_gen_toks (of the task, or of the model) or raise "
                    f"max_length"
                )
            prompts.append((self.tokenizer.encode(context) or [self.tokenizer.eos_id])[-room:])
            groups.setdefault(options, []).append(index)
            key = (context, options)
            seeds.append(stable_hash("generate_until", self.seed, times.get(key, 0), context))
            times[key] = times.get(key, 0) + 1
        texts = [""] * len(requests)
        for options, indices in groups.items():
            indices.sort(key=lambda index: -len(prompts[index]))
            for first in range(0, len(indices), self.batch_size):
                batch = indices[first : first + self.batch_size]
                for index, text in zip(batch, self._continue(prompts, seeds, batch, options), strict=True):
                    texts[index] = text
                    on_answer(index, text)
        return texts

    def _continue(
        self, prompts: list[list[int]], seeds: list[int], batch: list[int], options: GenerationOptions
    ) -> list[str]:
        generation = generate(
            self.model,
            [prompts[index] for index in batch],
            max_new_tokens=options.max_new_tokens,
            sampling=options.sampling,
            seeds=[seeds[index] for index in batch],
            stop_tokens=[self.tokenizer.eos_id],
            stop_strings=options.stop_strings,
            decode=self.tokenizer.decode,
            allow_longer=True,  # max_length decides
            never=self.never,
        )
        return [row.text or "" for row in generation.rows]

    def encode_pair(self, context: str, continuation: str) -> ScoreRequest:
        """Tokenize both texts as one, and cut where the context's tokens end.

        Spaces at the end of the context belong to the continuation, as in the texts that tokenizers were trained on.

        Raises:
            UserError: the continuation adds no token.
        """
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        if context:
            before = self.tokenizer.encode(context)
            after = self.tokenizer.encode(context + continuation)[len(before) :]
        else:
            before, after = [self.tokenizer.eos_id], self.tokenizer.encode(continuation)
        if not after:
            raise UserError(
                f"the continuation {continuation[:60]!r} adds no token to its context, which ends with "
                f"{context[-60:]!r}; correct the task, for example by a space between them"
            )
        return ScoreRequest(before, after)

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest], on_answer: Answered = nobody) -> list[Scored]:
        """Score continuations; contexts lose their first tokens where both are longer than a row.

        Requests whose input is the same, such as the choices A, B, C and D of one question, share a row.

        Raises:
            UserError: a continuation is longer than a row.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        for index, (context, continuation) in enumerate(requests):
            if len(continuation) > self.length:
                raise UserError(
                    f"a continuation has {len(continuation)} tokens, and a row at most {self.length}; raise max_length"
                )
            rows.setdefault(tuple((context + continuation)[-self.length - 1 : -1]), []).append(index)
        longest_first = sorted(rows, key=lambda row: (-len(row), row))
        answers: list[Scored | None] = [None] * len(requests)
        for first in range(0, len(longest_first), self.batch_size):
            batch = longest_first[first : first + self.batch_size]
            asked = [(row, index) for row, inputs in enumerate(batch) for index in rows[inputs]]
            continuations = [requests[index].continuation for _, index in asked]
            scored = self._score_batch(batch, [row for row, _ in asked], continuations)
            for (_, index), answer in zip(asked, scored, strict=True):
                answers[index] = answer
                on_answer(index, answer)
        return [answer for answer in answers if answer is not None]

    def _score_batch(
        self, inputs: Sequence[tuple[int, ...]], row_of: Sequence[int], continuations: Sequence[list[int]]
    ) -> list[Scored]:
        """Score ``continuations[i]``, whose tokens but the last end row ``row_of[i]`` of ``inputs``."""
        device = self.model.embed.weight.device
        input_ids_BS, mask_BS, ends = pad_rows(inputs, self.padding_side, COLUMNS.get(device.type, 1))
        padded = not bool(mask_BS.all())
        hidden_BSC = self.model(
            input_ids_BS.to(device), padding_mask_BS=mask_BS.to(device) if padded else None, hidden_only=True
        ).hidden_BSC
        spans = [(row, ends[row] - len(tokens), ends[row]) for row, tokens in zip(row_of, continuations, strict=True)]
        hidden_NC = torch.cat([hidden_BSC[row, start:end] for row, start, end in spans])
        targets_N = torch.tensor([token for tokens in continuations for token in tokens], device=device)
        chunk = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        never_M = torch.tensor(self.never, dtype=torch.int64, device=device)
        scores = linear_token_scores(hidden_NC, self.model.head.weight, targets_N, never_M, chunk_tokens=chunk)
        sizes = [len(tokens) for tokens in continuations]
        return [
            Scored(float(logprobs.sum()), bool(hits.all()))
            for logprobs, hits in zip(
                scores.log_likelihood.double().cpu().split(sizes), scores.chosen.cpu().split(sizes), strict=True
            )
        ]


def rolling_windows(tokens: Sequence[int], prefix: int, length: int) -> Iterator[ScoreRequest]:
    """Yield windows that score every token of a text once; ``prefix`` stands before the first token.

    A window's input has at most ``length`` tokens. All windows but the last score ``length`` tokens; the last has as
    many tokens before those it scores as fit.
    """
    text = [prefix, *tokens]
    for first in range(1, len(text), length):
        end = min(first + length, len(text))
        yield ScoreRequest(text[max(0, end - 1 - length) : first], text[first:end])
