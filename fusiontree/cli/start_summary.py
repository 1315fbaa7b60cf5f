"""The summary that training prints before its first step."""

from __future__ import annotations

import torch

from fusiontree.config.root import Config
from fusiontree.data.loader import TrainingData
from fusiontree.parallel.layout import Layout
from fusiontree.planning.cost_model import GIB, Hardware, count_parameters, estimate
from fusiontree.tracking.console import short
from fusiontree.training.teacher import TeacherCheckpoint
from fusiontree.utils.device import available_memory


def start_summary(
    config: Config, data: TrainingData, layout: Layout, teacher: TeacherCheckpoint | None = None
) -> list[str]:
    """Return one line each on model, layout, data, precision, memory and run folder.

    The console adds the backends after the first step and the time to the end after the first few.

    Args:
        config: the whole configuration; it has passed ``check_layout``.
        data: the opened training data.
        layout: the process group.
        teacher: checkpoint of ``training.teacher``.
    """
    model, parallel, training = config.model, config.parallel, config.training
    hardware = Hardware(memory_gib=_memory_gib(layout))
    taught = teacher.model if teacher else None
    expected = estimate(model, parallel, training, layout.place.world_size, hardware, taught)
    split, whole, _ = count_parameters(model, tp=1)
    ranks = f"{layout.place.world_size} {layout.device.type} rank{'s' if layout.place.world_size > 1 else ''}"
    checkpointing: str = training.activation_checkpointing
    if checkpointing == "auto":
        checkpointing += f", measured in two steps (estimate: {expected.recompute})"
    products = "matrix products in fp8 (MFU of the bf16 peak), " if training.matmul_precision == "fp8" else ""
    lines = {
        "model": f"{short(split + whole)} parameters, layers {_pattern(model.pattern)}, "
        f"hidden size {model.hidden_size}, vocabulary {model.vocab_size:,}",
        "layout": f"{parallel.engine} on {ranks}: dp {expected.dp}, cp {expected.cp}, tp {expected.tp}; "
        f"{training.global_batch_size} rows of {training.seq_len:,} tokens per step, {expected.accumulation} "
        f"micro-batch{'es' if expected.accumulation > 1 else ''} per rank",
        "data": _data(config, data),
        "precision": f"{training.precision}, {products}activation checkpointing: {checkpointing}",
        "memory": f"about {expected.total_gib:.2g} GiB per rank: states {expected.states_gib:.2g}, gathered weights "
        f"{expected.gathered_gib:.2g}, activations {expected.activations_gib:.2g}"
        + (f", teacher {expected.teacher_gib:.2g}" if teacher else ""),
        "run": f"{config.run_dir}, {training.max_steps:,} steps",
    }
    if teacher is not None:
        lines["teacher"] = (
            f"{short(sum(count_parameters(teacher.model, tp=1)[:2]))} parameters of {teacher.folder}, weight "
            f"{training.teacher_weight:g}, temperature {training.teacher_temperature:g}; MFU counts the trained model "
            f"alone"
        )
    return [f"{name:<10} {text}" for name, text in lines.items()]


def _memory_gib(layout: Layout) -> float:
    """Return the memory of this rank's device; on a CPU its part of the free memory."""
    if layout.device.type == "cuda":
        return torch.cuda.get_device_properties(layout.device).total_memory / GIB
    return (available_memory() or 0) / layout.place.local_world_size / GIB


def _pattern(letters: str) -> str:
    """Return the layers' letters, a single repeated one as ``32 × F``."""
    return f"{len(letters)} × {letters[0]}" if len(set(letters)) == 1 else letters


def _data(config: Config, data: TrainingData) -> str:
    """Return tokens in all sources, tokens that this run reads, and its epochs of each source."""
    training, given = config.training, config.data.sources
    read = training.max_steps * training.global_batch_size * training.seq_len
    weights = sum(source.weight for source in given)
    sizes = [sum(source.shard_tokens) for source in data.sources]
    epochs = [read * one.weight / weights / max(1, size) for one, size in zip(given, sizes, strict=True)]
    passes = ", ".join(f"{epoch:.2f}" for epoch in epochs[:4]) + (", …" if len(epochs) > 4 else "")
    sources = f"{len(sizes)} sources" if len(sizes) > 1 else "1 source"
    return f"{short(sum(sizes))} tokens in {sources}; this run reads {short(read)} tokens, {passes} epochs"
