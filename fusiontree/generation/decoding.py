"""Batched autoregressive decoding: one prefill fills the cache, every later step feeds one token per row."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from fusiontree.generation.running_batch import RunningBatch
from fusiontree.generation.sampling import SamplingConfig
from fusiontree.generation.text import TextStream
from fusiontree.models.config import ModelConfig
from fusiontree.models.model import FusionTreeModel
from fusiontree.utils.errors import UserError

CONTEXT_TOKENS = 8
"""Number of prompt tokens that precede the new tokens in the decoder's input; no character has more tokens."""

PREFILL_CHUNK = 16384
"""Prompt tokens per forward; at a hidden size of 2,048 in bf16 their activations take about a gibibyte."""

FinishReason = Literal["stop_token", "stop_string", "length"]


@dataclass
class GeneratedRow:
    """The continuation of one prompt."""

    tokens: list[int] = field(default_factory=list)
    """Every drawn token, including a final stop token."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each token under the model itself: before penalty, temperature and filters, in nats."""
    finish_reason: FinishReason = "length"
    text: str | None = None
    """Text of the tokens without stop token or stop string; None without ``decode``."""


@dataclass(frozen=True)
class NewToken:
    """A drawn token of a row."""

    row: int
    """Index of the prompt."""
    token: int
    logprob: float
    text: str
    """Text that this token completed: full characters that cannot become part of a stop string."""
    finish_reason: FinishReason | None
    """Set on the row's last token."""


@dataclass(frozen=True)
class Generation:
    """Rows in the order of the prompts, and the time of each phase."""

    rows: list[GeneratedRow]
    prompt_tokens: int
    """Number of tokens of all prompts, without padding."""
    prefill_s: float
    """Seconds until every row had its first token."""
    decode_s: float
    """Seconds for all tokens after the first of each row."""
    graphed_steps: int = 0
    """Number of steps after the prefill that replayed a CUDA graph."""

    @property
    def new_tokens(self) -> int:
        """Number of drawn tokens of all rows."""
        return sum(len(row.tokens) for row in self.rows)


def generate(
    model: FusionTreeModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingConfig | None = None,
    seeds: Sequence[int] | None = None,
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    on_token: Callable[[NewToken], None] | None = None,
    allow_longer: bool = False,
    graphs: bool = True,
    never: Sequence[int] = (),
    prefill_chunk: int = PREFILL_CHUNK,
) -> Generation:
    """Continue every prompt; a row's tokens do not depend on the other rows.

    Prompts of different length are padded on the left for the prefill and masked. Rows that finish leave the batch.
    On a GPU the steps after the prefill replay a CUDA graph if they are enough to be worth recording it; rows that
    finish then stay in the batch, and their tokens are ignored.

    Args:
        model: on its device, in the dtype of the computation; in eval mode during the call.
        prompts: token ids, at least one per prompt.
        max_new_tokens: maximum number of tokens drawn per row.
        sampling: how the next token is chosen; None draws from the model's distribution.
        seeds: one per prompt; None means 0, 1, 2 and so on. A row's randomness depends only on its seed.
        stop_tokens: tokens that end a row.
        stop_strings: strings in the new text that end a row; needs ``decode``.
        decode: returns the text of a list of tokens.
        on_token: called for every drawn token, in order of rows within a step.
        allow_longer: allow texts longer than ``max_position_embeddings``, for which the model was not trained; an
            error all the same for a learnable SRTE, which has no entries for them.
        graphs: allow CUDA graphs on a GPU; they do not change the tokens.
        never: ids that are not drawn, such as those by which a vocabulary is padded.
        prefill_chunk: maximum number of prompt tokens per forward, which limits the memory of activations.

    Raises:
        UserError: a prompt is empty, a token id is unknown, or a row is too long; checked before any computation.
        FloatingPointError: logits are not finite.
    """
    sampling = sampling or SamplingConfig()
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    _check_options(prompts, seeds, stop_strings, decode, prefill_chunk)
    check_request(
        model.config, prompts, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, allow_longer=allow_longer
    )

    rows = [_Row(index, stop_tokens, decode, stop_strings, prompt) for index, prompt in enumerate(prompts)]
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    try:
        with torch.inference_mode():
            batch = RunningBatch(model, prompts, sampling, seeds, max_new_tokens, graphs, never, prefill_chunk)
            return _decode(batch, prompts, rows, max_new_tokens, started, on_token)
    finally:
        model.train(was_training)


