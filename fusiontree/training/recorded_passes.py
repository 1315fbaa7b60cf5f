"""Forward and backward passes as CUDA graphs: the host launches a pass at once instead of some thousand kernels.

The passes of the first steps run eagerly, on the tensors that a recording reads, so that every kernel is compiled.
Then each pass is recorded once and replayed in every step. All passes share one pool of memory: they are replayed in
the order of their recording, and what outlives a pass (gradients) stays referenced.

The numbers of documents and their lengths change from batch to batch and are therefore data on the device: boundaries
are padded to a fixed count (:meth:`fusiontree.ops.documents.Documents.padded`). A change of shape (a curriculum stage,
more documents than fit, on any rank) drops all recordings.

Shape legend: B rows of a micro-batch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusiontree.data.batch import MicroBatch
from fusiontree.engines.base import Engine, ModelInputs, RecordableEngine, StepResult
from fusiontree.models.config import ModelConfig
from fusiontree.training.config import TrainingConfig
from fusiontree.training.losses import GlobalCounts, LossWeights
from fusiontree.training.passes import EagerPasses, ForwardPass, Passes, PassInputs
from fusiontree.utils.cuda_graph import GraphPool, on_recording_stream, record
from fusiontree.utils.errors import UserError

log = logging.getLogger(__name__)

_EAGER = 2
"""Eager steps before the recording: kernels compile in the first, and tune or load in the second."""
RECORDED_STEP = _EAGER + 1
"""First step that is recorded, counted from 1."""
_FEWEST_DOCUMENTS = 64


def build_passes(engine: Engine, model: ModelConfig, training: TrainingConfig, weights: LossWeights) -> Passes:
    """Return recorded passes where ``training.cuda_graphs`` asks for them, else eager ones.

    Raises:
        UserError: ``cuda_graphs`` is on and the passes of this run cannot be recorded.
    """
    eager = EagerPasses(engine, weights)
    if training.cuda_graphs == "off":
        return eager
    if engine.device.type != "cuda":
        problem = "the run is on the CPU"
    elif not isinstance(engine, RecordableEngine):
        problem = f"{type(engine).__name__} does not record its passes; parallel.engine ddp and fsdp2 do"
    elif model.srte_encoding == "learnable" and training.seq_len > model.max_position_embeddings:
        problem = "rows are longer than the learnable SRTE's table, and a replay cannot check documents against it"
    elif engine.teacher is not None and engine.teacher.is_sharded:
        problem = "the teacher's parameters are sharded, and their gathers are not recorded"
    else:
        return RecordedPasses(engine, weights, eager, required=training.cuda_graphs == "on")
    if training.cuda_graphs == "on":
        raise UserError(f"training.cuda_graphs is on, but {problem}; set it to auto")
    if engine.device.type == "cuda":
        log.info("cuda graphs: none; %s", problem)
    return eager


class RecordedPasses:
    """Records each kind of pass after two eager steps, and replays it from then on."""

    def __init__(
        self, engine: RecordableEngine, weights: LossWeights, eager: EagerPasses, *, required: bool = False
    ) -> None:
        """Record nothing yet.

        Args:
            engine: executes the passes.
            weights: coefficients of the loss terms.
            eager: the passes in use if recording fails.
            required: record the branches of a block side by side; a recording that fails is an error.
        """
        self.engine, self.weights, self.eager, self._required = engine, weights, eager, required
        self.problem: str | None = None
        """Why passes are eager from now on, or None."""
        self._most_documents = 0
        """Of this step's micro-batches, on any rank; 0 if every row of all of them is one document."""
        self._static: _StaticInputs | None = None
        self._passes: dict[tuple[int, bool], _Recording] = {}
        self._steps: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        """Optimizer step after each kind of last pass: its graph, and the gradient norm."""
        self._eager_steps = -1  # steps that began with inputs of these shapes, without the present step
        self._pool: GraphPool | None = None
        self._last: tuple[int, bool] = (0, True)

    def begin(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Agree with the other ranks on the number of documents, which decides whether passes are recorded anew.

        NCCL requires that a collective is recorded on all of its ranks or on none.
        """
        self._most_documents = self.engine.most_documents(micro_batches)

    def forward(self, inputs: PassInputs) -> ForwardPass:
        """Queue the forward pass of a micro-batch."""
        if self.problem is not None:
            return self.eager.forward(inputs)
        given = self.engine.inputs(inputs.micro, inputs.branch_scale_LB2, inputs.layer_metrics)
        static = self._load(given, inputs)
        key = _kind(inputs)
        if inputs.number == 0 and not self._passes:
            self._eager_steps += 1
        # Only from a step's first micro-batch on: the others add to the gradients of recorded passes.
        may_begin = inputs.number == 0 and self._eager_steps >= _EAGER and self.engine.checkpointing.settled
        may_record = bool(self._passes) or may_begin
        if key not in self._passes and may_record and not self._record(key, static, inputs):
            return self.eager.forward(inputs)
        if key in self._passes:
            if inputs.number == 0:
                self.engine.refresh()
            return self._passes[key].forward()
        with on_recording_stream(self.engine.device):
            return static.forward(self.engine, self.weights)

    def backward(self, inputs: PassInputs, done: ForwardPass) -> None:
        """Queue the backward pass that follows :meth:`forward`."""
        self._last = _kind(inputs)
        recording = self._passes.get(self._last)
        if recording is None:
            with on_recording_stream(self.engine.device) if self.problem is None else nullcontext():
                self.eager.backward(inputs, done)
            return
        self.engine.update_loss_scale()
        recording.backward(self.engine)

    def step(self, learning_rate: float) -> StepResult:
        """Queue the optimizer step; it is recorded with the gradients of recorded passes."""
        if self._last not in self._passes or not self.engine.records_step:
            with on_recording_stream(self.engine.device) if self.problem is None else nullcontext():
                return self.engine.step(learning_rate)
        self.engine.set_learning_rate(learning_rate)
        if self._last not in self._steps and not self._record_step():
            return self.engine.step(learning_rate)
        graph, norm = self._steps[self._last]
        graph.replay()
        return self.engine.end_step(norm)

    def _load(self, given: ModelInputs, inputs: PassInputs) -> _StaticInputs:
        """Copy the inputs to the tensors that recordings read; tensors of another shape replace these."""
        if self._static is None or not self._static.fits(given, self._most_documents):
            self._drop()
            self._static = _StaticInputs.like(given, inputs, self.engine.device, self._most_documents)
        self._static.load(given, inputs)
        return self._static

    def _drop(self) -> None:
        if self._passes:
            torch.cuda.synchronize(self.engine.device)
        self._passes.clear()
        self._steps.clear()
        self._eager_steps = -1
        self._static = self._pool = None

    def _record(self, key: tuple[int, bool], static: _StaticInputs, inputs: PassInputs) -> bool:
        """Record a kind of pass; return False if that fails, after which all passes are eager."""
        self._pool = self._pool or GraphPool()
        first = inputs.number == 0
        try:
            before = self.engine.pass_state()
        except NotImplementedError as error:  # of a plugin's placement
            self._give_up(error)
            return False
        self.engine.begin_recording(side_by_side=self._required)
        if first:
            self.engine.mark_stale()
            self.engine.refresh()
        problem = None
        try:
            self._passes[key] = _Recording.of(self.engine, self.weights, static, inputs, self._pool)
        except RuntimeError as error:
            problem = error
        finally:
            self.engine.set_pass_state(before)
            if first:
                self.engine.mark_stale()
        return self._is_recorded(problem)

    def _record_step(self) -> bool:
        """Record the optimizer step; return False if that fails, after which all passes and steps are eager."""
        before = self.engine.pass_state()
        self.engine.prepare_step()
        problem = None
        try:
            self._steps[self._last] = record(self.engine.run_step, self.engine.device, self._pool)
        except RuntimeError as error:
            problem = error
            self.engine.set_pass_state(before)
        return self._is_recorded(problem)

    def _is_recorded(self, problem: RuntimeError | None) -> bool:
        """Return whether the recording succeeded on all ranks; if not, passes are eager on all of them."""
        if not self.engine.on_any_rank(problem is not None):
            return True
        self._give_up(problem or RuntimeError("another rank cannot record"))
        return False

    def _give_up(self, error: RuntimeError) -> None:
        if self._required:
            raise UserError(f"training.cuda_graphs is on, but a step cannot be recorded: {error}; set it to auto")
        self.problem = f"{error}"
        log.warning("cuda graphs: none from here on, steps are launched kernel by kernel: %s", error)
        self._drop()


class _Recording(NamedTuple):
    """Both passes of one kind of micro-batch."""

    forward_graph: torch.cuda.CUDAGraph
    backward_graph: torch.cuda.CUDAGraph
    result: ForwardPass
    state: Any
    """Of the engine after the backward pass."""
    noted: list[Tensor]
    """Sum of the gradient at the embedding's output, if there is one."""

    @classmethod
    def of(
        cls, engine: RecordableEngine, weights: LossWeights, static: _StaticInputs, inputs: PassInputs, pool: GraphPool
    ) -> _Recording:
        """Record a forward pass and its backward pass; neither is executed.

        Raises:
            RuntimeError: an operation cannot be recorded, or memory does not suffice.
        """
        watch = engine.gradient_watch
        before = len(watch.noted)
        try:
            forward_graph, result = record(lambda: static.forward(engine, weights), engine.device, pool)
            total = result.total
            backward_graph, _ = record(lambda: engine.run_backward(total, last=inputs.last), engine.device, pool)
        finally:
            noted = watch.noted[before:]
            del watch.noted[before:]
        return cls(forward_graph, backward_graph, result._replace(total=total.detach()), engine.pass_state(), noted)

    def forward(self) -> ForwardPass:
        """Queue the forward pass; the results are copies, since the next replay overwrites those of this one."""
        self.forward_graph.replay()
        result = self.result
        return result._replace(
            lm=result.lm.clone(),
            z=result.z.clone(),
            divergence=result.divergence.clone(),
            row_terms=result.row_terms.clone(),
        )

    def backward(self, engine: RecordableEngine) -> None:
        """Queue the backward pass, and set the engine's state on the host as the recorded pass left it."""
        self.backward_graph.replay()
        engine.set_pass_state(self.state)
        engine.gradient_watch.noted += [total.clone() for total in self.noted]


class _StaticInputs(NamedTuple):
    """Tensors on the device that recorded passes read."""

    model: ModelInputs
    row_weight_B: Tensor
    counts: GlobalCounts
    documents: int | None
    """Number of documents to which boundaries are padded; None if the rows have the fixed boundaries of this batch."""

    @classmethod
    def like(cls, given: ModelInputs, inputs: PassInputs, device: torch.device, most_documents: int) -> _StaticInputs:
        """Return tensors for inputs of these shapes, with room for ``most_documents`` documents and more."""
        count = max(_FEWEST_DOCUMENTS, 2 * most_documents) if most_documents else None
        counts = GlobalCounts(torch.zeros((), device=device), torch.zeros((), device=device))
        return cls(given.padded(count).to(device), inputs.micro.row_weight_B.to(device), counts, count)

    def fits(self, given: ModelInputs, most_documents: int) -> bool:
        """Return whether the inputs have the shapes of these tensors; all ranks get the same answer."""
        if self.model.layer_metrics != given.layer_metrics:
            return False
        if self.documents is None and self.model.document_kinds != given.document_kinds:
            return False
        if most_documents > (self.documents or 0):
            return False
        shapes = [[tensor.shape for tensor in one.tensors()] for one in (self.model, given.padded(self.documents))]
        return shapes[0] == shapes[1]

    def load(self, given: ModelInputs, inputs: PassInputs) -> None:
        """Copy the inputs; the host does not wait for the copies."""
        pairs = [*zip(self.model.tensors(), given.padded(self.documents).tensors(), strict=True)]
        for mine, other in [*pairs, (self.row_weight_B, inputs.micro.row_weight_B)]:
            mine.copy_(other.pin_memory() if mine.is_cuda else other, non_blocking=True)
        for count, value in zip(vars(self.counts).values(), vars(inputs.counts).values(), strict=True):
            count.copy_(value)

    def forward(self, engine: RecordableEngine, weights: LossWeights) -> ForwardPass:
        """Queue the forward pass."""
        return ForwardPass.of(engine.run(self.model.with_new_boundaries()), self.row_weight_B, weights, self.counts)


def _kind(inputs: PassInputs) -> tuple[int, bool]:
    """Return what decides the work of a pass besides shapes: the first two micro-batches create the sums."""
    return min(inputs.number, 2), inputs.last
