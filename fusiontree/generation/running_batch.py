"""The rows of a batch during decoding: their cache, the logits of their next token, and their recorded graph.

Shape legend: B rows of the cache, S tokens of the padded prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fusiontree.generation.sampling import SamplingConfig, sample
from fusiontree.models.cache import DecodeCache
from fusiontree.models.cuda_graph import FEWEST_STEPS, GraphedStep, recordable
from fusiontree.models.model import FusionTreeModel


class RunningBatch:
    """The unfinished rows: their cache, the logits of their next token, and their prompts.

    Each unfinished row has a slot, which is its row of the cache. A recorded graph is replayed to the end: slots of
    finished rows are fed and ignored. A step reads all weights whatever the number of rows, so a smaller batch would
    hardly be faster, and would need kernels compiled again.
    """

    def __init__(
        self,
        model: FusionTreeModel,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        seeds: Sequence[int],
        max_new_tokens: int,
        graphs: bool,
        never: Sequence[int],
        prefill_chunk: int,
    ) -> None:
        """Run the prefill: see :func:`prefill`."""
        weight = model.embed.weight
        self.rows = list(range(len(prompts)))
        self.graphed_steps = 0
        self._slots = list(self.rows)
        self._model = model
        self._sampling = sampling
        self._seeds = list(seeds)
        self._never = torch.tensor(list(never), dtype=torch.int64, device=weight.device)
        self._graphs = graphs and recordable(weight.device)
        self._graph: GraphedStep | None = None
        self._columns = max(len(prompt) for prompt in prompts) + max_new_tokens
        self._seen_BV: Tensor | None = None
        if sampling.repetition_penalty != 1.0:
            self._seen_BV = torch.zeros(len(prompts), model.config.vocab_size, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self._seen_BV[row, torch.tensor(prompt)] = True
            self._seen_BV = self._seen_BV.to(weight.device)
        self._cache, self._logits_BV = prefill(model, prompts, self._columns, prefill_chunk)

    def draw(self, step: int) -> tuple[list[int], list[float]]:
        """Choose every row's next token; return the tokens and their log-probabilities under the model."""
        logits_BV, seen_BV = self._logits_BV, self._seen_BV
        if len(self._slots) < self._cache.rows:
            slots = torch.tensor(self._slots, device=logits_BV.device)
            logits_BV, seen_BV = logits_BV[slots], None if seen_BV is None else seen_BV[slots]
        allowed_BV = logits_BV.index_fill(1, self._never, -torch.inf) if self._never.numel() else logits_BV
        tokens_B = sample(allowed_BV, self._sampling, seen_BV=seen_BV, seeds=self._seeds, step=step)
        logprobs_B = logits_BV.float().log_softmax(dim=-1).gather(1, tokens_B[:, None])[:, 0]
        return tokens_B.tolist(), logprobs_B.tolist()

    def feed(self, tokens: Sequence[int], going: Sequence[int], steps: int) -> None:
        """Keep only the rows ``going`` and compute the logits of their next tokens.

        Args:
            tokens: each row's token from :meth:`draw`.
            going: indices of the unfinished rows.
            steps: maximum number of tokens per row still to feed, including this token.
        """
        tokens_of_slots = [0] * self._cache.rows
        for row in going:
            tokens_of_slots[self._slots[row]] = tokens[row]
        self.rows, self._seeds, self._slots = (
            [values[row] for row in going] for values in (self.rows, self._seeds, self._slots)
        )
        if self._graph is None and len(self._slots) < self._cache.rows:
            tokens_of_slots = [tokens_of_slots[slot] for slot in self._slots]
            self._leave()
        if self._graphs and self._graph is None and steps >= FEWEST_STEPS:
            self._cache.fix(self._columns)
            self._graph = GraphedStep(self._model, self._cache)
        tokens_B1 = torch.tensor(tokens_of_slots, device=self._logits_BV.device)[:, None]
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, tokens_B1, True)
        if self._graph is None:
            self._logits_BV = self._model(tokens_B1, cache=self._cache).logits_BSV[:, -1]
        else:
            self._logits_BV = self._graph(tokens_B1)
            self.graphed_steps += 1

    def _leave(self) -> None:
        """Remove finished rows from the cache."""
        slots = torch.tensor(self._slots, device=self._logits_BV.device)
        self._cache = self._cache.select(slots)
        self._seen_BV = None if self._seen_BV is None else self._seen_BV[slots]
        self._slots = list(range(len(self._slots)))


