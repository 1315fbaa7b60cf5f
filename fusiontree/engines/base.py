"""What training asks of an engine. Training never asks which engine it has.

Contract: the loss given to ``backward`` is this rank's share (local token sum over the global count of valid tokens);
gradients are summed, not averaged, over the ranks; reduction and accumulation are fp32; clipping uses the true
global norm; a step whose gradient is not finite changes nothing and says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from fusiontree.data.batch import MicroBatch
from fusiontree.models.model import ModelOutput
from fusiontree.parallel.activation_checkpointing import Checkpointing
from fusiontree.parallel.batch_sharding import ModelInputs, TokenScores

if TYPE_CHECKING:
    from fusiontree.engines.teacher import Teacher

__all__ = ["Engine", "ModelInputs", "ModelOutput", "RecordableEngine", "StepResult", "TokenScores"]


class GradientWatch:
    """Watches the gradient that arrives at the embedding's output, once per micro-batch.

    After the reduction a NaN of one rank is a NaN of all. A rank's own backward pass ends at the embedding's output, so
    nearly every NaN of the pass is in its gradient. Only :meth:`finite` waits for the device.
    """

    def __init__(self, embedding: nn.Module) -> None:
        """Watch ``embedding``, the module that turns token ids into vectors."""
        self.noted: list[Tensor] = []
        """Sum of each micro-batch's gradient in this step."""
        self._last: list[Tensor] = []
        embedding.register_forward_hook(self._forward)

    def _forward(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._note)

    def _note(self, gradient: Tensor) -> None:
        # A sum is not finite when an element is not, and needs no memory of the gradient's size.
        self.noted.append(gradient.sum(dtype=torch.float32))

    def end_step(self) -> None:
        """Note that the step's last backward pass is over."""
        self._last, self.noted = self.noted, []

    def finite(self) -> list[bool]:
        """Return for each micro-batch of the last step whether its gradient was finite on this rank."""
        return [bool(total.isfinite()) for total in self._last]


class StepResult:
    """What became of one optimizer step, on which the device may still be at work: looking at it waits for that."""

    def __init__(self, read_norm: Callable[[], float], unless_finite: str) -> None:
        """Read nothing yet.

        Args:
            read_norm: waits for the global norm before clipping, of the unscaled gradient.
            unless_finite: why the step changed nothing, if the norm is not finite.
        """
        self._read_norm, self._unless_finite = read_norm, unless_finite

    @cached_property
    def grad_norm(self) -> float:
        """Global norm before clipping, of the unscaled gradient."""
        return self._read_norm()

    def wait(self) -> None:
        """Let the device finish the step."""
        assert self.grad_norm is not None

    @property
    def skipped(self) -> str | None:
        """Why the step changed nothing, or None."""
        return None if math.isfinite(self.grad_norm) else self._unless_finite


