"""The forward and backward pass of one micro-batch, eager: the reference of :mod:`recorded_passes`.

Shape legend: B rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from fusiontree.data.batch import MicroBatch
from fusiontree.engines.base import Engine, ModelOutput, StepResult
from fusiontree.training.losses import GlobalCounts, LossWeights, loss_terms
from fusiontree.training.step_sums import RowSums
from fusiontree.utils.device import send


class ForwardPass(NamedTuple):
    """Results of a forward pass, on the device."""

    total: Tensor
    """The loss, with its gradient."""
    lm: Tensor
    """Cross entropy, detached."""
    z: Tensor
    """Squared log-partition, detached."""
    divergence: Tensor
    """From the teacher, detached; 0 without a teacher."""
    row_terms: Tensor
    """Packed row sums (:meth:`fusiontree.training.step_sums.RowSums.pack`)."""
    sum_names: tuple[str, ...]
    """Names of the layer sums in ``row_terms``."""

    @classmethod
    def of(cls, output: ModelOutput, row_weight_B: Tensor, weights: LossWeights, counts: GlobalCounts) -> ForwardPass:
        """Return the results of a model's output; ``row_weight_B`` and ``counts`` as in :func:`loss_terms`."""
        terms = loss_terms(output, row_weight_B, weights, counts)
        row_terms = RowSums.pack(terms.load_balance, terms.entropy, *output.layer_sums, row_weight_B)
        names = tuple(output.layer_sums.sums_LB)
        return cls(terms.total, terms.lm.detach(), terms.z.detach(), terms.divergence.detach(), row_terms, names)


class PassInputs(NamedTuple):
    """What a forward pass needs."""

    micro: MicroBatch
    branch_scale_LB2: Tensor | None
    """Factors of each layer's and row's branch outputs, on the CPU; None drops no branch."""
    layer_metrics: tuple[str, ...]
    """Names of the layer metrics to compute."""
    counts: GlobalCounts
    """Global denominators, on the device."""
    number: int
    """Number of the micro-batch in its step, from 0."""
    last: bool
    """Whether it is the final one of the step."""


class Passes(Protocol):
    """Queues a step: for each micro-batch its forward pass, then its backward pass; then the optimizer step."""

    def begin(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Begin a step of these micro-batches; all ranks call this together."""
        ...

    def forward(self, inputs: PassInputs) -> ForwardPass:
        """Queue the forward pass of a micro-batch."""
        ...

    def backward(self, inputs: PassInputs, done: ForwardPass) -> None:
        """Queue the backward pass that follows :meth:`forward`."""
        ...

    def step(self, learning_rate: float) -> StepResult:
        """Queue the optimizer step (:meth:`fusiontree.engines.base.Engine.step`)."""
        ...


class EagerPasses:
    """Launches every kernel by itself."""

    def __init__(self, engine: Engine, weights: LossWeights) -> None:
        """Connect the engine and the coefficients of the loss terms."""
        self.engine, self.weights = engine, weights

    def begin(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Do nothing."""

    def forward(self, inputs: PassInputs) -> ForwardPass:
        """Queue the forward pass of a micro-batch."""
        micro = inputs.micro
        output = self.engine.forward(micro, inputs.branch_scale_LB2, inputs.layer_metrics)
        row_weight_B = send(micro.row_weight_B, self.engine.device, non_blocking=True)
        return ForwardPass.of(output, row_weight_B, self.weights, inputs.counts)

    def backward(self, inputs: PassInputs, done: ForwardPass) -> None:
        """Queue the backward pass that follows :meth:`forward`."""
        self.engine.backward(done.total, last=inputs.last)

    def step(self, learning_rate: float) -> StepResult:
        """Queue the optimizer step."""
        return self.engine.step(learning_rate)
