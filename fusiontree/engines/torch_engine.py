"""PyTorch FSDP2: parameters, gradients and optimizer sharded; or parameters whole on every rank (``ddp``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from fusiontree.engines.base import StepInputs, StepOutputs, StepResult
from fusiontree.engines.layout_mixin import LayoutMixin
from fusiontree.engines.loss_scale import LossScale
from fusiontree.engines.nonfinite_watch import GradientWatch
from fusiontree.engines.parameters.local import LocalParameters
from fusiontree.engines.parameters.replicated import ReplicatedParameters
from fusiontree.engines.step import run_model
from fusiontree.optim.build import Leaf, build_optimizer, fill_states, new_states, parameter_groups, scaled_step
from fusiontree.optim.config import OPTIMIZERS
from fusiontree.parallel.global_tensor import GlobalTensor
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.shard_groups import DistributedModel, ShardGroup, shard_groups_leaves_first
from fusiontree.training.config import TrainingConfig
from fusiontree.utils.device import copy_to_host

PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class TorchEngine(LayoutMixin):
    """Trains a model with ``fully_shard``, block by block; parameters that no other rank shares are left unsharded.

    Under ``ddp`` the model's parameters are whole on every rank, gradients and optimizer state are cut over the ranks
    (:class:`ReplicatedParameters`). Mixed precision means the same as under ``fsdp2``.
    """

    def __init__(
        self,
        model: DistributedModel,
        layout: Layout,
        *,
        materialize: Callable[[ShardGroup], None],
        decays: Callable[[str, nn.Parameter], bool],
        training: TrainingConfig,
        shard: bool,
        reshard_after_forward: bool = True,
    ) -> None:
        """Materialise, initialise and shard ``model`` (on the meta device) one block at a time.

        Args:
            model: the model on the meta device.
            layout: the process's place; its mesh is sharded over.
            materialize: gives a group memory and initial values.
            decays: tells from name and parameter whether weight decay applies.
            training: precision, optimizer and clipping.
            shard: True shards over all data parallel ranks, False keeps the model's parameters whole (ddp).
            reshard_after_forward: whether a block's parameters are gathered again for its backward pass, or kept.
        """
        super().__init__(layout)
        self.module: Any = model.module
        self.specs = model.specs
        self._shard = shard
        self._reshard = reshard_after_forward
        self._spec = OPTIMIZERS.get(training.optimizer.name)
        self._limit = training.max_grad_norm
        self._local, self._replicated = (
            LocalParameters(self.module),
            ReplicatedParameters(self.module, decays, self._spec),
        )
        self._root: Any = self.module
        self._distribute(model, materialize, PRECISION[training.precision])
        replicated = {view for group in self._replicated.groups for view in group.views.values()}
        self.parameters = {
            name: self._local.masters.get(p, p) for name, p in self.module.named_parameters() if p not in replicated
        }
        """The optimizer's, by name, but for those that lie in flat groups."""
        with torch.no_grad():
            self._parts = {name: _local(parameter) for name, parameter in self.parameters.items()}
        self._states = {name: new_states(self._spec, parameter) for name, parameter in self.parameters.items()}
        leaves = [*self._leaves(decays)]
        decayed, plain = ([leaf.tensor for leaf in leaves if leaf.decays is wanted] for wanted in (True, False))
        self.optimizer = build_optimizer(training.optimizer, parameter_groups(decayed, plain, training.weight_decay))
        for leaf in leaves:
            fill_states(self.optimizer, leaf.tensor, leaf.states)
        self.loss_scale = LossScale() if training.precision == "fp16" else None
        self._last_result: StepResult | None = None
        self._watch = GradientWatch(self.module.embed)

    def _distribute(
        self, model: DistributedModel, materialize: Callable[[ShardGroup], None], compute_dtype: torch.dtype
    ) -> None:
        """Materialise the model block by block and shard what is not this rank's alone."""
        layout, shard = self.layout, self._shard
        small_fp32_modules = nn.ModuleList()  # modules of a handful of parameters, which go with the root's
        taken: set[str] = set()
        for groups in shard_groups_leaves_first(model):
            materialize(groups[-1])
            in_block = not groups[-1].is_root
            for group in groups:
                dtype = torch.float32 if group.keep_fp32 else compute_dtype
                mesh = layout.parameter_mesh(shard, group.tp_split)
                parameters = {name: p for name, p in group.named_parameters() if name not in taken}
                taken |= parameters.keys()
                if is_unsharded(mesh):
                    self._local.add(parameters, dtype)
                    continue
                if not shard:
                    # A block's parameters travel together, and so do the small fp32 parameters of all blocks;
                    # embedding and head are at work at different ends of the pass.
                    used_by = groups[-1].modules if in_block else group.modules
                    used_by = (self.module,) if group.keep_fp32 else used_by
                    self._replicated.collect(parameters, dtype, mesh.get_group("replicate"), used_by)
                    continue
                if in_block and group.keep_fp32 and not group.tp_split:
                    small_fp32_modules.extend(group.modules)
                    continue
                modules = list(group.modules)
                if group.is_root:
                    self._root = _Root(self.module, small_fp32_modules)
                    modules = [self._root]
                fully_shard(
                    modules if len(modules) > 1 else modules[0],
                    mesh=mesh,
                    mp_policy=MixedPrecisionPolicy(
                        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
                    ),
                    # Embedding, head and root are at work where one pass ends and the other begins.
                    reshard_after_forward=self._reshard and in_block,
                    ignored_params={*self._local.masters, *(small_fp32_modules.parameters() if in_block else ())},
                )
            self._replicated.build(later=self.module)
        self._replicated.build()
        blocks = self.module.layers
        self._replicated.in_order([self.module, self.module.embed, self.module.srte, *blocks, self.module.head])
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # the loss is already divided by the global token count
                if layout.backend == "gloo":
                    module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
        # The next parameters travel while this module computes, even where the host is not ahead of the device.
        order = [self._root, self.module.embed, *blocks, self.module.head]
        for now, after in pairwise(module for module in order if isinstance(module, FSDPModule)):
            now.set_modules_to_forward_prefetch([after])

    def _leaves(self, decays: Callable[[str, nn.Parameter], bool]) -> Iterator[Leaf]:
        """Yield this rank's parts as plain tensors: sharded ones cost the host several times the calls."""
        for name, parameter in self.parameters.items():
            states = {kind: _local(values) for kind, values in self._states[name].items()}
            yield Leaf(self._parts[name], decays(name, parameter), states)
        for group in self._replicated.groups:
            yield from (leaf for leaf in group.optimized() if leaf.tensor.numel())

    def forward(self, inputs: StepInputs) -> StepOutputs:
        """Run the model on one micro batch."""
        self._local.begin(training=True)
        self._replicated.begin()
        return run_model(self._root, inputs, self.layout)

    @torch.no_grad()
    def evaluate(self, inputs: StepInputs) -> Tensor:
        """Return the summed cross entropy of this rank's tokens."""
        self._local.begin(training=False)
        self._replicated.begin()
        self.module.eval()
        loss_sum = run_model(self._root, inputs, self.layout).loss_sum
        self.module.train()
        for module in self._root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what no backward pass gives up: the sharded parameters may be loaded anew
        return loss_sum

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``; gradients are reduced in fp32 over the ranks."""
        if self.loss_scale:
            self._adapt(self.loss_scale)
            loss = loss * self.loss_scale.scale
        self._replicated.last_pass = last
        loss.backward()
        self._replicated.end_pass()

    @torch.no_grad()
    def step(self, learning_rate: float) -> StepResult:
        """Clip by the global norm, apply the gradient, clear it; the device decides by itself whether to skip.

        All of it is queued and none of it waited for: the host is free to prepare the next step.
        """
        self._replicated.await_gradients()
        norm = self._global_norm()
        self._hand_over()
        divisor = torch.ones_like(norm)
        if self.loss_scale:
            norm = norm / self.loss_scale.scale
            divisor = divisor * self.loss_scale.scale
        if self._limit:
            divisor = divisor * (norm / self._limit).clamp(min=1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        scaled_step(self.optimizer, self._spec, divisor, norm)
        scale, read_norm = self.loss_scale, copy_to_host(norm.view(1))
        why = f"overflow at loss scale {scale.scale}" if scale else "non-finite gradient norm"
        result = StepResult(lambda: read_norm()[0], unless_finite=why)
        self.discard()
        self._last_result = result
        return result

    def _adapt(self, scale: LossScale) -> None:
        """Let the loss scale learn from the step before, once."""
        if self._last_result is not None:
            scale.update(overflow=self._last_result.skipped is not None)
            self._last_result = None

    def discard(self) -> None:
        """Clear the gradient."""
        self._local.discard()
        self._replicated.discard()
        for name, parameter in self.parameters.items():
            parameter.grad = self._parts[name].grad = None
        self._watch.end_step()

    def finite_passes(self) -> list[bool]:
        """Return for each micro batch of the last step whether this rank's own gradient was finite."""
        return self._watch.finite()

    def parameter_pieces(self) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """Yield name, offset and values of this rank's part of each parameter.

        Where other ranks hold copies, it is what the last forward pass computed with.
        """
        for name, held in self.module.named_parameters():
            placed = self._placed(name, self.parameters.get(name, held).detach())
            if isinstance(placed, GlobalTensor):
                yield from ((name, offset, values) for offset, values in placed.pieces)
            else:
                yield name, _offset(placed), _local(placed)

    def _hand_over(self) -> None:
        """Give the gradients to the optimizer's tensors."""
        self._local.hand_over()
        self._replicated.hand_over()
        for name, parameter in self.parameters.items():
            if isinstance(parameter, DTensor) and parameter.grad is not None:
                self._parts[name].grad = _local(parameter.grad)

    def _global_norm(self) -> Tensor:
        grads = [self._local.gradients.get(parameter, parameter.grad) for parameter in self.parameters.values()]
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for grad in [*grads, *self._replicated.gradients()]:
            if grad is not None:
                kinds.setdefault(grad.dtype, []).append(_local(grad))
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        for alike in kinds.values():
            square += torch.stack(torch._foreach_norm(alike, 2, torch.float32)).double().square().sum()
        return self.layout.sum_over_parts(square).sqrt()

    def state_tensors(self) -> dict[str, Tensor]:
        """Live tensors: ``model.NAME``, ``optimizer.STATE.NAME``."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            tensors[f"model.{name}"] = self._placed(name, parameter.detach())
            for kind, values in self._states[name].items():
                tensors[f"optimizer.{kind}.{name}"] = self._placed(name, values)
        for group in self._replicated.groups:
            for kind, part, values in group.state():
                spec = self.specs[part.name]
                pieces = spec.pieces(values, part.start)
                tensors[f"{kind}.{part.name}"] = GlobalTensor(spec.global_shape, pieces, values.dtype, values.device)
        self._replicated.changed()  # whoever has them may write to them
        return tensors

    def _placed(self, name: str, tensor: Tensor) -> Tensor:
        """Name what this rank holds of a parameter cut over tp by its place in the whole."""
        spec = self.specs[name]
        if not spec.is_split:
            return tensor
        local = _local(tensor)
        before = _offset(tensor)[0] * (spec.local_shape[1] if len(spec.local_shape) > 1 else 1)
        pieces = spec.pieces(local.view(-1), before)
        return GlobalTensor(spec.global_shape, pieces, tensor.dtype, local.device)

    def state_values(self) -> dict[str, Any]:
        """Optimizer step count and loss scale."""
        step = next(iter(self.optimizer.state.values()))["step"]
        values: dict[str, Any] = {"optimizer_step": int(step)}
        if self.loss_scale:
            self._adapt(self.loss_scale)
            values["loss_scale"] = {"scale": self.loss_scale.scale, "good_steps": self.loss_scale.good_steps}
        return values

    def load_state_values(self, values: dict[str, Any]) -> None:
        """Take back :meth:`state_values`."""
        for state in self.optimizer.state.values():
            state["step"].fill_(values["optimizer_step"])
        self._last_result = None
        self._replicated.changed()
        if self.loss_scale and "loss_scale" in values:
            self.loss_scale.scale = values["loss_scale"]["scale"]
            self.loss_scale.good_steps = values["loss_scale"]["good_steps"]


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


def is_unsharded(mesh: DeviceMesh) -> bool:
    """Whether this rank is alone with what is sharded or copied over ``mesh``."""
    return mesh.size() == 1


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _offset(tensor: Tensor) -> tuple[int, ...]:
    """Where this rank's part of a sharded tensor begins in it."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim()
    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])
