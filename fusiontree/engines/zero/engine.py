"""DeepSpeed ZeRO: optimizer state (``zero1``), gradients (``zero2``) and parameters (``zero3``) sharded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusiontree.data.batch import MicroBatch
from fusiontree.engines.base import StepResult
from fusiontree.engines.common import PRECISION, CommonEngine
from fusiontree.engines.parameters.base import Decays, NamedPiece
from fusiontree.engines.parameters.flat_slice import FlatSlice
from fusiontree.engines.zero.deepspeed_adapter import PartitionedParameter, partition, start_deepspeed
from fusiontree.engines.zero.deepspeed_optimizer import ZeroOptimizer
from fusiontree.engines.zero.deepspeed_setup import ParallelGroups, check_report, deepspeed_config, reduces_itself
from fusiontree.engines.zero.gather import gather_ahead, gather_in
from fusiontree.engines.zero.reduce import GradientReduction
from fusiontree.models.model import ModelOutput
from fusiontree.optim.build import build_optimizer, fill_states, new_states, parameter_groups
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.global_tensor import GlobalTensor
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.shard_groups import DistributedModel, ShardGroup, shard_groups_leaves_first
from fusiontree.training.config import TrainingConfig


class ZeroEngine(CommonEngine):
    """Trains a model under DeepSpeed ZeRO.

    DeepSpeed reduces, clips and steps in fp32; FusionTree casts what the forward pass reads (see
    :mod:`deepspeed_setup`). Stage 3 gathers a block's parameters together (:mod:`gather`), and FusionTree reduces its
    gradients unless CPU memory takes part (:mod:`reduce`).
    """

    def __init__(
        self,
        model: DistributedModel,
        layout: Layout,
        *,
        stage: int,
        materialize: Callable[[ShardGroup], None],
        decays: Decays,
        training: TrainingConfig,
        parallel: ParallelConfig,
    ) -> None:
        """Materialize, initialize and shard ``model`` (on the meta device) one block at a time.

        Args:
            model: the model on the meta device. Under stages 1 and 2 its modules cast their own parameters.
            layout: this process among all.
            stage: 1 | 2 | 3.
            materialize: gives a group memory and initial values.
            decays: tells from name and parameter whether weight decay applies.
            training: precision of the forward pass, optimizer and clipping.
            parallel: CPU offload, and which parameters stage 3 keeps gathered.
        """
        super().__init__(model, layout, training)
        self.stage, self._offload = stage, parallel.offload
        deepspeed = start_deepspeed(layout)
        config = self._config(training, parallel)
        dtypes = self._materialize(model, materialize, config, PRECISION[training.precision])
        self.parameters: dict[str, nn.Parameter] = dict(self.module.named_parameters())
        partitioned: dict[nn.Parameter, PartitionedParameter] = {}
        if stage == 3:
            partitioned = {parameter: PartitionedParameter(parameter) for parameter in self.parameters.values()}
            gather_in({parameter: dtypes[name] for name, parameter in self.parameters.items()}, partitioned)
            for block in self.module.layers:  # one pair of hooks gathers the full block, forward and backward
                deepspeed.utils.set_z3_leaf_module(block, True)
        self._engine, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=self._build_optimizer(training, decays),
            config=config,
            mpu=ParallelGroups(layout),
            dist_init_required=False,
        )
        check_report(self._engine, stage, self._offload)
        self._zero = ZeroOptimizer(self._engine.optimizer, stage, partitioned)
        self._sum_gradients()
        if stage == 3:
            gather_ahead(self._zero, [self.module.embed, *self.module.layers, self.module.head])
        self._names = {parameter: name for name, parameter in self.parameters.items()}
        self._slices = list(self._zero.slices(self._names, layout.dp_cp_rank))
        for flat in self._zero.masters:
            fill_states(self._zero.torch_optimizer, flat, new_states(self.optimizer_spec, flat))
        self._watch_nonfinite()

    def _config(self, training: TrainingConfig, parallel: ParallelConfig) -> dict[str, Any]:
        return deepspeed_config(
            self.stage,
            max_grad_norm=training.max_grad_norm,
            offload=parallel.offload,
            zero3_persistence_threshold=parallel.zero3_persistence_threshold,
            largest=max(math.prod(spec.local_shape) for spec in self.specs.values()),
            block=max(sum(p.numel() for p in block.parameters()) for block in self.module.layers),
            pin_memory=self.device.type == "cuda",
        )

    def _materialize(
        self,
        model: DistributedModel,
        materialize: Callable[[ShardGroup], None],
        config: dict[str, Any],
        precision: torch.dtype,
    ) -> dict[str, torch.dtype]:
        """Materialize each block and, under stage 3, partition it; return the dtype that the forward pass reads."""
        dtypes: dict[str, torch.dtype] = {}
        for groups in shard_groups_leaves_first(model):
            materialize(groups[-1])
            for group in groups:
                dtype = torch.float32 if group.keep_fp32 else precision
                for name, _ in group.named_parameters():
                    dtypes.setdefault(name, dtype)
            if self.stage == 3:
                self._partition(groups[-1], config)
        return dtypes

    def _partition(self, group: ShardGroup, config: dict[str, Any]) -> None:
        ranks = {p: self.layout.parameter_group(self.specs[name].is_split) for name, p in group.named_parameters()}
        offload = config["zero_optimization"].get("offload_param")
        partition(group.modules[0], ranks, self.layout.world_group, offload)

    def _sum_gradients(self) -> None:
        """Let gradients be summed over the ranks: the loss is already divided by the global token count."""
        if reduces_itself(self.stage, self._offload):
            GradientReduction(self._zero)
        else:
            self._zero.sum_gradients()

    def _build_optimizer(self, training: TrainingConfig, decays: Decays) -> torch.optim.Optimizer:
        decayed = [p for n, p in self.parameters.items() if decays(n, p)]
        plain = [p for n, p in self.parameters.items() if not decays(n, p)]
        return build_optimizer(training.optimizer, parameter_groups(decayed, plain, training.weight_decay))

    def _sum_over_tp(self) -> None:
        """Sum the reduced gradients of parameters that tp replicates: each rank of tp saw other tokens.

        Stages 1 and 2 reduce over dp x cp alone. The ranks of a tp group hold the same partitions of such parameters.
        """
        for pairs in self._zero.reduced_gradients():
            replicated = [gradient for parameter, gradient in pairs if not self.specs[self._names[parameter]].is_split]
            if not replicated:
                continue
            flat = torch.cat([gradient.reshape(-1) for gradient in replicated])
            dist.all_reduce(flat, group=self.layout.tp_group)
            for gradient, values in zip(replicated, flat.split([g.numel() for g in replicated]), strict=True):
                gradient.copy_(values.view_as(gradient))

    def forward(
        self, micro: MicroBatch, branch_scale_LB2: Tensor | None = None, layer_metrics: tuple[str, ...] = ()
    ) -> ModelOutput:
        """Run the model on one micro batch."""
        inputs = self.inputs(micro, branch_scale_LB2, layer_metrics).to(self.device)
        return self._call_on(self._engine, inputs, taught=True)

    @contextmanager
    def evaluating(self) -> Iterator[Callable[..., ModelOutput]]:
        """Return DeepSpeed's engine in evaluation mode."""
        self._engine.eval()
        yield self._engine
        self._engine.train()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``; gradients are reduced in fp32 over the ranks."""
        self._engine.set_gradient_accumulation_boundary(last)
        scale = self._update_loss_scale()
        if scale is not None:
            self._zero.set_loss_scale(scale)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> StepResult:
        """Clip by the global norm, apply the gradient, clear it."""
        self._zero.set_learning_rate(learning_rate)
        if self.stage < 3 and self.layout.tp_size > 1:
            self._sum_over_tp()
        skipped_before = self._engine.skipped_steps
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        skipped = self._engine.skipped_steps != skipped_before  # DeepSpeed itself skips non-finite steps
        assert skipped or math.isfinite(norm), "DeepSpeed applied a gradient that is not finite"
        self._watch.end_step()
        return self._result(lambda: math.nan if skipped else norm)

    def discard(self) -> None:
        """Clear the gradient."""
        self._zero.discard(offloaded=self._offload != "none")
        self._watch.end_step()

    def parameter_pieces(self) -> Iterator[NamedPiece]:
        """Yield name, offset and values of this rank's shard of each parameter."""
        for part in self._slices:
            for offset, view in self._pieces(part, self._zero.masters[part.group].detach()):
                yield part.name, offset, view

    def _pieces(self, part: FlatSlice, flat: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
        return self.specs[part.name].pieces(part.of(flat), part.start)

    def state_tensors(self) -> dict[str, Tensor]:
        """Live tensors: ``model.NAME``, ``optimizer.STATE.NAME``."""
        tensors: dict[str, Tensor] = {}
        for part in self._slices:
            master = self._zero.masters[part.group]
            state = self._zero.torch_optimizer.state[master]
            shape = self.specs[part.name].global_shape
            states = {f"optimizer.{kind}": state[kind] for kind in self.optimizer_spec.states}
            for kind, flat in ({"model": master.detach()} | states).items():
                tensors[f"{kind}.{part.name}"] = GlobalTensor(shape, self._pieces(part, flat), flat.dtype, flat.device)
        return tensors

    def _step_counts(self) -> list[Tensor]:
        return [self._zero.torch_optimizer.state[flat]["step"] for flat in self._zero.masters]

    @torch.no_grad()
    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`, and bring the loaded masters to the values that the forward pass reads."""
        super().load_state_dict(values)
        self._zero.copy_masters()
        if self.stage == 3 and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the next gather reads the partitions on another stream
