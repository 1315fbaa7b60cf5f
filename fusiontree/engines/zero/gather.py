"""Gathers ZeRO-3's parameters in the precision of the forward pass.

DeepSpeed keeps fp32 partitions, which are the master weights. It would gather them in fp32, or with autocast in bf16
and cast back. :func:`gather_in` replaces each parameter's gather functions: the partition is cast, then gathered, and
the forward pass reads the lower precision, as under FSDP2.

DeepSpeed prefetches a number of elements at every hook, and a block has several hooks, so it would gather parts of many
blocks. :func:`gather_ahead` gathers the full next module, and no other, while a module computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusiontree.engines.zero.deepspeed_adapter import PartitionedParameter
from fusiontree.engines.zero.deepspeed_optimizer import ZeroOptimizer
from fusiontree.parallel.collectives import ALL_GATHER


class _Gathering:
    """Parameters of one process group and one dtype in flight."""

    def __init__(self, parameters: list[PartitionedParameter], flat: Tensor, work: dist.Work | None) -> None:
        self.parameters, self.flat, self.work = parameters, flat, work
        self.done = False

    def wait(self) -> None:
        """Give the parameters their full values."""
        if self.done:  # DeepSpeed waits once per parameter
            return
        if self.work is not None:
            self.work.wait()
        ranks = self.parameters[0].ranks
        sizes = [parameter.shard_numel for parameter in self.parameters]
        if len(sizes) == 1 or ranks == 1:
            full = list(self.flat.split([ranks * size for size in sizes]))
        else:  # the shards of a rank are side by side: one pass puts the ranks' shards of each parameter together
            full = [self.flat.new_empty(ranks * size) for size in sizes]
            rows = [values.view(ranks, -1) for values in full]
            torch.split_with_sizes_copy(self.flat.view(ranks, -1), sizes, dim=1, out=rows)
        for parameter, values in zip(self.parameters, full, strict=True):
            parameter.end_gather(values)
        del self.flat
        self.done = True


class _Gatherings:
    """Several gatherings that are waited for together."""

    def __init__(self, gatherings: list[_Gathering]) -> None:
        self.gatherings = gatherings

    def wait(self, **_: Any) -> None:
        """Wait for each."""
        for gathering in self.gatherings:
            gathering.wait()


def gather_in(dtypes: dict[nn.Parameter, torch.dtype], partitioned: dict[nn.Parameter, PartitionedParameter]) -> None:
    """Let DeepSpeed gather each parameter in its own dtype.

    Args:
        dtypes: of the values that the forward pass reads.
        partitioned: the same parameters, partitioned.
    """

    def start(parameters: Iterable[nn.Parameter]) -> _Gatherings:
        buckets: dict[tuple[int, torch.dtype], list[PartitionedParameter]] = {}
        for parameter in sorted(parameters, key=lambda p: partitioned[p].index):  # the same order on every rank
            known = partitioned[parameter]
            known.begin_gather()
            buckets.setdefault((id(known.group), dtypes[parameter]), []).append(known)
        return _Gatherings([_start_bucket(bucket, dtype) for (_, dtype), bucket in buckets.items()])

    def now(parameters: Iterable[nn.Parameter]) -> None:
        start(parameter for parameter in parameters if partitioned[parameter].is_partitioned).wait()

    for known in partitioned.values():
        known.replace_gather(start, now)


def _start_bucket(bucket: list[PartitionedParameter], dtype: torch.dtype) -> _Gathering:
    """Begin to gather parameters of one process group in ``dtype``."""
    group, ranks, device = bucket[0].group, bucket[0].ranks, bucket[0].device
    shards = [parameter.shard.to(device, non_blocking=True) for parameter in bucket]  # they may be in CPU memory
    local = torch.empty(sum(shard.numel() for shard in shards), dtype=dtype, device=device)
    torch._foreach_copy_(list(local.split([shard.numel() for shard in shards])), shards)
    if ranks == 1:
        return _Gathering(bucket, local, None)
    flat = torch.empty(ranks * local.numel(), dtype=dtype, device=device)
    return _Gathering(bucket, flat, getattr(dist, ALL_GATHER)(flat, local, group=group, async_op=True))


def gather_ahead(optimizer: ZeroOptimizer, modules: Sequence[nn.Module]) -> None:
    """Begin to gather the next module's parameters when a module has its own.

    Args:
        optimizer: of stage 3.
        modules: in the order of the forward pass; the backward pass has the opposite order.
    """
    following = {(module, True): after for module, after in pairwise(modules)}
    following |= {(module, False): after for module, after in pairwise(reversed(modules))}
    partitioned = optimizer.partitioned

    def wrap(
        fetch: Callable[..., None], start: Callable[[set[nn.Parameter], bool], None]
    ) -> Callable[[nn.Module, bool], None]:
        @torch.no_grad()
        def fetch_two(module: nn.Module, forward: bool) -> None:
            fetch(module, forward=forward)
            after = following.get((module, forward))
            missing = set() if after is None else {p for p in after.parameters() if partitioned[p].is_partitioned}
            if missing:
                start(missing, forward)

        return fetch_two

    optimizer.replace_fetch(wrap)
