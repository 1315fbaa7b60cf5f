"""Parameters sharded by ``fully_shard``: gathered block by block for the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fusiontree.engines.parameters.base import Decays, NamedPiece, Placement, as_global
from fusiontree.optim.build import Leaf, new_states
from fusiontree.optim.config import OptimizerSpec
from fusiontree.parallel.global_tensor import GlobalTensor
from fusiontree.parallel.shard_groups import DistributedModel, ShardGroup


class ShardedParameters(Placement):
    """Parameters, gradients and states of the optimizer, each rank with a shard along the first axis."""

    def __init__(
        self, model: DistributedModel, decays: Decays, optimizer: OptimizerSpec, *, reshard_after_forward: bool
    ) -> None:
        """Start without parameters; ``reshard_after_forward`` gathers a block again for its backward pass."""
        super().__init__(model, decays, optimizer)
        self._reshard = reshard_after_forward
        self._small_fp32_modules = nn.ModuleList()  # modules of a handful of parameters, which go with the root's
        self._root: nn.Module = self.model
        self._gloo = False
        self._names: list[str] = []
        self._parameters: dict[str, nn.Parameter] = {}
        self._shards: dict[str, Tensor] = {}  # of each parameter, as plain tensors
        self._states: dict[str, dict[str, Tensor]] = {}

    def take(
        self,
        group: ShardGroup,
        parameters: dict[str, nn.Parameter],
        dtype: torch.dtype,
        mesh: DeviceMesh,
        block: ShardGroup,
    ) -> None:
        """Shard the parameters with ``fully_shard``, or with the root's if they are few."""
        self._names += parameters
        self._gloo = mesh.device_type == "cpu"
        in_block = not block.is_root
        if in_block and group.keep_fp32 and not group.tp_split:
            self._small_fp32_modules.extend(group.modules)
            return
        modules = list(group.modules)
        mine = set(parameters.values())
        if group.is_root:
            self._root = _Root(self.model, self._small_fp32_modules)
            modules = [self._root]
            mine.update(self._small_fp32_modules.parameters())
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=mesh,
            mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
            # Embedding, head and root compute where one pass ends and the other begins.
            reshard_after_forward=self._reshard and in_block,
            ignored_params={p for module in modules for p in module.parameters()} - mine,
        )

    def finish(self, root: nn.Module) -> nn.Module:
        """Let the next parameters travel while a module computes, even where the host is not ahead of the device."""
        for module in self._modules():
            module.set_gradient_divide_factor(1.0)  # the loss is already divided by the global token count
            if self._gloo:
                module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
        model: Any = self.model
        order = [self._root, model.embed, *model.layers, model.head]
        for now, after in pairwise(module for module in order if isinstance(module, FSDPModule)):
            now.set_modules_to_forward_prefetch([after])
        taken = {self.model.get_parameter(name) for name in self._names}
        self._parameters = {name: p for name, p in self.model.named_parameters() if p in taken}
        with torch.no_grad():
            self._shards = {name: _shard(parameter) for name, parameter in self._parameters.items()}
        self._states = {name: new_states(self.optimizer, parameter) for name, parameter in self._parameters.items()}
        return self._root

    def _modules(self) -> list[FSDPModule]:
        return [module for module in self._root.modules() if isinstance(module, FSDPModule)]

    def leaves(self) -> Iterator[Leaf]:
        """Yield this rank's shards."""
        for name, parameter in self._parameters.items():
            states = {state: _shard(values) for state, values in self._states[name].items()}
            yield Leaf(self._shards[name], self.decays(name, parameter), states)

    def begin_backward(self, last: bool) -> None:
        """Let gathers of a recorded pass come after its start; FSDP2 begins the first one without waiting for it."""
        root: Any = self._root
        if self._gloo or not isinstance(root, FSDPModule) or not torch.cuda.is_current_stream_capturing():
            return
        streams = root._get_fsdp_state()._comm_ctx
        for stream in (streams.all_gather_copy_in_stream, streams.all_gather_stream):
            stream.wait_stream(torch.cuda.current_stream())

    def end_evaluation(self) -> None:
        """Free gathered parameters, as a backward pass does: the shards may be loaded anew."""
        for module in self._modules():
            module.reshard()

    def pass_state(self) -> Any:
        """Return the gradients of this step."""
        return [parameter.grad for parameter in self._parameters.values()]

    def set_pass_state(self, state: Any) -> None:
        """Put the host where it was at :meth:`pass_state`."""
        for parameter, gradient in zip(self._parameters.values(), state, strict=True):
            parameter.grad = gradient

    def gradients(self) -> list[Tensor]:
        """Return this rank's shards of the gradient."""
        return [_shard(p.grad) for p in self._parameters.values() if p.grad is not None]

    def set_gradients(self) -> None:
        """Give the shards of the gradient to the optimizer's tensors."""
        for name, parameter in self._parameters.items():
            shard = self._shards[name]
            shard.grad = torch.zeros_like(shard) if parameter.grad is None else _shard(parameter.grad)

    def discard(self) -> None:
        """Clear the gradients."""
        for name, parameter in self._parameters.items():
            parameter.grad = self._shards[name].grad = None

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters and their states."""
        for name, parameter in self._parameters.items():
            yield f"model.{name}", self._located(name, parameter.detach())
            for state, values in self._states[name].items():
                yield f"optimizer.{state}.{name}", self._located(name, values)

    def _located(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor with its position in the full parameter; a tensor parallel shard consists of rectangles."""
        spec = self.specs[name]
        if not spec.is_split:
            return tensor
        rows_before, columns = _offset(tensor)[0], spec.local_shape[1] if len(spec.local_shape) > 1 else 1
        return as_global(spec, _shard(tensor), rows_before * columns)

    def parameter_pieces(self) -> Iterator[NamedPiece]:
        """Yield this rank's shards."""
        for name, parameter in self._parameters.items():
            located = self._located(name, parameter.detach())
            if isinstance(located, GlobalTensor):
                yield from ((name, offset, values) for offset, values in located.pieces)
            else:
                yield name, _offset(located), _shard(located)


class _Root(nn.Module):
    """The model, and beside it the modules inside its blocks whose few parameters are gathered with its own.

    Each block would otherwise gather and reduce its state space parameters by themselves: they stay in fp32, and the
    parameters that ``fully_shard`` gathers together are of one type.
    """

    def __init__(self, model: nn.Module, small_fp32_modules: nn.ModuleList) -> None:
        super().__init__()
        self.model, self.small_fp32_modules = model, small_fp32_modules

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def _shard(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _offset(tensor: Tensor) -> tuple[int, ...]:
    """Return the offset of this rank's shard in a DTensor."""
    assert isinstance(tensor, DTensor)
    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])
