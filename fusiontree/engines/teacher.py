"""A frozen model beside the trained one, whose distribution the loss compares (``training.teacher``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusiontree.engines.common import PRECISION
from fusiontree.engines.config import ENGINES
from fusiontree.engines.parameters.base import as_global
from fusiontree.engines.parameters.sharded import ShardedParameters
from fusiontree.models.config import ModelConfig
from fusiontree.models.model import TeacherOutput
from fusiontree.optim.config import OPTIMIZERS
from fusiontree.parallel.batch_sharding import ModelInputs
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.shard_groups import DistributedModel, ShardGroup, build_model, shard_groups_leaves_first
from fusiontree.training.config import TrainingConfig


class Teacher:
    """This rank's part of a teacher, in the training precision, without gradients and states.

    Tensor and context parallelism split it as the trained model. Engines that shard parameters shard it too: FSDP2
    gathers a block for its forward pass.
    """

    def __init__(self, model: DistributedModel, layout: Layout, training: TrainingConfig, *, shard: bool) -> None:
        """Allocate and place ``model`` (on the meta device); fill :meth:`state_tensors` before the first call.

        Args:
            model: this rank's part of the teacher.
            layout: this process among all.
            training: precision, and the temperature of the loss.
            shard: shard parameters over the ranks that share them, instead of replicating them.
        """
        self.module, self._specs = model.module, model.specs
        self._temperature = training.teacher_temperature
        stateless = OPTIMIZERS.get(training.optimizer.name).without_states()
        self._sharded = ShardedParameters(model, lambda name, parameter: False, stateless, reshard_after_forward=True)
        self.is_sharded = False
        """Whether parameters are gathered for each forward pass."""
        taken: set[str] = set()
        for groups in shard_groups_leaves_first(model):
            for group in groups:
                dtype = torch.float32 if group.keep_fp32 else PRECISION[training.precision]
                mine = {name: p for name, p in group.named_parameters() if name not in taken}
                taken |= mine.keys()
                _allocate(group, dtype, layout.device)
                mesh = layout.parameter_mesh(shard, group.tp_split)
                if shard and mesh.size() > 1:
                    self.is_sharded = True
                    placed = {name: p for name, p in group.named_parameters() if name in mine}
                    self._sharded.take(group, placed, dtype, mesh, block=groups[-1])
        self._root: nn.Module = self.module
        if self.is_sharded:
            self._root = self._sharded.finish(self.module)
        self.module.eval()

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the parameters with their names in a checkpoint, to be filled in place."""
        tensors = dict(self._sharded.state_tensors()) if self.is_sharded else {}
        for name, parameter in self.module.named_parameters():
            key, values = f"model.{name}", parameter.detach()
            if key not in tensors:
                tensors[key] = as_global(self._specs[name], values, 0) if self._specs[name].is_split else values
        return tensors

    @torch.no_grad()
    def __call__(self, inputs: ModelInputs) -> TeacherOutput:
        """Return hidden states and head for this rank's chunk of a micro-batch; all ranks call this together."""
        hidden_BSC = self._root(
            input_ids_BS=inputs.input_ids_BS, documents=inputs.documents, hidden_only=True
        ).hidden_BSC
        head: Any = self.module.head
        if not self.is_sharded:
            return TeacherOutput(hidden_BSC, head.weight.detach(), self._temperature)
        if hasattr(head, "unshard"):  # other ranks hold shards of it
            head.unshard()
        weight_VC = head.weight.detach().clone()  # the gathered memory is freed now
        self._sharded.end_evaluation()
        return TeacherOutput(hidden_BSC, weight_VC, self._temperature)


def build_teacher(
    model_config: ModelConfig, parallel: ParallelConfig, training: TrainingConfig, layout: Layout
) -> Teacher:
    """Return a teacher without values, placed as the engine places the trained model.

    Args:
        model_config: of the teacher.
        parallel: the ``parallel`` section.
        training: the ``training`` section.
        layout: this process among all.
    """
    shard = ENGINES.get(parallel.engine).shards_parameters
    return Teacher(build_model(model_config, layout), layout, training, shard=shard)


def _allocate(group: ShardGroup, dtype: torch.dtype, device: torch.device) -> None:
    """Give the group's parameters that are still on the meta device memory; a tied parameter stays one parameter."""
    done: dict[nn.Parameter, nn.Parameter] = {}
    for owner in group.modules:
        for module in owner.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.is_meta:
                    continue
                if parameter not in done:
                    values = torch.empty(parameter.shape, dtype=dtype, device=device)
                    done[parameter] = nn.Parameter(values, requires_grad=False)
                setattr(module, leaf, done[parameter])
