"""All that FusionTree reads, sets or replaces inside DeepSpeed: members that another version may rename.

No module but this and :mod:`deepspeed_optimizer` touches a private or version-dependent member. :func:`start_deepspeed`
refuses versions for which these members were not checked; setup.py bounds the extra ``deepspeed`` alike.
"""

from __future__ import annotations

import importlib.metadata
import logging
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusiontree.parallel.layout import Layout
from fusiontree.utils.environment import tell_deepspeed
from fusiontree.utils.errors import UserError

SUPPORTED = ((0, 19, 8), (0, 20, 0))
"""Lowest supported version, and the first that is not supported any more."""


def check_version(installed: str) -> None:
    """Check that the adapter knows this version of DeepSpeed.

    Raises:
        UserError: it does not.
    """
    numbers = tuple(int(part) if part.isdigit() else 0 for part in installed.split("+")[0].split(".")[:3])
    low, high = (".".join(map(str, version)) for version in SUPPORTED)
    if not SUPPORTED[0] <= numbers < SUPPORTED[1]:
        raise UserError(
            f"deepspeed {installed} is installed, and the zero engines support versions from {low} up to, not "
            f"including, {high}; pip install 'deepspeed>={low},<{high}', or set parallel.engine=fsdp2 (zero3) or "
            f"ddp (zero1, zero2)"
        )


def start_deepspeed(layout: Layout) -> Any:
    """Import DeepSpeed for the layout's device and let it use the layout's process group; return the module.

    Raises:
        UserError: the installed version is not supported.
    """
    check_version(importlib.metadata.version("deepspeed"))
    tell_deepspeed(layout.place.local_rank, layout.device.type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Torch warns at each call of collectives that DeepSpeed knows by their old names.
    warnings.filterwarnings("ignore", message=".*`torch.distributed.*is deprecated", category=FutureWarning)
    # Otherwise DeepSpeed compiles operations to find out which it can build, and builds an all-reduce for CPUs.
    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.comm.comm.cdb = None  # the backend of an earlier engine, whose process groups may have ended
    deepspeed.init_distributed(dist_backend=layout.backend, auto_mpi_discovery=False, verbose=False)
    found = deepspeed.accelerator.get_accelerator().device_name()
    assert found == layout.device.type, f"DeepSpeed computes on {found}, the layout on {layout.device.type}"
    return deepspeed


def partition(
    module: nn.Module, groups: dict[nn.Parameter, dist.ProcessGroup], everybody: dist.ProcessGroup, offload: Any
) -> None:
    """Partition a module's parameters under stage 3, in fp32.

    Args:
        module: owns the parameters.
        groups: the ranks that share each parameter.
        everybody: all ranks.
        offload: the entry ``offload_param`` of DeepSpeed's configuration, or None.
    """
    import deepspeed

    for parameter, ranks in groups.items():
        # zero.Init takes one group for all parameters, and ignores its mpu.
        parameter.ds_zero_partition_process_group = ranks  # type: ignore[attr-defined]
    deepspeed.zero.Init(
        module=module,
        data_parallel_group=everybody,
        remote_device=offload["device"] if offload else None,
        pin_memory=bool(offload and offload["pin_memory"]),
        dtype=torch.float32,
    )


class PartitionedParameter:
    """A parameter that stage 3 partitioned: each of ``ranks`` ranks holds a shard of ``shard_numel`` elements.

    The last shards are padded.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        """Read the sizes of ``parameter``."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        known: Any = parameter
        self._parameter, self._status = known, ZeroParamStatus
        self.index: int = known.ds_id
        """The same on every rank."""
        self.numel: int = known.ds_numel
        self.shape: torch.Size = known.ds_shape
        self.group: dist.ProcessGroup = known.ds_process_group
        self.ranks: int = known.ds_zero_partition_world_size
        self.rank: int = known.ds_zero_partition_rank
        self.shard_numel: int = known.partition_numel()

    @property
    def device(self) -> torch.device:
        """Device of the full parameter."""
        return self._parameter.device

    @property
    def shard(self) -> Tensor:
        """This rank's shard, which may be in CPU memory."""
        return self._parameter.ds_tensor

    @property
    def is_partitioned(self) -> bool:
        """True unless the full values are present or on their way."""
        return self._parameter.ds_status == self._status.NOT_AVAILABLE

    @property
    def is_in_block(self) -> bool:
        """True if DeepSpeed gathers the parameter together with all others of its block."""
        return hasattr(self._parameter, "ds_z3_leaf_module")

    def begin_gather(self) -> None:
        """Note that the full values are on their way."""
        assert self.is_partitioned, self._parameter.ds_summary()
        self._parameter.ds_status = self._status.INFLIGHT

    def end_gather(self, values: Tensor) -> None:
        """Give the parameter its full values, from a flat tensor that begins with them."""
        self._parameter.data = values[: self.numel].view(self.shape)
        self._parameter.ds_status = self._status.AVAILABLE

    def take_gradient(self) -> Tensor:
        """Return the flat gradient and clear it."""
        gradient, self._parameter.grad = self._parameter.grad.reshape(-1), None
        return gradient

    def replace_gather(
        self, start: Callable[[Iterable[nn.Parameter]], Any], now: Callable[[Iterable[nn.Parameter]], None]
    ) -> None:
        """Replace the functions that DeepSpeed looks up on the parameter to gather parameters.

        Args:
            start: begins to gather parameters; what it returns has a method ``wait``.
            now: gathers those of the parameters that are partitioned, and waits.
        """
        this = self._parameter

        def all_gather_coalesced(parameters: Iterable[Any], safe_mode: bool = False, quantize: bool = False) -> Any:
            assert not quantize
            return start(parameters)

        this.all_gather_coalesced = all_gather_coalesced
        this.all_gather = lambda param_list=None, **_: now([this] if param_list is None else param_list)
