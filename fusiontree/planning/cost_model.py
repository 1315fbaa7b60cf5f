"""Estimates memory and speed of a run by arithmetic, without a device or a process group.

Memory is counted tensor by tensor. Time is operations over the rates of one profiled step (docs/speed.md, one
H100) plus the bytes that cross links. Both are held to that step and to one of 128K tokens by a test. Measured on two
GPUs, ddp with tp 2 and cp 2 came within 10%; fsdp2 with tp 2 and cp 2, which waits for its host, took up to half more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fusiontree.engines.config import ENGINES, Sizes, Transfer
from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers import all_mixers
from fusiontree.models.mixers.base import Seconds
from fusiontree.models.mixers.split import split_of
from fusiontree.models.model import FusionTreeModel
from fusiontree.optim.config import OPTIMIZERS
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.fp8 import fp8_by_layer
from fusiontree.parallel.recompute_mix import (
    MATRIX_FLOPS,
    describe_mix,
    seconds_by_layer,
)
from fusiontree.planning.activation_memory import recomputation
from fusiontree.planning.teacher_cost import TeacherCost, teacher_cost
from fusiontree.training.config import TrainingConfig

GIB = 2**30
# Rates of one H100 SXM in bf16, from the profiled step of hybrid_1b_32k (16 layers, 2,048 wide, 32,768 tokens):
ELEMENTWISE_S = (41 + 43 + 17 + 16 + 2) * 1e-3 / (16 * 32768 * 2048)
"""Norms, gates, convolutions, copies: seconds per token, layer and channel of the residual stream."""
OPTIMIZER_S = 25e-3 / 1.57e9
"""Seconds per parameter of the rank's shard."""
IDLE = 0.03
"""Share of the step that the profiled kernels do not account for: gaps, and a clock that is lower in a long run."""


@dataclass(frozen=True)
class Hardware:
    """Assumptions about the machine. Rates are in units of 10^9 bytes per second."""

    memory_gib: float = 80.0
    gpus_per_node: int = 8
    node_gb_per_s: float = 300.0
    """One GPU's link inside a node, per direction, as collectives reach it."""
    network_gb_per_s: float = 40.0
    """One GPU's share of the network between nodes, per direction."""


@dataclass(frozen=True)
class Estimate:
    """One layout; memory is of the fullest rank."""

    engine: str
    dp: int
    cp: int
    tp: int
    activation_checkpointing: str
    recompute: str
    """Number of layers of each mode of recomputation."""
    accumulation: int
    """Micro-batches of one rank per step."""
    states_gib: float
    """Master parameters, gradients, optimizer moments, and full copies that the engine keeps."""
    gathered_gib: float
    """Parameters and gradients of the blocks at work, gathered in half precision."""
    activations_gib: float
    teacher_gib: float
    """Frozen teacher: parameters of the rank, gathered blocks, hidden states; 0 without a teacher."""
    total_gib: float
    fits: bool
    """Within 92% of the memory, or ``training.memory_limit`` under ``auto``; allocator, NCCL and CUDA need the rest."""
    compute_s: float
    teacher_s: float
    """Part of ``compute_s`` that a teacher adds."""
    communication_s: float
    step_s: float
    """Between the two bounds: half of the communication is taken to hide behind computation."""
    tokens_per_s: float
    tokens_per_s_per_gpu: float

    def values(self) -> dict[str, Any]:
        """Return plain values, rounded."""
        return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in asdict(self).items()}


def count_parameters(model: ModelConfig, tp: int) -> tuple[int, int, int]:
    """Return the parameters that tp splits, the others, and those of the largest block on one tensor parallel rank."""
    with torch.device("meta"):
        module = FusionTreeModel(model)
    split = whole = 0
    blocks: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        cut = split_of(name, model) if tp > 1 else None
        is_split = cut is not None and cut.is_owned(tp)
        if is_split:
            split += parameter.numel()
        else:
            whole += parameter.numel()
        parts = name.split(".")
        if parts[0] == "layers":
            blocks[parts[1]] = blocks.get(parts[1], 0) + parameter.numel() // (tp if is_split else 1)
    return split, whole, max(blocks.values())


