"""Reduction of ZeRO-3's gradients, and what a step makes of them, without DeepSpeed's copies and waits.

DeepSpeed takes gradients one by one into a bucket, puts the bucket together anew rank by rank, divides, reduces,
multiplies, copies each part to its place, and copies all places together for the step; it waits for the device after
each backward pass and computes one norm after the other in float64. Here a bucket is put together in the pass that
brings it to fp32, summed, and added where the step reads it.

Everything runs on the stream of the computation, and only the collective itself beside it: it begins when the bucket is
ready and is waited for, by the device and not by the host, when the next bucket is. So memory needs no events to be
free again, and at most two buckets exist.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusiontree.parallel.collectives import REDUCE_SCATTER


class GradientReduction:
    """Takes the place of DeepSpeed's reduction in one stage 3 optimizer that keeps its state on the device."""

    def __init__(self, zero: Any) -> None:
        """Replace the methods of ``zero``, DeepSpeed's optimizer, that its hooks and its ``step`` call."""
        self._zero = zero
        self._bucket_size = zero.reduce_bucket_size
        self._ends = {parameters[-1] for parameters in zero.leaf_parameters.values()}  # of blocks, which come whole
        self._ready: dict[tuple[int, torch.dtype], list[Any]] = {}
        self._flying: tuple[list[Any], Tensor, Tensor, dist.Work | None] | None = None
        flat, offset = zero.grad_partitions_flat_buffer, 0
        self._targets: dict[int, Tensor] = {}  # this rank's part of each parameter's gradient, by the parameter's id
        self._of_group: list[Tensor] = []
        for parameters in zero.fp16_groups:
            start = offset
            for parameter in parameters:
                size = parameter.partition_numel()
                self._targets[parameter.ds_id] = flat.narrow(0, offset, size)
                offset += size
            self._of_group.append(flat.narrow(0, start, offset - start))
        for name, method in {
            "reduce_ready_partitions_and_remove_grads": self.add,
            "independent_gradient_partition_epilogue": self.finish,
            "get_grad_norm_direct": self.norm,
            "_prepare_fp32_grad_for_sub_group": self.give,
        }.items():
            assert callable(getattr(zero, name)), f"this DeepSpeed's stage 3 optimizer has no {name}"
            setattr(zero, name, method)
        # Each of a block's parameters leaves an event, and with more than two the host would wait for the device.
        limit = "_PartitionedParameterCoordinator__max_ongoing_fetch_events"
        assert getattr(zero.parameter_offload.param_coordinator, limit) == 2
        setattr(zero.parameter_offload.param_coordinator, limit, 1 << 30)

    def add(self, parameter: Any) -> None:
        """Take a parameter's finished gradient."""
        bucket = self._ready.setdefault((id(parameter.ds_process_group), parameter.grad.dtype), [])
        bucket.append(parameter)
        if parameter in self._ends:  # buckets end with a block; what is small waits for the next one
            self._start_from(self._bucket_size // 2)
        elif not hasattr(parameter, "ds_z3_leaf_module"):
            self._start_from(self._bucket_size)

    def _start_from(self, elements: int) -> None:
        """Start the reduction of the buckets that hold at least ``elements`` elements."""
        for bucket in self._ready.values():
            if bucket and sum(p.ds_numel for p in bucket) >= elements:
                self._start(bucket)

    @torch.no_grad()
    def _start(self, bucket: list[Any]) -> None:
        """Begin to sum a bucket over the ranks that share its parameters."""
        self._land()
        parameters = sorted(bucket, key=lambda p: p.ds_id)  # the same order on every rank
        bucket.clear()
        group, ranks = parameters[0].ds_process_group, parameters[0].ds_zero_partition_world_size
        gradients = [p.grad.reshape(-1) for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        size = sum(p.partition_numel() for p in parameters)
        send = torch.empty(ranks * size, dtype=torch.float32, device=gradients[0].device)
        # Row r is what rank r keeps of each; parts that a parameter does not fill are padded with zeros.
        torch._chunk_cat(gradients, dim=0, num_chunks=ranks, out=send.view(ranks, size))
        if ranks == 1:
            self._flying = parameters, send, send, None
            return
        received = send.new_empty(size)
        work = getattr(dist, REDUCE_SCATTER)(received, send, group=group, async_op=True)
        self._flying = parameters, received, send, work  # what is sent lives until it has arrived

    @torch.no_grad()
    def _land(self) -> None:
        """Add the sum in flight to this rank's parts."""
        if self._flying is None:
            return
        parameters, received, _, work = self._flying
        self._flying = None
        if work is not None:
            work.wait()
        targets = [self._targets[p.ds_id] for p in parameters]
        sums = list(received.split([target.numel() for target in targets]))
        if self._zero.micro_step_id == 0:
            torch._foreach_copy_(targets, sums)
        else:
            torch._foreach_add_(targets, sums)

    def finish(self) -> None:
        """End a backward pass."""
        self._start_from(0)
        self._land()
        for index, parameters in enumerate(self._zero.fp16_groups):
            self._zero.averaged_gradients[index] = [self._targets[p.ds_id] for p in parameters]
        self._zero._epilogue_ran_this_backward = True

    @torch.no_grad()
    def norm(self, gradients: list[Tensor], parameters: list[Any], norm_type: float = 2.0) -> Tensor:
        """Return the norm of the whole gradient of ``parameters``; -1 where it is not finite."""
        from deepspeed.runtime.utils import is_model_parallel_parameter

        zero = self._zero
        group = parameters[0].ds_process_group
        everywhere = zero._grad_norm_counts_every_rank(parameters, group)
        counted = [
            gradient
            for gradient, parameter in zip(gradients, parameters, strict=True)
            if everywhere or is_model_parallel_parameter(parameter) or zero.model_parallel_rank == 0
        ]
        total = gradients[0].new_zeros((), dtype=torch.float64)
        if counted:
            total = torch.stack(torch._foreach_norm(counted)).double().square().sum()
        dist.all_reduce(total, group=group)
        if not everywhere:
            zero._model_parallel_all_reduce(tensor=total, op=dist.ReduceOp.SUM)
        return torch.where(total.isfinite(), total.sqrt(), -1.0).float()

    def give(self, group: int) -> None:
        """Give the step the gradient of a group of parameters."""
        self._zero.fp32_partitioned_groups_flat[group].grad = self._of_group[group]
        self._zero.averaged_gradients[group] = None
