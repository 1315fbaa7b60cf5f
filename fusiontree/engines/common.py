"""The parts of the ``Engine`` protocol that are the same under every engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fusiontree.engines.base import StepInputs, StepOutputs, StepResult
from fusiontree.engines.nonfinite_watch import GradientWatch
from fusiontree.optim.config import OPTIMIZERS
from fusiontree.parallel.batch_sharding import shard_inputs, sum_over_row
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.shard_groups import DistributedModel
from fusiontree.training.config import TrainingConfig

PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16, whose small gradients would otherwise round to zero.

    Doubles after a number of applied steps, halves after an overflow (Micikevicius et al. 2018, 3.2).
    """

    scale: float = 2.0**16
    good_steps: int = 0

    GROWTH_INTERVAL = 1000
    MINIMUM = 1.0

    def update(self, overflow: bool) -> None:
        """Adapt after a step; ``overflow`` tells that its gradient was not finite."""
        if overflow:
            self.scale = max(self.scale / 2, self.MINIMUM)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.GROWTH_INTERVAL:
            self.scale *= 2
            self.good_steps = 0


class CommonEngine:
    """This process among all, the call of the model, the loss scale, and the small values of the state."""

    def __init__(self, model: DistributedModel, layout: Layout, training: TrainingConfig) -> None:
        """Take the model, on the meta device, of this process of ``layout``."""
        self.layout = layout
        self.device: torch.device = layout.device
        self.module: Any = model.module
        self.specs = model.specs
        self.optimizer_spec = OPTIMIZERS.get(training.optimizer.name)
        self.loss_scale = LossScale() if training.precision == "fp16" else None
        self._unread: StepResult | None = None  # of the last step, which the loss scale has not yet adapted to

    def _watch_gradients(self) -> None:
        """Watch this rank's gradient per micro-batch; call when the modules have their final forward."""
        self._watch = GradientWatch(self.module.embed)

    def _step_counts(self) -> list[Tensor]:
        """Return the optimizer's ``step`` of each tensor."""
        raise NotImplementedError

    def _call(self, module: Any, inputs: StepInputs) -> StepOutputs:
        """Send this rank's chunk of ``inputs`` to its device and call the model on it."""
        output = module(**shard_inputs(*inputs, layout=self.layout))
        sums_LB, count_B = sum_over_row(output.layer_sums, self.layout)
        return StepOutputs(
            loss_sum=output.loss_sum,
            z_sum=output.z_sum,
            sums_LB=sums_LB,
            count_B=count_B,
            row_weight_B=inputs.row_weight_B.to(self.device, non_blocking=True),
        )

    def _result(self, read_norm: Callable[[], float]) -> StepResult:
        """Return the result of a step, given the function that waits for its gradient norm."""
        scale = self.loss_scale
        why = f"overflow at loss scale {scale.scale}" if scale else "non-finite gradient norm"
        self._unread = StepResult(read_norm, unless_finite=why)
        return self._unread

    def _adapted_scale(self) -> float | None:
        """Return the loss scale after the last step, for which it waits; None without loss scaling."""
        if self.loss_scale is None:
            return None
        if self._unread is not None:
            self.loss_scale.update(overflow=self._unread.skipped is not None)
            self._unread = None
        return self.loss_scale.scale

    def finite_passes(self) -> list[bool]:
        """Return for each micro-batch of the last step whether this rank's gradient was finite."""
        return self._watch.finite()

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's step count and the loss scale."""
        values: dict[str, Any] = {"optimizer_step": int(self._step_counts()[0])}
        if self.loss_scale:
            self._adapted_scale()
            values["loss_scale"] = asdict(self.loss_scale)
        return values

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`."""
        for step in self._step_counts():
            step.fill_(values["optimizer_step"])
        self._unread = None
        if self.loss_scale and "loss_scale" in values:
            self.loss_scale = LossScale(**values["loss_scale"])

    @property
    def dp_rank(self) -> int:
        """Index of this rank's part of every global batch."""
        return self.layout.dp_rank

    @property
    def dp_size(self) -> int:
        """Number of parts of a global batch."""
        return self.layout.dp_size

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return self.layout.place.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.layout.place.world_size

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.layout.is_main

    def gather_text(self, text: str) -> list[str]:
        """Return every rank's text, in rank order."""
        return self.layout.gather_text(text)

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.layout.barrier()

    def sum_over_rows(self, values: Tensor) -> Tensor:
        """Sum ``values`` over the ranks that read different sequences."""
        return self.layout.sum_over_rows(values)

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """Sum ``values`` over the ranks that hold different tokens."""
        return self.layout.sum_over_tokens(values)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum ``values`` over all ranks."""
        return self.layout.sum_over_ranks(values)
