"""Reduces ZeRO-3's gradients and gives them to the step without DeepSpeed's copies and waits.

DeepSpeed copies gradients one by one into a bucket, rearranges the bucket by rank, divides, reduces, multiplies, copies
each shard to its place, and copies all shards together for the step; it waits for the device after each backward pass
and computes the norms one by one in float64. Here one pass casts a bucket to fp32 and arranges it by rank; the sum over
the ranks is added where the step reads it.

Everything runs on the stream of the computation, except the collective, which overlaps: it begins when a bucket is
ready, and the device, not the host, waits for it when the next bucket is ready. So memory is free again without events,
and at most two buckets exist.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusiontree.engines.zero.deepspeed_adapter import PartitionedParameter
from fusiontree.engines.zero.deepspeed_optimizer import Stage3Gradients, ZeroOptimizer
from fusiontree.parallel.collectives import REDUCE_SCATTER


class GradientReduction:
    """Replaces DeepSpeed's reduction in one stage 3 optimizer that keeps its state on the device."""

    def __init__(self, optimizer: ZeroOptimizer) -> None:
        """Replace the methods of ``optimizer`` that DeepSpeed's hooks and its ``step`` call."""
        self._zero = zero = Stage3Gradients(optimizer)
        self._ready: dict[tuple[int, torch.dtype], list[PartitionedParameter]] = {}
        self._in_flight: tuple[list[PartitionedParameter], Tensor, Tensor, dist.Work | None] | None = None
        self._shards: dict[int, Tensor] = {}  # this rank's shard of each parameter's gradient, by the parameter's index
        self._of_group: list[Tensor] = []
        end = 0
        for parameters in zero.groups:
            start = end
            for parameter in parameters:
                self._shards[parameter.index] = zero.buffer.narrow(0, end, parameter.shard_numel)
                end += parameter.shard_numel
            self._of_group.append(zero.buffer.narrow(0, start, end - start))
        zero.replace_reduction(add=self.add, finish=self.finish, norm=self.norm, give=self.give)

    def add(self, parameter: nn.Parameter) -> None:
        """Take a parameter's finished gradient."""
        known = self._zero.partitioned[parameter]
        assert parameter.grad is not None
        self._ready.setdefault((id(known.group), parameter.grad.dtype), []).append(known)
        if parameter in self._zero.ends:  # buckets end with a block; a small bucket waits for the next block
            self._start_from(self._zero.bucket_size // 2)
        elif not known.is_in_block:
            self._start_from(self._zero.bucket_size)

    def _start_from(self, elements: int) -> None:
        """Start the reduction of the buckets that hold at least ``elements`` elements."""
        for bucket in self._ready.values():
            if bucket and sum(parameter.numel for parameter in bucket) >= elements:
                self._start(bucket)

    @torch.no_grad()
    def _start(self, bucket: list[PartitionedParameter]) -> None:
        """Begin to sum a bucket over the ranks that share its parameters."""
        self._land()
        parameters = sorted(bucket, key=lambda parameter: parameter.index)  # the same order on every rank
        bucket.clear()
        gradients = [parameter.take_gradient() for parameter in parameters]
        group, ranks = parameters[0].group, parameters[0].ranks
        size = sum(parameter.shard_numel for parameter in parameters)
        send = torch.empty(ranks * size, dtype=torch.float32, device=gradients[0].device)
        # Row r has rank r's shards; shards that a parameter does not fill are padded with zeros.
        torch._chunk_cat(gradients, dim=0, num_chunks=ranks, out=send.view(ranks, size))
        if ranks == 1:
            self._in_flight = parameters, send, send, None
            return
        received = send.new_empty(size)
        work = getattr(dist, REDUCE_SCATTER)(received, send, group=group, async_op=True)
        self._in_flight = parameters, received, send, work  # keeps the sent values until they have arrived

    @torch.no_grad()
    def _land(self) -> None:
        """Add the sum in flight to this rank's shards."""
        if self._in_flight is None:
            return
        parameters, received, _, work = self._in_flight
        self._in_flight = None
        if work is not None:
            work.wait()
        shards = [self._shards[parameter.index] for parameter in parameters]
        sums = list(received.split([shard.numel() for shard in shards]))
        if self._zero.is_first_pass:
            torch._foreach_copy_(shards, sums)
        else:
            torch._foreach_add_(shards, sums)

    def finish(self) -> None:
        """End a backward pass."""
        self._start_from(0)
        self._land()
        self._zero.end_backward([[self._shards[p.index] for p in parameters] for parameters in self._zero.groups])

    @torch.no_grad()
    def norm(self, gradients: list[Tensor], parameters: list[nn.Parameter], norm_type: float = 2.0) -> Tensor:
        """Return the norm of the gradient of ``parameters`` over all ranks; -1 where it is not finite."""
        total = self._zero.squared_norm(gradients, parameters)
        return torch.where(total.isfinite(), total.sqrt(), -1.0).float()

    def give(self, group: int) -> None:
        """Give the step the gradient of a group of parameters."""
        self._zero.give(group, self._of_group[group])