def _decode(
    batch: RunningBatch,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[_Row],
    max_new_tokens: int,
    started: float,
    on_token: Callable[[NewToken], None] | None,
) -> Generation:
    """Run the steps of :func:`generate` after the prefill, which began at ``started``."""
    prefilled = started
    for step in range(max_new_tokens):
        tokens, logprobs = batch.draw(step)
        if step == 0:
            prefilled = time.perf_counter()
        for row, token, logprob in zip(batch.rows, tokens, logprobs, strict=True):
            new = rows[row].add(token, logprob, last=step + 1 == max_new_tokens)
            if on_token:
                on_token(new)
        going = [slot for slot, row in enumerate(batch.rows) if not rows[row].finished]
        if not going:
            break
        batch.feed(tokens, going, steps=max_new_tokens - step - 1)
    return Generation(
        [row.result for row in rows],
        prompt_tokens=sum(len(prompt) for prompt in prompts),
        prefill_s=prefilled - started,
        decode_s=time.perf_counter() - prefilled,
        graphed_steps=batch.graphed_steps,
    )


def _check_options(
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    stop_strings: Sequence[str],
    decode: Callable[[list[int]], str] | None,
    prefill_chunk: int,
) -> None:
    """Check the arguments of :func:`generate` that :func:`check_request` does not see."""
    if prefill_chunk < 1:
        raise UserError(f"prefill_chunk is {prefill_chunk}; it must be at least 1 token")
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one per prompt")
    if stop_strings and decode is None:
        raise ValueError("stop_strings need the text of the new tokens; give decode as well")


def check_request(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Sequence[int] = (),
    allow_longer: bool = False,
) -> None:
    """Check the request before any computation.

    Raises:
        UserError: see :func:`generate`.
    """
    if not prompts:
        raise UserError("there is no prompt; give at least one prompt")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    for name, tokens in [("stop_tokens", stop_tokens)] + [(f"prompt {i}", prompt) for i, prompt in enumerate(prompts)]:
        wrong = [token for token in tokens if not 0 <= token < config.vocab_size]
        if wrong:
            raise UserError(
                f"{name} holds token {wrong[0]}, and the model's vocabulary ends at {config.vocab_size - 1}; "
                f"use the tokenizer that the model was trained with"
            )
    limit = config.max_position_embeddings
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty; give at least one token to continue")
        length = len(prompt) + max_new_tokens
        if length <= limit:
            continue
        problem = (
            f"prompt {i} has {len(prompt)} tokens and {max_new_tokens} new ones make {length}, beyond the model's "
            f"max_position_embeddings {limit}; shorten the prompt or lower max_new_tokens to at most "
            f"{max(limit - len(prompt), 0)}"
        )
        if config.srte_encoding == "learnable":
            raise UserError(f"{problem} (the learnable srte_encoding has no entries there)")
        if not allow_longer:
            raise UserError(f"{problem}, or pass --allow-longer (allow_longer=True) to exceed the trained length")


class _Row:
    """The result of one prompt during decoding."""

    def __init__(
        self,
        index: int,
        stop_tokens: Sequence[int],
        decode: Callable[[list[int]], str] | None,
        stop_strings: Sequence[str],
        prompt: Sequence[int],
    ) -> None:
        self.result = GeneratedRow()
        self.finished = False
        self._index = index
        self._stop_tokens = frozenset(stop_tokens)
        self._stream = TextStream(decode, stop_strings, context=prompt[-CONTEXT_TOKENS:]) if decode else None

    def add(self, token: int, logprob: float, last: bool) -> NewToken:
        """Add a drawn token; ``last`` is True if no token follows."""
        self.result.tokens.append(token)
        self.result.logprobs.append(logprob)
        text = ""
        reason: FinishReason | None = "length" if last else None
        if token in self._stop_tokens:
            reason = "stop_token"
        elif self._stream:
            text = self._stream.push(token)
            if self._stream.stopped:
                reason = "stop_string"
        if reason is not None:
            self.finished = True
            if self._stream:
                text += self._stream.finish()
                if self._stream.stopped:  # withheld text can complete a stop string
                    reason = "stop_string"
                self.result.text = self._stream.text
            self.result.finish_reason = reason
        return NewToken(self._index, token, logprob, text, reason)