def prefill(
    model: FusionTreeModel, prompts: Sequence[Sequence[int]], columns: int, chunk: int
) -> tuple[DecodeCache, Tensor]:
    """Fill a cache with prompts; return it and the logits of each prompt's next token, ``[B, V]``.

    Consecutive prompts that together are at most ``chunk`` tokens, pads on the left included, take one forward. A
    longer prompt is computed alone in forwards of at most ``chunk`` tokens. So activations need no more memory than
    those of ``chunk`` tokens; the cache itself grows with the prompts.

    Args:
        model: on its device.
        prompts: token ids, at least one per prompt.
        columns: room to allocate in the cache, per row.
        chunk: maximum number of tokens per forward.
    """
    device = model.embed.weight.device
    caches, logits = [], []
    for group in groups_of(prompts, chunk):
        input_ids_BS, padding_mask_BS = pad_left(group)
        mask_BS = None if bool(padding_mask_BS.all()) else padding_mask_BS.to(device)
        cache = model.new_cache(len(group), columns)
        for part_BS in input_ids_BS.split(input_ids_BS.shape[1] if len(group) > 1 else chunk, dim=1):
            # Logits of all tokens of a long prompt would be the largest tensor.
            output = model(part_BS.to(device), padding_mask_BS=mask_BS, cache=cache, logits_to_keep=1)
        caches.append(cache)
        logits.append(output.logits_BSV[:, -1])
    return (caches[0] if len(caches) == 1 else DecodeCache.join(caches)), torch.cat(logits)


def groups_of(prompts: Sequence[Sequence[int]], chunk: int) -> list[list[Sequence[int]]]:
    """Cut ``prompts`` into groups of at most ``chunk`` tokens each, pads included, or of one prompt."""
    groups: list[list[Sequence[int]]] = []
    for prompt in prompts:
        longest = max(len(prompt), *(len(other) for other in groups[-1])) if groups else 0
        if groups and longest * (len(groups[-1]) + 1) <= chunk:
            groups[-1].append(prompt)
        else:
            groups.append([prompt])
    return groups


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Stack prompts, padded on the left so that all end in the last column.

    Returns:
        ``(input_ids_BS, padding_mask_BS)``: int64, 0 on pads; bool, True on real tokens.
    """
    input_ids_BS, padding_mask_BS, _ = pad_rows(prompts)
    return input_ids_BS, padding_mask_BS


def pad_rows(
    rows: Sequence[Sequence[int]], side: Literal["left", "right"] = "left", multiple: int = 1
) -> tuple[Tensor, Tensor, list[int]]:
    """Stack rows, padded to a multiple of ``multiple`` columns.

    Returns:
        ``(input_ids_BS, padding_mask_BS, ends)``: int64, 0 on pads; bool, True on real tokens; the column behind each
        row's last token.
    """
    columns = -(-max(map(len, rows)) // multiple) * multiple
    input_ids_BS = torch.zeros(len(rows), columns, dtype=torch.int64)
    mask_BS = torch.zeros(len(rows), columns, dtype=torch.bool)
    ends = [columns if side == "left" else len(row) for row in rows]
    for index, (row, end) in enumerate(zip(rows, ends, strict=True)):
        input_ids_BS[index, end - len(row) : end] = torch.tensor(row)
        mask_BS[index, end - len(row) : end] = True
    return input_ids_BS, mask_BS, ends
