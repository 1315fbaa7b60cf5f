"""Checks that a layout can compute a model, before any process group is created."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers import distinct_mixers
from fusiontree.models.mixers.base import Mixer
from fusiontree.parallel.config import ParallelConfig
from fusiontree.utils.errors import UserError


def check_layout(model: ModelConfig, parallel: ParallelConfig, training: Any, world_size: int) -> None:
    """Check that the layout can compute the model.

    Args:
        model: the ``model`` section.
        parallel: the ``parallel`` section.
        training: the ``training`` section; only its sequence lengths are read.
        world_size: number of processes.

    Raises:
        UserError: a size does not fit; the message gives the reason and the valid sizes.
    """
    tp, cp = parallel.tp, parallel.cp
    if parallel.engine.startswith("zero") and find_spec("deepspeed") is None:
        raise UserError(
            f"parallel.engine {parallel.engine} needs the package deepspeed, which is not installed; install "
            f"fusiontree[deepspeed] or use parallel.engine=fsdp2"
        )
    if world_size % (tp * cp):
        raise UserError(
            f"{world_size} processes do not divide by parallel.tp {tp} x parallel.cp {cp} = {tp * cp}; start a "
            f"multiple of {tp * cp}, or set tp x cp to one of {_divisors(world_size)}"
        )
    for mixer in distinct_mixers(model) if cp > 1 else []:
        if mixer.use_context_parallel is Mixer.use_context_parallel:
            raise UserError(f"mixer {mixer.name} does not support context parallelism; set parallel.cp to 1")
    reasons = list(tp_problems(model, tp))
    if reasons:
        fitting = valid_tp(model, limit=max(tp, 64))
        raise UserError(
            f"parallel.tp {tp} does not fit the model: {'; '.join(reasons)}. This model allows tp {fitting}"
        )
    if tp > 1 and model.kernels.cross_entropy not in ("auto", "chunked"):
        raise UserError(
            f"kernels.cross_entropy={model.kernels.cross_entropy} cannot split the vocabulary over parallel.tp {tp} "
            f"ranks; use auto or chunked"
        )
    _check_lengths(training, cp, tp)
    _check_shard_size(parallel, world_size)
    _check_engine_settings(parallel)


def tp_problems(model: ModelConfig, tp: int) -> Iterator[str]:
    """Yield the reasons why the model cannot be split over ``tp`` ranks."""
    if tp == 1:
        return
    if model.vocab_size % tp:
        yield f"vocab_size {model.vocab_size} does not divide by {tp} (pad it to {-(-model.vocab_size // tp) * tp})"
    for mixer in distinct_mixers(model):
        yield from mixer.tp_problems(model, tp)


def valid_tp(model: ModelConfig, limit: int = 64) -> list[int]:
    """Return the tensor parallel sizes up to ``limit`` that fit the model."""
    return [tp for tp in range(1, limit + 1) if not any(tp_problems(model, tp))]


def _check_lengths(training: Any, cp: int, tp: int) -> None:
    parts = cp * tp
    lengths = {"training.seq_len": training.seq_len}
    lengths |= {f"stage {i} of training.curriculum": stage[0] for i, stage in enumerate(training.curriculum or [])}
    for name, length in lengths.items():
        if length % parts:
            below, above = length // parts * parts, -(-length // parts) * parts
            near = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"{name} {length} does not divide by parallel.cp {cp} x parallel.tp {tp} = {parts} (each rank holds "
                f"an equal share of a sequence's tokens); the nearest lengths that do: {near}"
            )


def _check_shard_size(parallel: ParallelConfig, world_size: int) -> None:
    size = parallel.shard_size
    if size is None:
        return
    if parallel.engine != "fsdp2":
        raise UserError(
            f"parallel.shard_size is for engine fsdp2, and parallel.engine is {parallel.engine}; remove it or use fsdp2"
        )
    if world_size % size or size % parallel.tp:
        fitting = [n for n in _divisors(world_size) if n % parallel.tp == 0]
        raise UserError(
            f"parallel.shard_size {size} must divide the {world_size} processes and be a multiple of parallel.tp "
            f"{parallel.tp}; use one of {fitting}"
        )


def _check_engine_settings(parallel: ParallelConfig) -> None:
    engine, offload = parallel.engine, parallel.offload
    allowed = {"zero3": ["none", "optimizer", "all"]}.get(engine, ["none"])
    if engine in ("zero1", "zero2") and parallel.tp == 1:
        allowed = ["none", "optimizer"]
    if offload not in allowed:
        why = " with parallel.tp above 1" if engine in ("zero1", "zero2") and offload == "optimizer" else ""
        raise UserError(
            f"parallel.offload {offload} is not possible with parallel.engine {engine}{why}; use one of {allowed}, or "
            f"parallel.engine=zero3"
        )
    if parallel.zero3_persistence_threshold and engine != "zero3":
        raise UserError(
            f"parallel.zero3_persistence_threshold is for engine zero3, and parallel.engine is {engine}; remove it, or "
            f"use zero3"
        )
    if not parallel.reshard_after_forward and engine != "fsdp2":
        raise UserError(
            f"parallel.reshard_after_forward is for engine fsdp2, and parallel.engine is {engine}; remove it or use "
            f"fsdp2"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
