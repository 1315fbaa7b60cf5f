"""The parts of the ``Engine`` protocol that are the same under every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusiontree.data.batch import MicroBatch
from fusiontree.engines.base import GradientWatch, StepResult
from fusiontree.models.model import FusionTreeModel, ModelOutput
from fusiontree.optim.config import OPTIMIZERS
from fusiontree.parallel.activation_checkpointing import Checkpointing
from fusiontree.parallel.batch_sharding import (
    ModelInputs,
    TokenScores,
    fill_up_rows,
    gather_scores,
    shard_inputs,
    sum_over_row,
)
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.shard_groups import DistributedModel
from fusiontree.training.config import TrainingConfig

if TYPE_CHECKING:
    from fusiontree.engines.teacher import Teacher

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

    checkpointing: Checkpointing
    """Set by ``build_engine``."""
    teacher: Teacher | None = None
    """Model whose distribution the loss compares; set before the first step."""

    def __init__(self, model: DistributedModel, layout: Layout, training: TrainingConfig) -> None:
        """Take the model, on the meta device, of this process of ``layout``."""
        self.layout = layout
        self.device: torch.device = layout.device
        self.rank, self.world_size = layout.place.rank, layout.place.world_size
        self.dp_rank, self.dp_size, self.is_main = layout.dp_rank, layout.dp_size, layout.is_main
        self.gather_text, self.barrier = layout.gather_text, layout.barrier
        self.sum_over_rows, self.sum_over_tokens = layout.sum_over_rows, layout.sum_over_tokens
        self.sum_over_ranks = layout.sum_over_ranks
        self.module: FusionTreeModel = model.module
        self.specs = model.specs
        self.optimizer_spec = OPTIMIZERS.get(training.optimizer.name)
        self.loss_scale = LossScale() if training.precision == "fp16" else None
        self._unread: StepResult | None = None  # of the last step, which the loss scale has not yet adapted to

    def _watch_nonfinite(self) -> None:
        """Watch this rank's gradient per micro-batch; call when the modules have their final forward."""
        self._watch = GradientWatch(self.module.embed)

    def _step_counts(self) -> list[Tensor]:
        """Return the optimizer's ``step`` of each tensor."""
        raise NotImplementedError

    def inputs(
        self, micro: MicroBatch, branch_scale_LB2: Tensor | None = None, layer_metrics: tuple[str, ...] = ()
    ) -> ModelInputs:
        """Return this rank's chunk of a micro-batch, on the CPU."""
        return shard_inputs(micro, branch_scale_LB2, layer_metrics, self.layout)

    def _call(
        self,
        model: Callable[..., ModelOutput],
        micro: MicroBatch,
        branch_scale_LB2: Tensor | None = None,
        layer_metrics: tuple[str, ...] = (),
    ) -> ModelOutput:
        """Call ``model``, which wraps :attr:`module`, on this rank's chunk of a micro-batch."""
        return self._call_on(model, self.inputs(micro, branch_scale_LB2, layer_metrics).to(self.device))

    def _call_on(self, model: Callable[..., ModelOutput], inputs: ModelInputs, *, taught: bool = False) -> ModelOutput:
        """Call ``model`` on inputs on the device; ``taught``: with the output of the teacher, if there is one."""
        more = {"teacher": self.teacher(inputs)} if taught and self.teacher is not None else {}
        output = model(**inputs._asdict(), **more)
        return output._replace(layer_sums=sum_over_row(output.layer_sums, self.layout))

    @contextmanager
    def evaluating(self) -> Iterator[Callable[..., ModelOutput]]:
        """Return the model to call once, in evaluation mode, for a forward pass that no backward pass follows."""
        self.module.eval()
        yield self.module
        self.module.train()

    @torch.no_grad()
    def evaluate(self, micro: MicroBatch) -> Tensor:
        """Return the summed cross entropy of this rank's tokens."""
        with self.evaluating() as model:
            loss_sum = self._call(model, micro).loss_sum
        assert loss_sum is not None, "a micro-batch has labels"
        return loss_sum

    @torch.no_grad()
    def score(self, micro: MicroBatch, never_M: Tensor) -> TokenScores:
        """Return the scores of the labels of full rows, on the CPU."""
        layout, length = self.layout, micro.input_ids_BS.shape[1]
        inputs = self.inputs(fill_up_rows(micro, layout.cp_size * layout.tp_size)).to(self.device)
        with self.evaluating() as model:
            scores = model(**inputs._asdict(), never_M=never_M.to(self.device)).token_scores
        assert scores is not None, "a micro-batch has labels"
        return gather_scores(scores, length, layout)

    def _result(self, read_norm: Callable[[], float]) -> StepResult:
        """Return the result of a step, given the function that waits for its gradient norm."""
        scale = self.loss_scale
        why = f"overflow at loss scale {scale.scale}" if scale else "non-finite gradient norm"
        self._unread = StepResult(read_norm, unless_finite=why)
        return self._unread

    def _update_loss_scale(self) -> float | None:
        """Wait for the last step, adapt the loss scale to it and return the scale; None without loss scaling."""
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
            self._update_loss_scale()
            values["loss_scale"] = asdict(self.loss_scale)
        return values

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`."""
        for step in self._step_counts():
            step.fill_(values["optimizer_step"])
        self._unread = None
        if self.loss_scale and "loss_scale" in values:
            self.loss_scale = LossScale(**values["loss_scale"])