class Engine(Protocol):
    """Executes a training step on this process's part of the model."""

    device: torch.device
    checkpointing: Checkpointing
    """How the blocks recompute activations; ``build_engine`` sets it."""
    teacher: Teacher | None
    """Model whose distribution the loss compares; set before the first step, None without a teacher."""

    @property
    def dp_rank(self) -> int:
        """Which part of every global batch this rank reads."""
        ...

    @property
    def dp_size(self) -> int:
        """Number of parts of a global batch."""
        ...

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        ...

    @property
    def rank(self) -> int:
        """This process among all."""
        ...

    def gather_text(self, text: str) -> list[str]:
        """Return every rank's text, in order of rank; all ranks call this together."""
        ...

    @property
    def world_size(self) -> int:
        """Number of processes."""
        ...

    def forward(
        self, micro: MicroBatch, branch_scale_LB2: Tensor | None = None, layer_metrics: tuple[str, ...] = ()
    ) -> ModelOutput:
        """Run the model on a micro-batch.

        Args:
            micro: full rows, the same on all ranks that share them (cp x tp).
            branch_scale_LB2: factors of each layer's and row's branch outputs; None drops no branch.
            layer_metrics: names of layer metrics whose sums to return.

        Returns:
            The model's output. Token sums cover this rank's tokens, layer sums full rows.
        """
        ...

    def sum_over_rows(self, values: Tensor) -> Tensor:
        """Sum ``values`` over the ranks that read different rows, in place: for what is counted on whole rows."""
        ...

    def sum_over_tokens(self, values: Tensor) -> Tensor:
        """Sum ``values`` over the ranks that hold different tokens, in place: for what is counted on pieces."""
        ...

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum ``values`` over all ranks, in place: for what all must agree on, and what each of them counts."""
        ...

    def evaluate(self, micro: MicroBatch) -> Tensor:
        """Return the summed cross entropy of this rank's tokens, without gradients and without branch dropout."""
        ...

    def score(self, micro: MicroBatch, never_M: Tensor) -> TokenScores:
        """Return the scores of the labels of full rows, ``[B, S]`` on the CPU, without gradients and branch dropout.

        All ranks call this together, with micro-batches of equal shape; ranks that share rows (cp x tp) get the same.

        Args:
            micro: full rows of any length, the same on all ranks that share them.
            never_M: int64 ids, on the CPU, that are not taken for the most likely token.
        """
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``; ``last`` marks the final micro batch of the step."""
        ...

    def step(self, learning_rate: float) -> StepResult:
        """Reduce, clip and apply the gradient, then clear it; all of it may be queued only when this returns."""
        ...

    def discard(self) -> None:
        """End the step without applying its gradient: clear it, change nothing else. All ranks do so together."""
        ...

    def finite_passes(self) -> list[bool]:
        """Return for each micro batch of the last step whether this rank's own gradient was finite.

        Looked at before any reduction, after which a NaN of one rank is a NaN of all.
        """
        ...

    def parameter_pieces(self) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
        """Yield the parts of parameters that this rank holds between steps.

        Each is the parameter's name, the part's offset in the whole parameter, and its live values. Parts with the
        same name, offset and shape on several ranks are meant to be equal: that is how copies are found.
        """
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """Live tensors of the training state under layout-free names: ``model.NAME``, ``optimizer.STATE.NAME``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Small JSON-able state: the optimizer's step count, the loss scale."""
        ...

    def load_state_dict(self, values: dict[str, Any]) -> None:
        """Take back :meth:`state_dict`; the tensors were filled in place before."""
        ...

    def barrier(self) -> None:
        """Wait until every process is here."""
        ...


@runtime_checkable
class RecordableEngine(Engine, Protocol):
    """An engine whose forward and backward passes can be recorded as CUDA graphs.

    ``run``, ``run_backward`` and ``run_step`` only queue work on the device: the same work for inputs of the same
    shapes, at the same addresses. What the passes leave on the host is their pass state.
    """

    def inputs(
        self, micro: MicroBatch, branch_scale_LB2: Tensor | None = None, layer_metrics: tuple[str, ...] = ()
    ) -> ModelInputs:
        """Return this rank's chunk of a micro-batch, on the CPU."""
        ...

    def most_documents(self, micro_batches: Sequence[MicroBatch]) -> int:
        """Return the greatest number of documents of a micro-batch on any rank, 0 if every row is one document.

        All ranks call this together; no device is waited for.
        """
        ...

    def on_any_rank(self, happened: bool) -> bool:
        """Return whether something happened on any rank; all ranks call this together."""
        ...

    def run(self, inputs: ModelInputs) -> ModelOutput:
        """Do :meth:`Engine.forward` on inputs on the device."""
        ...

    def update_loss_scale(self) -> None:
        """Adapt the loss scale before a backward pass."""
        ...

    def run_backward(self, loss: Tensor, *, last: bool) -> None:
        """Do :meth:`Engine.backward` at the loss scale of :meth:`update_loss_scale`."""
        ...

    def mark_stale(self) -> None:
        """Let the next pass copy or gather the parameters anew."""
        ...

    def refresh(self) -> None:
        """Let recorded passes find current parameters; call before the first pass of a step is recorded or replayed."""
        ...

    def begin_recording(self, *, side_by_side: bool) -> None:
        """Note that passes are recorded from now on.

        Args:
            side_by_side: let the device execute the branches of a block at the same time.
        """
        ...

    def pass_state(self) -> Any:
        """Return what the passes of this step left on the host: references to gradients, and how far the step is."""
        ...

    def set_pass_state(self, state: Any) -> None:
        """Put the host where it was at :meth:`pass_state`: the device replayed the passes, or did not execute them."""
        ...

    records_step: bool
    """Whether :meth:`run_step` only queues work. The host waits in it where the optimizer skips no step by itself."""

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate of the next steps."""
        ...

    def prepare_step(self) -> None:
        """Bring to the device what a recording of :meth:`run_step` with the gradients of this step needs."""
        ...

    def run_step(self) -> Tensor:
        """Clip and apply the gradient; return its norm (scalar, unscaled, before clipping)."""
        ...

    def end_step(self, norm: Tensor) -> StepResult:
        """Clear the gradient after :meth:`run_step`."""
        ...

    @property
    def gradient_watch(self) -> GradientWatch:
        """Holds the sum of each micro-batch's gradient."""
        ...
