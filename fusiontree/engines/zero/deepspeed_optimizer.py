"""DeepSpeed's ZeRO optimizers: the members that FusionTree reads or replaces (see :mod:`deepspeed_adapter`)."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusiontree.engines.parameters.flat_slice import FlatSlice, slice_between
from fusiontree.engines.zero.deepspeed_adapter import PartitionedParameter

_FETCH_EVENTS = "_PartitionedParameterCoordinator__max_ongoing_fetch_events"
_START_GATHER = "_PartitionedParameterCoordinator__all_gather_params"
STAGE_3_MEMBERS = (
    "_epilogue_ran_this_backward",
    "_grad_norm_counts_every_rank",
    "_gradient_averaging_world_size",
    "_model_parallel_all_reduce",
    "_prepare_fp32_grad_for_sub_group",
    "_reassign_or_swap_out_partitioned_parameters",
    "averaged_gradients",
    "fp16_groups",
    "fp32_partitioned_groups_flat",
    "get_grad_norm_direct",
    "independent_gradient_partition_epilogue",
    "leaf_parameters",
    "micro_step_id",
    "model_parallel_rank",
    "parameter_offload",
    "persistent_parameters",
    "reduce_ready_partitions_and_remove_grads",
)
STAGE_1_2_MEMBERS = (
    "all_grad_tensors",
    "averaged_gradients",
    "gradient_average",
    "micro_step_id",
    "params_in_partition",
    "partition_size",
    "round_robin_bit16_groups",
    "round_robin_bit16_offsets",
    "single_partition_of_fp32_groups",
    "update_lp_params",
)


class ZeroOptimizer:
    """DeepSpeed's optimizer of one stage, which owns masters and reduced gradients."""

    def __init__(self, zero: Any, stage: int, partitioned: dict[nn.Parameter, PartitionedParameter]) -> None:
        """Take DeepSpeed's optimizer, and the parameters that stage 3 partitioned; assert that used members exist."""
        missing = [m for m in (STAGE_3_MEMBERS if stage == 3 else STAGE_1_2_MEMBERS) if not hasattr(zero, m)]
        version = importlib.metadata.version("deepspeed")
        assert not missing, f"the optimizer of stage {stage} of deepspeed {version} has no {', '.join(missing)}"
        self._zero, self.stage, self.partitioned = zero, stage, partitioned

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that changes the masters."""
        return self._zero.optimizer

    @property
    def masters(self) -> list[Tensor]:
        """This rank's fp32 masters: a flat buffer for each group of parameters."""
        if self.stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    @property
    def groups(self) -> list[list[PartitionedParameter]]:
        """The parameters of each flat buffer of stage 3, in the buffer's order."""
        return [[self.partitioned[parameter] for parameter in group] for group in self._zero.fp16_groups]

    def slices(self, names: dict[nn.Parameter, str], rank: int) -> Iterator[FlatSlice]:
        """Yield this rank's slice of each parameter in the masters.

        Stage 3 shards each parameter by itself; stages 1 and 2 shard the concatenation of a group's parameters.

        Args:
            names: of the parameters.
            rank: of this process among the ranks that stages 1 and 2 shard over.
        """
        zero = self._zero
        if self.stage < 3:
            for group, parameters in enumerate(zero.round_robin_bit16_groups):
                begin = rank * zero.partition_size[group]
                end = begin + zero.partition_size[group]
                for parameter, first in zip(parameters, zero.round_robin_bit16_offsets[group], strict=True):
                    yield slice_between(begin, end, names[parameter], group, first, parameter.numel())
            return
        for group, parameters in enumerate(zero.fp16_groups):
            offset = 0
            for parameter in parameters:
                known = self.partitioned[parameter]
                start = known.shard_numel * known.rank
                length = min(max(known.numel - start, 0), known.shard_numel)
                yield FlatSlice(names[parameter], group, offset, start if length else 0, length)
                offset += known.shard_numel

    def sum_gradients(self) -> None:
        """Let DeepSpeed sum gradients over the ranks, not average them."""
        if self.stage == 3:
            # DeepSpeed averages over the ranks that share a parameter, and those differ between parameters that are
            # split over tp and others; it has no setting for a sum here.
            self._zero._gradient_averaging_world_size = lambda parameters, ranks: 1
        else:
            assert self._zero.gradient_average is False

    def reduced_gradients(self) -> Iterator[list[tuple[nn.Parameter, Tensor]]]:
        """Yield the parameters of each group of stages 1 and 2 with this rank's slices of their reduced gradients."""
        for group, gradients in self._zero.averaged_gradients.items():
            # There is one gradient per parameter, and perhaps one of padding.
            yield list(zip(self._zero.params_in_partition[group], gradients, strict=False))

    def set_loss_scale(self, scale: float) -> None:
        """Set the factor of the loss, by which the step divides the gradient."""
        self._zero.override_loss_scale(scale)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of all groups."""
        self._zero.set_lr(learning_rate)

    def discard(self, *, offloaded: bool) -> None:
        """Clear the step's gradients; ``offloaded`` tells that the optimizer's tensors are in CPU memory."""
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        for group in list(zero.averaged_gradients):
            zero.averaged_gradients[group] = None
        if self.stage < 3:
            zero.all_grad_tensors = {}
            zero.micro_step_id = -1  # as its step() sets it: the next gradient is the first, and adds to nothing
        if offloaded:
            zero.reset_cpu_buffers()

    def copy_masters(self) -> None:
        """Bring the masters to the values that the forward pass reads."""
        if self.stage < 3:
            self._zero.update_lp_params()
            return
        for group in range(len(self.masters)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if persistent := self._zero.persistent_parameters:
            for parameter in persistent:
                parameter.partition()
            persistent[0].all_gather(persistent)

    def replace_fetch(self, wrap: Callable[..., Callable[..., None]]) -> None:
        """Replace the function that gathers a module's parameters before its forward and its backward pass.

        Args:
            wrap: given that function, which takes a module and ``forward``, and the function that starts to gather a
                set of parameters for the forward pass or the backward pass; returns the new function.
        """
        coordinator = self._zero.parameter_offload.param_coordinator
        coordinator.fetch_sub_module = wrap(coordinator.fetch_sub_module, getattr(coordinator, _START_GATHER))


class Stage3Gradients:
    """The members of stage 3's optimizer that belong to reduction and step, for a replacement of its reduction."""

    def __init__(self, optimizer: ZeroOptimizer) -> None:
        """Read the sizes."""
        self._zero, self.partitioned, self.groups = optimizer._zero, optimizer.partitioned, optimizer.groups
        self.bucket_size: int = self._zero.reduce_bucket_size
        self.ends = {parameters[-1] for parameters in self._zero.leaf_parameters.values()}
        """The last parameter of each block."""
        self.buffer: Tensor = self._zero.grad_partitions_flat_buffer
        """Memory of the gradients of this rank's shards."""

    def replace_reduction(
        self,
        *,
        add: Callable[[nn.Parameter], None],
        finish: Callable[[], None],
        norm: Callable[..., Tensor],
        give: Callable[[int], None],
    ) -> None:
        """Replace the methods that DeepSpeed's hooks and its ``step`` call.

        Args:
            add: takes a parameter whose gradient is finished.
            finish: ends a backward pass.
            norm: returns the norm of gradients, given these and their parameters; -1 if it is not finite.
            give: gives the step the gradient of a group.
        """
        zero = self._zero
        zero.reduce_ready_partitions_and_remove_grads = add
        zero.independent_gradient_partition_epilogue = finish
        zero.get_grad_norm_direct = norm
        zero._prepare_fp32_grad_for_sub_group = give
        # Each of a block's parameters leaves an event, and with more than two the host would wait for the device.
        coordinator = zero.parameter_offload.param_coordinator
        assert getattr(coordinator, _FETCH_EVENTS) == 2
        setattr(coordinator, _FETCH_EVENTS, 1 << 30)

    @property
    def is_first_pass(self) -> bool:
        """True in the first backward pass of a step."""
        return self._zero.micro_step_id == 0

    def end_backward(self, gradients: list[list[Tensor]]) -> None:
        """Tell DeepSpeed the gradients of each group's shards at the end of a backward pass."""
        for group, values in enumerate(gradients):
            self._zero.averaged_gradients[group] = values
        self._zero._epilogue_ran_this_backward = True

    def give(self, group: int, gradient: Tensor) -> None:
        """Give the step the gradient of a group's master."""
        self._zero.fp32_partitioned_groups_flat[group].grad = gradient
        self._zero.averaged_gradients[group] = None

    def squared_norm(self, gradients: list[Tensor], parameters: list[nn.Parameter]) -> Tensor:
        """Return the square of the norm of a gradient over all ranks, in fp64; each element counts once.

        Args:
            gradients: of this rank's shards.
            parameters: sharded over the same ranks.
        """
        from deepspeed.runtime.utils import is_model_parallel_parameter

        zero, group = self._zero, self.partitioned[parameters[0]].group
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
        return total