def estimate(
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    gpus: int,
    hardware: Hardware,
    teacher: ModelConfig | None = None,
) -> Estimate:
    """Estimate one step at the longest row length.

    Args:
        model: the ``model`` section.
        parallel: the ``parallel`` section; it has passed ``check_layout``.
        training: the ``training`` section.
        gpus: number of GPUs of the job.
        hardware: the machine.
        teacher: the model of ``training.teacher``, whose layout is the trained model's.
    """
    tp, cp, dp = parallel.tp, parallel.cp, gpus // (parallel.tp * parallel.cp)
    half = 2 if training.precision != "fp32" else 4
    micro_batch_size = min(training.micro_batch_size, -(-training.global_batch_size // max(1, dp)))
    passes = max(1, -(-training.global_batch_size // (dp * micro_batch_size)))
    stepped = 4 + OPTIMIZERS.get(training.optimizer.name).bytes_per_parameter
    fp8 = fp8_by_layer(model, training)
    seconds = seconds_by_layer(model, training.seq_len, fp8)
    sizes = _sizes(model, tp, half, stepped, passes, gpus, parallel.shard_size or gpus, fp8=sum(fp8 or ()) / tp)
    engine = ENGINES.get(parallel.engine)
    memory = engine.memory(sizes, parallel)
    tokens = micro_batch_size * training.seq_len / cp
    added = _added_by(teacher, model, parallel, training.seq_len, sizes, tokens)
    usable = hardware.memory_gib * GIB * usable_share(training)
    modes, activations = recomputation(model, training, seconds, tokens, tp, half, usable - sum(memory) - added.nbytes)
    total = sum(memory) + activations + added.nbytes
    teacher_s = passes * tokens * added.seconds_per_token / tp / (1 - IDLE)
    compute = passes * _pass_s(model, seconds, tokens, tp, modes) + OPTIMIZER_S * sizes.shard + teacher_s
    transfers = engine.traffic(sizes, parallel) + added.transfers
    communication = _communication_s(model, parallel, transfers, passes, tokens, half, hardware)
    step = max(compute, communication) + 0.5 * min(compute, communication) if communication else compute
    per_s = training.global_batch_size * training.seq_len / step
    return Estimate(
        engine=parallel.engine,
        dp=dp,
        cp=cp,
        tp=tp,
        activation_checkpointing=training.activation_checkpointing,
        recompute=describe_mix(modes),
        accumulation=passes,
        states_gib=memory.states / GIB,
        gathered_gib=memory.gathered / GIB,
        activations_gib=activations / GIB,
        teacher_gib=added.nbytes / GIB,
        total_gib=total / GIB,
        fits=total <= usable,
        compute_s=compute,
        teacher_s=teacher_s,
        communication_s=communication,
        step_s=step,
        tokens_per_s=per_s,
        tokens_per_s_per_gpu=per_s / gpus,
    )


def _sizes(
    model: ModelConfig,
    tp: int,
    element: int,
    stepped: int,
    passes: int,
    ranks: int,
    shard_ranks: int,
    fp8: float = 0.0,
) -> Sizes:
    """Return the quantities of a model's parameters; arguments as the fields of :class:`Sizes`."""
    split, whole, block = count_parameters(model, tp)
    return Sizes(
        on_rank=split / tp + whole,
        shard=(split + whole) / shard_ranks,  # a split parameter has shard_ranks / tp owners of its tp-th part
        block=block,
        element=element,
        stepped=stepped,
        passes=passes,
        ranks=ranks,
        shard_ranks=shard_ranks,
        fp8=fp8,
    )


def usable_share(training: TrainingConfig) -> float:
    """Return the share of the memory that a layout may take; see :attr:`Estimate.fits`."""
    return training.memory_limit if training.activation_checkpointing == "auto" else 0.92


def _added_by(
    teacher: ModelConfig | None, model: ModelConfig, parallel: ParallelConfig, length: int, sizes: Sizes, tokens: float
) -> TeacherCost:
    """Return what a teacher adds, its element-wise operations included; ``sizes`` are the trained model's."""
    if teacher is None:
        return TeacherCost(0.0, 0.0, [])
    its = _sizes(teacher, parallel.tp, sizes.element, 0, sizes.passes, sizes.ranks, sizes.shard_ranks)
    engine = ENGINES.get(parallel.engine)
    its = its if engine.shards_parameters else replace(its, shard=its.on_rank)
    cost = teacher_cost(teacher, model, its, parallel, length, tokens)
    elementwise_s = ELEMENTWISE_S * teacher.hidden_size * teacher.num_layers / 3
    return cost._replace(seconds_per_token=cost.seconds_per_token + elementwise_s)


def _pass_s(model: ModelConfig, seconds: Sequence[Seconds], tokens: float, tp: int, modes: Sequence[str]) -> float:
    """Return the seconds of one forward and backward of a rank's ``tokens``."""
    total = 6.0 * model.vocab_size * model.hidden_size / MATRIX_FLOPS
    total += ELEMENTWISE_S * model.hidden_size * model.num_layers
    for its, mode in zip(seconds, modes, strict=True):
        # A forward is a third of forward and backward; the profiled step already recomputes cheap operations.
        again = its.repeated / 3 if mode in ("full", "offload") else 0.0
        total += its.kept + its.repeated + again
    return tokens * total / tp / (1 - IDLE)


def _communication_s(
    model: ModelConfig,
    parallel: ParallelConfig,
    of_state: list[Transfer],
    passes: int,
    tokens: float,
    half: int,
    hardware: Hardware,
) -> float:
    """Return the seconds that one rank's links are busy in a step."""
    tp, cp = parallel.tp, parallel.cp

    def link(ranks: int) -> float:
        inside = ranks <= hardware.gpus_per_node
        return 1e9 * (hardware.node_gb_per_s if inside else hardware.network_gb_per_s)

    def moved(ranks: int) -> float:
        return (ranks - 1) / ranks

    seconds = sum(transfer.nbytes * moved(transfer.ranks) / link(transfer.span) for transfer in of_state)
    hidden = model.hidden_size
    if tp > 1:
        # A block gathers its input and scatters the branches' outputs or their sum, forward; the duals backward.
        branches = sum(1 if model.sums_branches else len(names) for names in model.branches)
        per_token = 2 * (model.num_layers + branches) * hidden * half
        seconds += passes * tokens * per_token * moved(tp) / link(tp)
    if cp > 1:
        per_pass = sum(
            mixer.exchanged_bytes(model.of_layer(layer), layer, tokens, cp, tp, half)
            for layer, mixer in all_mixers(model)
        )
        seconds += passes * 2 * per_pass / link(tp * cp)
    return seconds
