"""Engines ``fsdp2`` and ``ddp``, which need only PyTorch; placements keep parameters local, sharded or replicated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fusiontree.data.batch import MicroBatch
from fusiontree.engines.base import GradientWatch, StepResult
from fusiontree.engines.common import PRECISION, CommonEngine
from fusiontree.engines.parameters.base import Decays, NamedPiece, Placement
from fusiontree.engines.parameters.local import LocalParameters
from fusiontree.engines.parameters.replicated import ReplicatedParameters
from fusiontree.engines.parameters.sharded import ShardedParameters
from fusiontree.models.model import ModelOutput
from fusiontree.optim.build import (
    FusedStep,
    Leaf,
    build_optimizer,
    fill_states,
    fused_step,
    parameter_groups,
    scaled_step,
)
from fusiontree.parallel.batch_sharding import ModelInputs, count_documents
from fusiontree.parallel.fp8 import keep_casts
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.shard_groups import DistributedModel, ShardGroup, shard_groups_leaves_first
from fusiontree.training.config import TrainingConfig
from fusiontree.utils.device import copy_to_host


class TorchEngine(CommonEngine):
    """Keeps parameters that no other rank shares local, and shards (fsdp2) or replicates (ddp) all others."""

    def __init__(
        self,
        model: DistributedModel,
        layout: Layout,
        *,
        materialize: Callable[[ShardGroup], None],
        decays: Decays,
        training: TrainingConfig,
        shard: bool,
        reshard_after_forward: bool = True,
    ) -> None:
        """Materialize, initialize and place ``model`` (on the meta device) one block at a time.

        Args:
            model: the model on the meta device.
            layout: the process groups of this rank; determines the ranks that share a parameter.
            materialize: allocates and initializes the parameters of a shard group.
            decays: returns whether weight decay applies, given a parameter's name and the parameter.
            training: precision, optimizer and clipping.
            shard: True shards shared parameters over all data parallel ranks (fsdp2), False replicates them (ddp).
            reshard_after_forward: gather a block's parameters again for its backward pass instead of keeping them.
        """
        super().__init__(model, layout, training)
        self._max_norm = training.max_grad_norm
        local = LocalParameters(model, decays, self.optimizer_spec)
        shared: Placement = ReplicatedParameters(model, decays, self.optimizer_spec)
        if shard:
            shared = ShardedParameters(model, decays, self.optimizer_spec, reshard_after_forward=reshard_after_forward)
        self.placements: list[Placement] = [local, shared]
        taken: set[str] = set()
        in_place: set[str] = set()
        for groups in shard_groups_leaves_first(model):
            materialize(groups[-1])
            for group in groups:
                mesh = layout.parameter_mesh(shard, group.tp_split)
                parameters = {name: p for name, p in group.named_parameters() if name not in taken}
                taken |= parameters.keys()
                dtype = torch.float32 if group.keep_fp32 else PRECISION[training.precision]
                placement = local if is_local(mesh) else shared
                placement.take(group, parameters, dtype, mesh, block=groups[-1])
                in_place |= parameters.keys() if placement.in_place else set()
            for placement in self.placements:
                placement.end_block()
        root: nn.Module = self.module
        for placement in self.placements:
            root = placement.finish(root)
        self._root = root
        # With one micro-batch per step, each weight is cast once for the forward and once for the backward pass anyway.
        several = training.global_batch_size > layout.dp_size * training.micro_batch_size
        self._casts = keep_casts(self.module, in_place if several else set())
        leaves = {placement: list(placement.leaves()) for placement in self.placements}
        self.optimizer = self._build_optimizer(training, [leaf for its in leaves.values() for leaf in its])
        self._fused = self._fused_step(leaves)
        self._watch_nonfinite()
        self._scale = torch.ones((), device=self.device)
        self._rate = torch.zeros((), device=self.device)
        self.records_step = self.optimizer_spec.scales_gradients and self.device.type == "cuda"
        if self.records_step:
            for settings in self.optimizer.param_groups:
                settings.update(lr=self._rate, capturable=True)

    def _build_optimizer(self, training: TrainingConfig, leaves: list[Leaf]) -> torch.optim.Optimizer:
        decayed, plain = ([leaf.tensor for leaf in leaves if leaf.decays is wanted] for wanted in (True, False))
        groups = parameter_groups(decayed, plain, training.weight_decay)
        optimizer = build_optimizer(training.optimizer, groups)
        for leaf in leaves:
            fill_states(optimizer, leaf.tensor, leaf.states)
        return optimizer

    def _fused_step(self, leaves: dict[Placement, list[Leaf]]) -> FusedStep | None:
        """Return the optimizer's fused step, if it has one and all parameters are kept so that it can be used."""
        if not all(placement.fusable for placement, its in leaves.items() if its):
            return None
        step = fused_step(self.optimizer_spec, self.optimizer, [leaf for its in leaves.values() for leaf in its])
        for placement, its in leaves.items():
            placement.fused = step is not None and bool(its)
        return step

    def forward(
        self, micro: MicroBatch, branch_scale_LB2: Tensor | None = None, layer_metrics: tuple[str, ...] = ()
    ) -> ModelOutput:
        """Run the model on one micro-batch."""
        return self.run(self.inputs(micro, branch_scale_LB2, layer_metrics).to(self.device))

    def most_documents(self, micro_batches: Sequence[MicroBatch]) -> int:
        """Return the greatest number of documents of a micro-batch on any rank, 0 if every row is one document."""
        return self.layout.greatest(max(map(count_documents, micro_batches)))

    def on_any_rank(self, happened: bool) -> bool:
        """Return whether something happened on any rank."""
        return self.layout.greatest(int(happened)) > 0

    def run(self, inputs: ModelInputs) -> ModelOutput:
        """Run the model on inputs on the device, for training."""
        for placement in self.placements:
            placement.begin(training=True)
        return self._call_on(self._root, inputs, taught=True)

    @contextmanager
    def evaluating(self) -> Iterator[Callable[..., ModelOutput]]:
        """Return the model with its parameters in place, in evaluation mode."""
        for placement in self.placements:
            placement.begin(training=False)
        self.module.eval()
        yield self._root
        self.module.train()
        for placement in self.placements:
            placement.end_evaluation()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of ``loss``; ``last`` marks the step's final micro-batch. Reductions are in fp32."""
        self.update_loss_scale()
        self.run_backward(loss, last=last)

    def update_loss_scale(self) -> None:
        """Adapt the loss scale to the last step, for which the host waits if there is a loss scale."""
        scale = self._update_loss_scale()
        if scale is not None:
            self._scale.fill_(scale)

    def run_backward(self, loss: Tensor, *, last: bool) -> None:
        """Do :meth:`backward` at the loss scale of :meth:`update_loss_scale`."""
        if self.loss_scale is not None:
            loss = loss * self._scale
        for placement in self.placements:
            placement.begin_backward(last)
        loss.backward()
        for placement in self.placements:
            placement.end_backward()
            if last:
                placement.wait_gradients()

    def mark_stale(self) -> None:
        """Let the next pass copy or gather the parameters anew."""
        for placement in self.placements:
            placement.mark_stale()
        self._discard_casts()

    def refresh(self) -> None:
        """Let recorded passes find the parameters where others than a fused step may have written to them."""
        for placement in self.placements:
            placement.refresh()

    def _discard_casts(self) -> None:
        """Let FP8 casts of the parameters be made anew."""
        for casts in self._casts:
            casts.valid = False

    def begin_recording(self, *, side_by_side: bool) -> None:
        """Let the device execute the branches of blocks that recompute nothing at the same time, or not."""
        blocks: Any = self.module.layers
        for block, mode in zip(blocks, self.checkpointing.modes, strict=True):
            block.may_fork = side_by_side and mode == "none"

    def pass_state(self) -> list[Any]:
        """Return what the passes of this step left on the host: references to gradients, and how far the step is."""
        return [*(placement.pass_state() for placement in self.placements), [casts.valid for casts in self._casts]]

    def set_pass_state(self, state: list[Any]) -> None:
        """Put the host where it was at :meth:`pass_state`: the device replayed the passes, or did not execute them."""
        *states, valid = state
        for placement, its_state in zip(self.placements, states, strict=True):
            placement.set_pass_state(its_state)
        for casts, its_validity in zip(self._casts, valid, strict=True):
            casts.valid = its_validity

    @property
    def gradient_watch(self) -> GradientWatch:
        """Holds the sum of each micro-batch's gradient."""
        return self._watch

    def step(self, learning_rate: float) -> StepResult:
        """Clip by the global norm, apply the gradient and clear it; a non-finite norm changes no parameter.

        An optimizer with ``scales_gradients`` clips and skips on the device. The host then waits for nothing and can
        prepare the next step.
        """
        self.set_learning_rate(learning_rate)
        return self.end_step(self.run_step())

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next steps."""
        if not self.records_step:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
            return
        self._rate.fill_(learning_rate)

    def _leaf_gradients(self) -> list[Tensor | None]:
        return [gradient for placement in self.placements if placement.fused for gradient in placement.leaf_gradients()]

    def prepare_step(self) -> None:
        """Let :meth:`run_step` be recorded with the gradients of this step."""
        if self._fused is not None:
            self._fused.prepare(self._leaf_gradients())

    @torch.no_grad()
    def run_step(self) -> Tensor:
        """Clip and apply the gradient; return its norm (scalar, unscaled, before clipping)."""
        norm = self._global_norm()
        divisor = torch.ones_like(norm)
        if self.loss_scale:
            norm = norm / self._scale
            divisor = divisor * self._scale
        if self._max_norm:
            divisor = divisor * (norm / self._max_norm).clamp(min=1.0)
        if self._fused is not None:
            self._fused(self._leaf_gradients(), divisor, norm)
            return norm
        for placement in self.placements:
            placement.set_gradients()
        scaled_step(self.optimizer, self.optimizer_spec, divisor, norm)
        return norm

    def end_step(self, norm: Tensor) -> StepResult:
        """Clear the gradient after :meth:`run_step`."""
        read_norm = copy_to_host(norm.view(1))
        self.discard()
        return self._result(lambda: read_norm()[0])

    def discard(self) -> None:
        """Clear the gradient."""
        for placement in self.placements:
            placement.discard()
        self._discard_casts()
        self._watch.end_step()

    def _global_norm(self) -> Tensor:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for placement in self.placements:
            for gradient in placement.gradients():
                by_dtype.setdefault(gradient.dtype, []).append(gradient)
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        for gradients in by_dtype.values():
            square += torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).double().square().sum()
        return self.layout.sum_over_shards(square).sqrt()

    def parameter_pieces(self) -> Iterator[NamedPiece]:
        """Yield name, offset and values of this rank's shard of each parameter.

        Replicated parameters yield the values that the last forward pass used, which may precede the last update.
        """
        order = {name: index for index, name in enumerate(self.specs)}
        pieces = [piece for placement in self.placements for piece in placement.parameter_pieces()]
        yield from sorted(pieces, key=lambda piece: order[piece[0]])

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the training state itself, not copies, as ``model.NAME`` and ``optimizer.STATE.NAME``."""
        self._discard_casts()  # the caller may write to the parameters
        return dict(item for placement in self.placements for item in placement.state_tensors())

    def _step_counts(self) -> list[Tensor]:
        return [state["step"] for state in self.optimizer.state.values()]

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Restore the values of :meth:`state_dict`; fill :meth:`state_tensors` in place before this call."""
        super().load_state_dict(values)
        self.mark_stale()


def is_local(mesh: DeviceMesh) -> bool:
    """Return True if ``mesh`` has a single rank, so that no other rank holds its parameters."""
    return mesh.size() == 1
