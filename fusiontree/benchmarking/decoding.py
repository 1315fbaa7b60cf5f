"""Times decoding and prefills beside what the memory's bandwidth allows.

Shape legend: B rows, S tokens.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from fusiontree.benchmarking.peers import WARMUP_STEPS, timed_decoding
from fusiontree.models.cache import DecodeCache
from fusiontree.models.cuda_graph import GraphedStep
from fusiontree.models.model import FusionTreeModel

_BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "GH200": 4.0e12, "A100": 2.04e12, "B200": 8.0e12}
"""Bytes per second that NVIDIA's data sheets state (the SXM boards; A100: 80 GB)."""


def bandwidth(device: torch.device) -> float | None:
    """Return the stated bandwidth of the device's memory in bytes per second; None for devices not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).replace("-", " ").split()
    return next((rate for key, rate in _BANDWIDTH.items() if key in name), None)


def bytes_per_step(model: FusionTreeModel, cache: DecodeCache) -> int:
    """Return the least bytes that a step reads and writes: weights once, keys and values in use, states twice.

    Of an untied embedding a step reads one vector per row, which is not counted.
    """
    skipped = set() if model.config.tie_word_embeddings else {id(model.embed.weight)}
    tensors = [*model.parameters(), *model.buffers()]
    weights = sum(tensor.nbytes for tensor in tensors if id(tensor) not in skipped)
    return weights + sum(kept.step_bytes(cache.columns) for layer in cache.layers for kept in layer.values())


def decoded_rates(
    model: FusionTreeModel, context_1S: Tensor, rows: int, tokens: int, *, prefill_chunk: int
) -> dict[str, Any]:
    """Time recorded steps of ``rows`` equal texts after ``context_1S``.

    Returns:
        Tokens per second of all rows, the bound by bandwidth, their ratio, bytes per step and memory.
    """
    torch.cuda.reset_peak_memory_stats()
    columns = context_1S.shape[1] + tokens + 2 * WARMUP_STEPS
    cache = model.new_cache(1, columns)
    for part_1S in context_1S.split(prefill_chunk, dim=1):
        logits_BV = model(part_1S, cache=cache, logits_to_keep=1).logits_BSV[:, -1]
    if rows > 1:
        cache = cache.select([0] * rows)
        logits_BV = logits_BV.expand(rows, -1).contiguous()
    cache.fix(columns)
    step = GraphedStep(model, cache)
    figures = timed_decoding(logits_BV, lambda state: step(state.argmax(-1, keepdim=True)), rows, tokens)
    needed, rate = bytes_per_step(model, cache), bandwidth(model.embed.weight.device)
    bound = None if rate is None else rows * rate / needed
    share = None if bound is None else figures["tokens_per_s"] / bound
    return {"rows": rows, "context": context_1S.shape[1], **figures, "bound": bound, "share": share, "bytes": needed}


def prefill_rate(model: FusionTreeModel, length: int, *, prefill_chunk: int, seed: int = 0) -> dict[str, Any]:
    """Time the prefill of one random text of ``length`` tokens in chunks; the second of two runs counts.

    Returns:
        Tokens per second and memory; ``activations_gib`` is the peak beyond the weights and the filled cache.
    """
    generator = torch.Generator().manual_seed(seed)
    ids_1S = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.embed.weight.device)
    seconds, kept = 0.0, 0
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        cache = model.new_cache(1, length)
        for part_1S in ids_1S.split(prefill_chunk, dim=1):
            model(part_1S, cache=cache, logits_to_keep=1)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        kept = torch.cuda.memory_allocated()
        del cache
    peak = torch.cuda.max_memory_allocated()
    return {
        "tokens": length,
        "chunk": prefill_chunk,
        "seconds": seconds,
        "tokens_per_s": length / seconds,
        "peak_memory_gib": peak / 2**30,
        "activations_gib": (peak - kept) / 2**30,
    }
