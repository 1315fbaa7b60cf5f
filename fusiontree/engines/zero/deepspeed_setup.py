"""DeepSpeed's configuration, the process groups that it asks for, and the check that it does what it was asked for.

Seen with DeepSpeed 0.19.8: a mistyped key of its configuration gives stage 0 without a word, its bf16 mode casts fp32
parameters and accumulates in bf16, and on a CPU it compiles a communication library at start. So DeepSpeed is given
fp32 parameters and always runs in fp32: the lower precision of the forward pass is made by
:mod:`fusiontree.engines.mixed_precision` (stages 1 and 2) and :mod:`fusiontree.engines.zero.gather` (stage 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fusiontree.parallel.layout import Layout


class ParallelGroups:
    """The groups of a layout under the names that DeepSpeed calls (its ``mpu``).

    DeepSpeed's "data parallel" ranks are those with other tokens (dp x cp); its "model parallel" ranks are those of tp.
    """

    def __init__(self, layout: Layout) -> None:
        self._data, self._model = layout.dp_cp_group, layout.tp_group

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks with other tokens."""
        return self._data

    def get_data_parallel_rank(self) -> int:
        """Rank in that group."""
        return dist.get_rank(self._data)

    def get_data_parallel_world_size(self) -> int:
        """Size of that group."""
        return dist.get_world_size(self._data)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks with other heads of the same tokens."""
        return self._model

    def get_model_parallel_rank(self) -> int:
        """Rank in that group."""
        return dist.get_rank(self._model)

    def get_model_parallel_world_size(self) -> int:
        """Size of that group."""
        return dist.get_world_size(self._model)

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def reduces_itself(stage: int, offload: str) -> bool:
    """Return True if gradients are reduced by :mod:`fusiontree.engines.zero.reduce` instead of DeepSpeed."""
    return stage == 3 and offload == "none"


def deepspeed_config(
    stage: int,
    *,
    max_grad_norm: float,
    offload: str,
    zero3_persistence_threshold: int,
    largest: int,
    block: int,
    pin_memory: bool,
) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Args:
        stage: 1 | 2 | 3.
        max_grad_norm: global norm to clip to; 0 never clips.
        offload: none | optimizer | all: what is kept in CPU memory (all: parameters too, stage 3).
        zero3_persistence_threshold: elements; stage 3 keeps smaller parameters gathered.
        largest: elements of the largest parameter. A gradient that does not fit the bucket would be reduced in the
            precision of the forward pass.
        block: elements of the largest block, whose gradients stage 3 reduces together.
        pin_memory: page-lock that CPU memory.
    """
    # zero/reduce.py reduces the gradients of stage 3 without offload. It needs neither DeepSpeed's buffer nor its
    # streams: its collectives overlap with the computation anyway, and memory that belongs to the computation's own
    # stream is free again as soon as the host frees it.
    ours = reduces_itself(stage, offload)
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": not ours,
        "reduce_scatter": True,
        "overlap_comm": pin_memory and not ours,  # on a GPU
        "reduce_bucket_size": block if ours else max(50_000_000, largest),
        "allgather_bucket_size": 200_000_000,
    }
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": 0,  # zero/gather.py prefetches
            "stage3_param_persistence_threshold": zero3_persistence_threshold,
            "stage3_max_live_parameters": 1_000_000_000,  # bounds DeepSpeed's prefetching only
            "stage3_max_reuse_distance": 0,  # a parameter is released when its module is done
        }
        if offload == "all":
            zero["offload_param"] = {"device": "cpu", "pin_memory": pin_memory}
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed only counts with it
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",  # stage 3 has no sum; see ZeroEngine
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device before each forward pass
    }


def check_report(engine: Any, stage: int, offload: str) -> None:
    """Assert that DeepSpeed does what it was asked for."""
    reported = {
        "stage": engine.zero_optimization_stage(),
        "fp16": engine.fp16_enabled(),
        "bf16": engine.bfloat16_enabled(),
        "autocast": engine.torch_autocast_enabled(),
        "communication": engine.communication_data_type,
        "accumulation": engine.optimizer.gradient_accumulation_dtype,
        "masters": engine.optimizer.master_weights_and_grads_dtype,
        "accumulation steps": engine.gradient_accumulation_steps(),
        "optimizer in CPU memory": bool(engine.zero_use_cpu_optimizer()),
        "optimizer": type(engine.optimizer).__name__,
    }
    asked = {
        "stage": stage,
        "fp16": False,
        "bf16": False,
        "autocast": False,
        "communication": torch.float32,
        "accumulation": torch.float32,
        "masters": torch.float32,
        "accumulation steps": 1,
        "optimizer in CPU memory": offload != "none",
        "optimizer": "DeepSpeedZeroOptimizer_Stage3" if stage == 3 else "DeepSpeedZeroOptimizer",
    }
    assert reported == asked, f"DeepSpeed reports {reported}, asked for {asked}"
