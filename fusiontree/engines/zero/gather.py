"""Gathering ZeRO-3's parameters in the precision of the forward pass.

DeepSpeed keeps fp32 partitions, which are the master weights. It would gather them in fp32, or with autocast in bf16
and cast back. Here each parameter's own gather functions, which DeepSpeed looks up on the parameter, are replaced: the
partition is cast, gathered, and the forward sees the lower precision, as under FSDP2.

DeepSpeed looks ahead by a number of elements at every hook, of which a block has several, so it would gather pieces of
many blocks. Here the next module in order is gathered whole while one computes, and no other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusiontree.parallel.collectives import ALL_GATHER


class _Gathering:
    """Parameters of one group in flight."""

    def __init__(self, parameters: list[Any], flat: Tensor, work: dist.Work | None, available: Any) -> None:
        self.parameters, self.flat, self.work, self.available = parameters, flat, work, available
        self.done = False

    def wait(self, **_: Any) -> None:
        """Give the parameters their values."""
        if self.done:  # each of the parameters asks
            return
        if self.work is not None:
            self.work.wait()
        ranks = self.parameters[0].ds_zero_partition_world_size
        sizes = [parameter.ds_tensor.ds_numel for parameter in self.parameters]
        if len(sizes) == 1 or ranks == 1:
            wholes = list(self.flat.split([ranks * size for size in sizes]))
        else:  # each rank's parts lie side by side: one pass puts the ranks' parts of a parameter together
            wholes = [self.flat.new_empty(ranks * size) for size in sizes]
            rows = [whole.view(ranks, -1) for whole in wholes]
            torch.split_with_sizes_copy(self.flat.view(ranks, -1), sizes, dim=1, out=rows)
        for parameter, whole in zip(self.parameters, wholes, strict=True):
            parameter.data = whole[: parameter.ds_numel].view(parameter.ds_shape)
            parameter.ds_status = self.available
        del self.flat
        self.done = True


class _All:
    """Several gatherings waited for together."""

    def __init__(self, gatherings: list[_Gathering]) -> None:
        self.gatherings = gatherings

    def wait(self, **_: Any) -> None:
        """Wait for each."""
        for gathering in self.gatherings:
            gathering.wait()


def gather_in(dtypes: dict[nn.Parameter, torch.dtype], status: Any) -> None:
    """Let DeepSpeed gather each parameter in its own dtype.

    Args:
        dtypes: what the forward pass sees; the parameters are already partitioned by ``zero.Init``.
        status: DeepSpeed's ``ZeroParamStatus``.
    """

    def start(parameters: Iterable[Any]) -> _All:
        buckets: dict[tuple[int, torch.dtype], list[Any]] = {}
        for parameter in sorted(parameters, key=lambda p: p.ds_id):  # the same order on every rank
            assert parameter.ds_status == status.NOT_AVAILABLE, parameter.ds_summary()
            parameter.ds_status = status.INFLIGHT
            buckets.setdefault((id(parameter.ds_process_group), dtypes[parameter]), []).append(parameter)
        return _All([_start_bucket(bucket, dtype) for (_, dtype), bucket in buckets.items()])

    def _start_bucket(bucket: list[Any], dtype: torch.dtype) -> _Gathering:
        group, ranks = bucket[0].ds_process_group, bucket[0].ds_zero_partition_world_size
        device = bucket[0].device
        parts = [p.ds_tensor.to(device, non_blocking=True) for p in bucket]  # they may wait in CPU memory
        mine = torch.empty(sum(part.numel() for part in parts), dtype=dtype, device=device)
        torch._foreach_copy_(list(mine.split([part.numel() for part in parts])), parts)
        if ranks == 1:
            return _Gathering(bucket, mine, None, status.AVAILABLE)
        flat = torch.empty(ranks * mine.numel(), dtype=dtype, device=device)
        return _Gathering(
            bucket, flat, getattr(dist, ALL_GATHER)(flat, mine, group=group, async_op=True), status.AVAILABLE
        )

    def all_gather_coalesced(parameters: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> _All:
        assert not quantize
        return start(parameters)

    def now(parameters: Iterable[Any]) -> None:
        start(p for p in parameters if p.ds_status == status.NOT_AVAILABLE).wait()

    for parameter in dtypes:
        one: Any = parameter
        one.all_gather_coalesced = all_gather_coalesced
        one.all_gather = lambda param_list=None, one=one, **_: now([one] if param_list is None else param_list)


def gather_ahead(coordinator: Any, modules: Sequence[nn.Module], status: Any) -> None:
    """Start gathering the next module's parameters when a module has its own.

    Args:
        coordinator: DeepSpeed's, which fetches a module's parameters before its forward and its backward pass.
        modules: in the order of the forward pass; the backward pass comes in the opposite one.
        status: DeepSpeed's ``ZeroParamStatus``.
    """
    following = {(one, True): other for one, other in pairwise(modules)}
    following |= {(one, False): other for one, other in pairwise(reversed(modules))}
    fetch, start = coordinator.fetch_sub_module, coordinator._PartitionedParameterCoordinator__all_gather_params

    @torch.no_grad()
    def fetch_two(module: nn.Module, forward: bool) -> None:
        fetch(module, forward=forward)
        coming = following.get((module, forward))
        if coming is not None:
            missing = {p for p in coming.parameters() if p.ds_status == status.NOT_AVAILABLE}  # type: ignore[attr-defined]
            if missing:
                start(missing, forward)

    coordinator.fetch_sub_module = fetch_two
