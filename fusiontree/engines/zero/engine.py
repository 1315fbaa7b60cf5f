"""DeepSpeed ZeRO: optimizer (``zero1``), gradients (``zero2``) and parameters (``zero3``) cut over the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fusiontree.engines.base import StepInputs, StepOutputs, StepResult
from fusiontree.engines.common import PRECISION, CommonEngine
from fusiontree.engines.parameters.flat_slice import FlatSlice
from fusiontree.engines.zero.deepspeed_setup import (
    ParallelGroups,
    check_report,
    deepspeed_config,
    reduces_itself,
    start_deepspeed,
)
from fusiontree.engines.zero.flat_slices import stage3_slices, stage12_slices
from fusiontree.engines.zero.gather import gather_ahead, gather_in
from fusiontree.engines.zero.reduce import GradientReduction
from fusiontree.optim.build import build_optimizer, fill_states, new_states, parameter_groups
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.global_tensor import GlobalTensor
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.shard_groups import DistributedModel, ShardGroup, shard_groups_leaves_first
from fusiontree.training.config import TrainingConfig


class ZeroEngine(CommonEngine):
    """Trains a model under DeepSpeed ZeRO.

    DeepSpeed reduces, clips and steps; which precision the forward sees is ours (see :mod:`zero_setup`). Under stage 3
    a block's parameters come and go together, and unless CPU memory takes part the reduction is ours too
    (:mod:`zero_gather`, :mod:`zero_reduce`).
    """

    def __init__(
        self,
        model: DistributedModel,
        layout: Layout,
        *,
        stage: int,
        materialize: Callable[[ShardGroup], None],
        decays: Callable[[str, nn.Parameter], bool],
        training: TrainingConfig,
        parallel: ParallelConfig,
    ) -> None:
        """Materialise, initialise and cut ``model`` (on the meta device) one block at a time.

        Args:
            model: the model on the meta device. Under stages 1 and 2 its forwards cast the parameters themselves.
            layout: the process's place.
            stage: 1 | 2 | 3.
            materialize: gives a group memory and initial values.
            decays: tells from name and parameter whether weight decay applies.
            training: precision of the forward pass, optimizer and clipping.
            parallel: what waits in CPU memory, and which parameters stage 3 keeps gathered.
        """
        super().__init__(model, layout, training)
        self.stage, self._offload = stage, parallel.offload
        self._deepspeed = start_deepspeed(layout)
        config = deepspeed_config(
            stage,
            max_grad_norm=training.max_grad_norm,
            offload=self._offload,
            zero3_persistence_threshold=parallel.zero3_persistence_threshold,
            largest=max(math.prod(spec.local_shape) for spec in self.specs.values()),
            block=max(sum(p.numel() for p in block.parameters()) for block in self.module.layers),
            pin_memory=layout.device.type == "cuda",
        )
        dtypes: dict[str, torch.dtype] = {}
        for groups in shard_groups_leaves_first(model):
            materialize(groups[-1])
            for group in groups:
                dtype = torch.float32 if group.keep_fp32 else PRECISION[training.precision]
                for name, _ in group.named_parameters():
                    dtypes.setdefault(name, dtype)
            if stage == 3:
                self._partition(groups[-1], config)
        self.parameters: dict[str, nn.Parameter] = dict(self.module.named_parameters())
        if stage == 3:
            status = self._deepspeed.runtime.zero.partition_parameters.ZeroParamStatus
            gather_in({parameter: dtypes[name] for name, parameter in self.parameters.items()}, status)
            for block in self.module.layers:  # gathered whole, forward and backward, by one pair of hooks
                self._deepspeed.utils.set_z3_leaf_module(block, True)
        self._engine, *_ = self._deepspeed.initialize(
            model=self.module,
            optimizer=self._build_optimizer(training, decays),
            config=config,
            mpu=ParallelGroups(layout),
            dist_init_required=False,
        )
        self._zero: Any = self._engine.optimizer
        check_report(self._engine, stage, self._offload)
        self._sum_gradients()
        if stage == 3:
            modules = [self.module.embed, *self.module.layers, self.module.head]
            gather_ahead(self._zero.parameter_offload.param_coordinator, modules, status)
        self._names = names = {parameter: name for name, parameter in self.parameters.items()}
        if stage == 3:
            self._flats: list[Tensor] = self._zero.fp32_partitioned_groups_flat
            self._parts: list[FlatSlice] = list(stage3_slices(self._zero, names))
        else:
            self._flats = self._zero.single_partition_of_fp32_groups
            self._parts = list(stage12_slices(self._zero, names, layout.dp_cp_rank))
        for flat in self._flats:
            fill_states(self._zero.optimizer, flat, new_states(self.optimizer_spec, flat))
        self._watch_gradients()

    def _partition(self, group: ShardGroup, config: dict[str, Any]) -> None:
        for name, parameter in group.named_parameters():
            # zero.Init's own argument would be one group for all, and its mpu is ignored.
            ranks = self.layout.parameter_group(self.specs[name].is_split)
            parameter.ds_zero_partition_process_group = ranks  # type: ignore[attr-defined]
        zero = config["zero_optimization"]
        offload = zero.get("offload_param")
        self._deepspeed.zero.Init(
            module=group.modules[0],
            data_parallel_group=self.layout.world_group,
            remote_device=offload["device"] if offload else None,
            pin_memory=bool(offload and offload["pin_memory"]),
            dtype=torch.float32,
        )

    def _build_optimizer(
        self, training: TrainingConfig, decays: Callable[[str, nn.Parameter], bool]
    ) -> torch.optim.Optimizer:
        decayed = [p for n, p in self.parameters.items() if decays(n, p)]
        plain = [p for n, p in self.parameters.items() if not decays(n, p)]
        return build_optimizer(training.optimizer, parameter_groups(decayed, plain, training.weight_decay))

    def _sum_gradients(self) -> None:
        """Let gradients be summed over the ranks: the loss is already divided by the global token count."""
        if reduces_itself(self.stage, self._offload):
            GradientReduction(self._zero)
        elif self.stage == 3:
            # DeepSpeed averages over the ranks that share a parameter, and those differ between parameters that are
            # split over tp and others; it has no setting for a sum here.
            assert callable(self._zero._gradient_averaging_world_size)
            self._zero._gradient_averaging_world_size = lambda parameters, ranks: 1
        else:
            assert self._zero.gradient_average is False

    def _sum_over_tp(self) -> None:
        """Sum the reduced gradients of what tp leaves whole: each of its ranks saw its own tokens.

        Stages 1 and 2 reduce over dp x cp alone. The ranks of a tp group hold the same partitions of such parameters.
        """
        for group, gradients in self._zero.averaged_gradients.items():
            parameters = self._zero.params_in_partition[group]  # a gradient for each, and perhaps one of padding
            whole = [
                gradient
                for parameter, gradient in zip(parameters, gradients, strict=False)
                if not self.specs[self._names[parameter]].is_split
            ]
            if not whole:
                continue
            flat = torch.cat([gradient.reshape(-1) for gradient in whole])
            dist.all_reduce(flat, group=self.layout.tp_group)
            for gradient, values in zip(whole, flat.split([g.numel() for g in whole]), strict=True):
                gradient.copy_(values.view_as(gradient))

    def forward(self, inputs: StepInputs) -> StepOutputs:
        """Run the model on one micro batch."""
        return self._call(self._engine, inputs)

    @torch.no_grad()
    def evaluate(self, inputs: StepInputs) -> Tensor:
        """Return the summed cross entropy of this rank's tokens."""
        self._engine.eval()
        loss_sum = self._call(self._engine, inputs).loss_sum
        self._engine.train()
        return loss_sum

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``; gradients are reduced in fp32 over the ranks."""
        self._engine.set_gradient_accumulation_boundary(last)
        scale = self._adapted_scale()
        if scale is not None:
            self._zero.override_loss_scale(scale)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> StepResult:
        """Clip by the global norm, apply the gradient, clear it."""
        self._zero.set_lr(learning_rate)
        if self.stage < 3 and self.layout.tp_size > 1:
            self._sum_over_tp()
        skipped_before = self._engine.skipped_steps
        self._engine.step()
        norm = float(self._engine.get_global_grad_norm())
        left_out = self._engine.skipped_steps != skipped_before  # DeepSpeed leaves out non-finite steps by itself
        assert left_out or math.isfinite(norm), "DeepSpeed applied a gradient that is not finite"
        self._watch.end_step()
        return self._result(lambda: math.nan if left_out else norm)

    def discard(self) -> None:
        """Clear the gradient."""
        zero = self._zero
        zero.zero_grad(set_to_none=True)
        for group in list(zero.averaged_gradients):
            zero.averaged_gradients[group] = None
        if self.stage < 3:
            zero.all_grad_tensors = {}
            zero.micro_step_id = -1  # as its step() sets it: the next gradient is the first, and adds to nothing
        if self.offloads_optimizer:
            zero.reset_cpu_buffers()
        self._watch.end_step()

    @property
    def offloads_optimizer(self) -> bool:
        """True when master weights and moments wait in CPU memory."""
        return bool(self._engine.zero_use_cpu_optimizer())

    def parameter_pieces(self) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """Yield name, offset and values of this rank's part of each parameter."""
        for part in self._parts:
            for offset, view in self._pieces(part, self._flats[part.group].detach()):
                yield part.name, offset, view

    def _pieces(self, part: FlatSlice, flat: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
        return self.specs[part.name].pieces(part.of(flat), part.start)

    def state_tensors(self) -> dict[str, Tensor]:
        """Live tensors: ``model.NAME``, ``optimizer.STATE.NAME``."""
        tensors: dict[str, Tensor] = {}
        for part in self._parts:
            master = self._flats[part.group]
            state = self._zero.optimizer.state[master]
            shape = self.specs[part.name].global_shape
            for kind, flat in (
                ("model", master.detach()),
                *((f"optimizer.{name}", state[name]) for name in self.optimizer_spec.states),
            ):
                tensors[f"{kind}.{part.name}"] = GlobalTensor(shape, self._pieces(part, flat), flat.dtype, flat.device)
        return tensors

    def _step_counts(self) -> list[Tensor]:
        return [self._zero.optimizer.state[flat]["step"] for flat in self._flats]

    @torch.no_grad()
    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`, and bring the loaded master weights to the forward's copies of them."""
        super().load_state_dict(values)
        if self.stage < 3:
            self._zero.update_lp_params()
            return
        for group in range(len(self._flats)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        persistent = self._zero.persistent_parameters
        if persistent:
            for parameter in persistent:
                parameter.partition()
            persistent[0].all_gather(persistent)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the next gather reads the partitions on a stream of its own
