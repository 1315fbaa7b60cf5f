"""An engine as a plugin: ``--plugin docs/extend/all_reduce_engine.py parallel.engine=all_reduce``.

Every rank holds parameters, gradients and optimizer states in full; one all-reduce per parameter and step sums the
gradients. The simplest engine of data parallelism, for models that fit a device many times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fusiontree.data.batch import MicroBatch
from fusiontree.engines.base import StepResult
from fusiontree.engines.common import CommonEngine
from fusiontree.engines.config import ENGINES, EngineSpec, Sizes, StateMemory, Transfer
from fusiontree.engines.parameters.base import Decays, NamedPiece, as_global
from fusiontree.models.model import ModelOutput
from fusiontree.optim.build import build_optimizer, fill_states, new_states, parameter_groups, scaled_step
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.shard_groups import DistributedModel, ShardGroup, shard_groups_leaves_first
from fusiontree.training.config import TrainingConfig
from fusiontree.utils.device import copy_to_host


class AllReduceSpec(EngineSpec):
    """Everything replicated."""

    casts_parameters = True

    def keeps_matrices(self, ranks: int) -> bool:
        """Return True: no parameter is flattened or sharded, so optimizers of whole matrices may be used."""
        return True

    def memory(self, sizes: Sizes, parallel: ParallelConfig) -> StateMemory:
        """Count gradients in fp32, and the cast copies of the block that computes."""
        return StateMemory((4 + sizes.stepped) * sizes.on_rank, gathered=sizes.element * sizes.block)

    def traffic(self, sizes: Sizes, parallel: ParallelConfig) -> list[Transfer]:
        """Count the all-reduce in fp32, which sends each element twice."""
        return [Transfer(8 * sizes.on_rank, sizes.ranks, sizes.ranks)]

    def build(
        self,
        model: DistributedModel,
        layout: Layout,
        *,
        materialize: Callable[[ShardGroup], None],
        decays: Decays,
        parallel: ParallelConfig,
        training: TrainingConfig,
    ) -> AllReduceEngine:
        """Return the engine."""
        return AllReduceEngine(model, layout, materialize, decays, training)


class AllReduceEngine(CommonEngine):
    """Trains a model that every rank holds in fp32."""

    def __init__(
        self,
        model: DistributedModel,
        layout: Layout,
        materialize: Callable[[ShardGroup], None],
        decays: Decays,
        training: TrainingConfig,
    ) -> None:
        """Materialize the model and build its optimizer."""
        super().__init__(model, layout, training)
        self._max_norm = training.max_grad_norm
        self.parameters: dict[str, nn.Parameter] = {}  # a tied parameter has its first name
        self._mesh: dict[nn.Parameter, DeviceMesh] = {}  # the ranks that hold copies
        for groups in shard_groups_leaves_first(model):
            materialize(groups[-1])
            for group in groups:
                mesh = layout.parameter_mesh(shard=False, tp_sharded=group.tp_split)
                for name, parameter in group.named_parameters():
                    if parameter not in self._mesh:
                        self.parameters[name], self._mesh[parameter] = parameter, mesh
        decayed = [p for name, p in self.parameters.items() if decays(name, p)]
        plain = [p for name, p in self.parameters.items() if not decays(name, p)]
        groups_of_optimizer = parameter_groups(decayed, plain, training.weight_decay)
        self.optimizer = build_optimizer(training.optimizer, groups_of_optimizer)
        for parameter in self.parameters.values():
            fill_states(self.optimizer, parameter, new_states(self.optimizer_spec, parameter))
        self._watch_nonfinite()

    def forward(
        self, micro: MicroBatch, branch_scale_LB2: Tensor | None = None, layer_metrics: tuple[str, ...] = ()
    ) -> ModelOutput:
        """Run the model on this rank's chunk of one micro-batch."""
        return self._call(self.module, micro, branch_scale_LB2, layer_metrics)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss`` to that of earlier micro-batches."""
        scale = self._update_loss_scale()
        (loss if scale is None else loss * scale).backward()

    @torch.no_grad()
    def step(self, learning_rate: float) -> StepResult:
        """Sum the gradients over the ranks, clip by the global norm, apply and clear them."""
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        for parameter, mesh in self._mesh.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)  # weight decay applies all the same
            if mesh.size() > 1:
                dist.all_reduce(parameter.grad, group=mesh.get_group("replicate"))
            square += parameter.grad.double().square().sum() / mesh.size()  # each copy counts its part
        norm = self.layout.sum_over_shards(square).sqrt()
        divisor = torch.ones_like(norm)
        if self.loss_scale:
            norm, divisor = norm / self.loss_scale.scale, divisor * self.loss_scale.scale
        if self._max_norm:
            divisor = divisor * (norm / self._max_norm).clamp(min=1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        scaled_step(self.optimizer, self.optimizer_spec, divisor, norm)  # a norm that is not finite changes nothing
        read_norm = copy_to_host(norm.view(1))
        self.discard()
        return self._result(lambda: read_norm()[0])

    def discard(self) -> None:
        """Clear the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self._watch.end_step()

    def parameter_pieces(self) -> Iterator[NamedPiece]:
        """Yield this rank's shard of each parameter: all of it, unless tensor parallelism splits it."""
        for name, parameter in self.parameters.items():
            for offset, values in self.specs[name].pieces(parameter.detach().view(-1)):
                yield name, offset, values

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the live tensors of the training state by their names in a checkpoint."""
        tensors = {}
        for name, parameter in self.parameters.items():
            states = {f"optimizer.{state}.{name}": self.optimizer.state[parameter][state] for state in self._states()}
            for key, values in {f"model.{name}": parameter.detach(), **states}.items():
                spec = self.specs[name]
                tensors[key] = as_global(spec, values, 0) if spec.is_split else values
        return tensors

    def _states(self) -> list[str]:
        return list(self.optimizer_spec.states)

    def _step_counts(self) -> list[Tensor]:
        return [state["step"] for state in self.optimizer.state.values()]


ENGINES.register("all_reduce", AllReduceSpec())
