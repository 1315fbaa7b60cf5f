"""Recorded passes without a GPU: what a recording reads, and what is recorded when. tests/gpu compares the values."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fusiontree.engines.build import build_engine
from fusiontree.engines.torch_engine import TorchEngine
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.layout import Layout
from fusiontree.training import recorded_passes
from fusiontree.training.config import TrainingConfig
from fusiontree.training.losses import GlobalCounts, LossWeights
from fusiontree.training.passes import EagerPasses, ForwardPass, PassInputs
from fusiontree.training.recorded_passes import RecordedPasses, build_passes
from fusiontree.utils.errors import UserError
from tests.engines.batches import micro_batch
from tests.helpers import tiny_config
from tests.models.recording import pretend_gpu

WEIGHTS = LossWeights(load_balance=0.1, entropy=0.05, z_loss=0.01, gate_target=0.5, gate_margin=0.0)
TRAINING = {"seq_len": 16, "max_steps": 3, "global_batch_size": 2, "precision": "fp32"}
Starts = list[list[int]]


def positions(starts: Starts, length: int = 16) -> Tensor:
    """Positions of rows whose documents start at the given tokens."""
    rows = []
    for row in starts:
        bounds = [*row, length]
        rows.append(torch.cat([torch.arange(after - start) for start, after in pairwise(bounds)]))
    return torch.stack(rows)


def pass_inputs(starts: Starts, seed: int, number: int = 0, last: bool = True, length: int = 16) -> PassInputs:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (len(starts), length), generator=generator)
    scale = torch.rand(2, len(starts), 2, generator=generator)
    counts = GlobalCounts(torch.tensor(20.0 + seed), torch.tensor(2.0))
    micro = micro_batch(ids, positions(starts, length))
    weight_B = torch.ones(len(starts))
    weight_B[0] = float(seed % 2)  # filler rows come and go
    return PassInputs(replace(micro, row_weight_B=weight_B), scale, (), counts, number, last)


@pytest.fixture
def engine() -> Any:
    with Layout("cpu") as layout:
        training = TrainingConfig.model_validate(TRAINING)
        engine = build_engine(tiny_config(), ParallelConfig(engine="ddp"), training, layout)
        assert isinstance(engine, TorchEngine)
        yield engine


@pytest.fixture
def recorded(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> RecordedPasses:
    monkeypatch.setattr(recorded_passes, "on_recording_stream", lambda device: nullcontext())
    return RecordedPasses(engine, WEIGHTS, EagerPasses(engine, WEIGHTS))


STEPS: list[list[Starts]] = [
    [[[0, 3, 9], [0]], [[0], [0]]],
    [[[0], [0]], [[0, 1, 2, 3, 4], [0, 15]]],
    [[list(range(16)), list(range(16))], [[0, 7], [0, 2]]],  # more documents than were padded for
    [[[0, 8], [0]], [[0], [0, 5]]],
]


def test_the_tensors_of_a_recording_give_the_values_of_the_batch(
    engine: TorchEngine, recorded: RecordedPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded_passes, "_FEWEST_DOCUMENTS", 8)
    monkeypatch.setattr(recorded_passes, "_EAGER", 100)
    values: list[list[Any]] = []
    gradients: list[list[Tensor]] = []
    for passes in (EagerPasses(engine, WEIGHTS), recorded):
        values.append([])
        gradients.append([])
        for step in STEPS:
            given = [
                pass_inputs(starts, seed=number, number=number, last=number + 1 == len(step))
                for number, starts in enumerate(step)
            ]
            passes.begin([inputs.micro for inputs in given])
            for inputs in given:
                done = passes.forward(inputs)
                passes.backward(inputs, done)
                values[-1] += [float(done.lm), float(done.z), done.row_terms.tolist(), done.sum_names]
            gradients[-1] += [g.clone() for placement in engine.placements for g in placement.gradients()]
            engine.discard()
    assert values[0] == values[1]
    assert all(map(torch.equal, *gradients))


def test_boundaries_are_new_tensors_of_the_same_memory(engine: TorchEngine) -> None:
    """Masks are kept by the identity of a boundary's tensor, also where a later batch was copied to its memory."""
    given = pass_inputs([[0, 3], [0]], seed=0)
    inputs = engine.inputs(given.micro)
    fresh = inputs.with_new_boundaries()
    for one, other in zip(inputs.tensors()[2:], fresh.tensors()[2:], strict=True):
        assert one is not other and one.data_ptr() == other.data_ptr()


def train(engine: TorchEngine, passes: EagerPasses | RecordedPasses) -> tuple[list[Any], list[Tensor]]:
    """Train on changing documents in four micro-batches per step; return all values and the gradients of each step."""
    kinds: list[Starts] = [[[0, 3, 9], [0]], [[0], [0, 4]], [[0, 1, 2], [0, 8]], [[0, 5], [0]]]
    values: list[Any] = []
    gradients: list[Tensor] = []
    for step in range(6):
        given = [
            pass_inputs(kinds[(step + number) % 4], seed=10 * step + number, number=number, last=number == 3)
            for number in range(4)
        ]
        passes.begin([inputs.micro for inputs in given])
        for inputs in given:
            done = passes.forward(inputs)
            passes.backward(inputs, done)
            values += [float(done.lm), float(done.z), done.row_terms.tolist()]
        gradients += [g.clone() for placement in engine.placements for g in placement.gradients()]
        values += [passes.step(1e-2).grad_norm, engine.finite_passes(), engine.state_dict()]
        if step == 1:  # the last eager step: an evaluation leaves casts of the weights behind
            values.append(float(engine.evaluate(pass_inputs(kinds[0], seed=99).micro)))
    return values, gradients + [tensor.clone() for tensor in engine.state_tensors().values()]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"precision": "bf16"}, marks=pytest.mark.slow),
        {"precision": "fp16"},
        {"precision": "bf16", "matmul_precision": "fp8"},
        pytest.param({"activation_checkpointing": "selective"}, marks=pytest.mark.slow),
        {"activation_checkpointing": "full", "precision": "bf16"},
    ],
)
def test_replayed_passes_have_the_values_of_eager_passes(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, on graphs that note each operation and do it again on the same tensors."""
    found = []
    for kind in (EagerPasses, RecordedPasses):
        with Layout("cpu") as layout:
            training = TrainingConfig.model_validate(TRAINING | settings)
            engine = build_engine(tiny_config(), ParallelConfig(engine="ddp"), training, layout)
            assert isinstance(engine, TorchEngine)
            eager = EagerPasses(engine, WEIGHTS)
            if kind is RecordedPasses:
                graphs = pretend_gpu(monkeypatch, reads=True)
                found.append(train(engine, RecordedPasses(engine, WEIGHTS, eager, required=True)))
                assert len(graphs) == 2 * 4
            else:
                found.append(train(engine, eager))
    assert found[0][0] == found[1][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))


class Recorder:
    """Stands in for the recording of a pass: notes the kinds, and runs the pass eagerly."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: TorchEngine) -> None:
        self.kinds: list[tuple[int, bool]] = []
        self.fails = False
        self.steps = 0

        def of(engine: Any, weights: Any, static: Any, inputs: PassInputs, pool: Any) -> Any:
            if self.fails:
                raise RuntimeError("operation not permitted")
            self.kinds.append((inputs.number, inputs.last))
            done: list[ForwardPass] = []

            def forward() -> ForwardPass:
                done[:] = [static.forward(engine, weights)]
                return done[0]

            return SimpleNamespace(
                forward=forward, backward=lambda engine: engine.run_backward(done[0].total, last=inputs.last)
            )

        monkeypatch.setattr(recorded_passes, "_Recording", SimpleNamespace(of=of))
        monkeypatch.setattr(recorded_passes, "GraphPool", object)
        monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)


@pytest.fixture
def recorder(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch, engine)


def run_step(passes: RecordedPasses, micro_batches: int, starts: Starts | None = None, length: int = 16) -> None:
    rows = starts or [[0, 3], [0]]
    given = [
        pass_inputs(rows, seed=number, number=number, last=number + 1 == micro_batches, length=length)
        for number in range(micro_batches)
    ]
    passes.begin([inputs.micro for inputs in given])
    for inputs in given:
        passes.backward(inputs, passes.forward(inputs))
    passes.step(1e-3)


def test_the_passes_of_the_third_step_are_recorded_in_their_order(recorded: RecordedPasses, recorder: Recorder) -> None:
    for _ in range(2):
        run_step(recorded, 5)
    assert recorder.kinds == []
    run_step(recorded, 5)
    assert recorder.kinds == [(0, False), (1, False), (2, False), (4, True)]
    run_step(recorded, 5)
    run_step(recorded, 5, [[0], [0]])  # whole rows are rows of documents, too
    assert len(recorder.kinds) == 4


@pytest.mark.parametrize("change", [{"length": 8}, {"starts": [list(range(0, 16)), list(range(0, 16))]}])
def test_another_shape_is_recorded_anew(
    recorded: RecordedPasses, recorder: Recorder, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded_passes, "_FEWEST_DOCUMENTS", 8)
    for _ in range(4):
        run_step(recorded, 1)
    assert recorder.kinds == [(0, True)]
    for _ in range(2):
        run_step(recorded, 1, **change)
    assert recorder.kinds == [(0, True)]
    run_step(recorded, 1, **change)
    assert recorder.kinds == [(0, True)] * 2


def test_nothing_is_recorded_before_the_choice_of_recomputation(
    engine: TorchEngine, recorded: RecordedPasses, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(engine.checkpointing), "settled", False)
    for _ in range(4):
        run_step(recorded, 1)
    assert recorder.kinds == []
    first = pass_inputs([[0, 3], [0]], seed=0, last=False)
    recorded.begin([first.micro])
    recorded.backward(first, recorded.forward(first))
    monkeypatch.setattr(type(engine.checkpointing), "settled", True)  # in the middle of a step
    second = pass_inputs([[0, 3], [0]], seed=1, number=1)
    recorded.backward(second, recorded.forward(second))
    recorded.step(1e-3)
    assert recorder.kinds == []
    run_step(recorded, 1)
    assert recorder.kinds == [(0, True)]


def test_chunks_after_another_number_of_tokens_do_not_fit(engine: TorchEngine) -> None:
    """Shapes are equal: chunks of one document, which begins 16 or 32 tokens before them."""
    given = pass_inputs([[0], [0]], seed=0)

    def after(tokens: int) -> Any:
        return engine.inputs(replace(given.micro, positions_BS=given.micro.positions_BS + tokens))

    static = recorded_passes._StaticInputs.like(after(16), given, torch.device("cpu"), 0)
    assert static.fits(after(16), 0) and not static.fits(after(32), 0)


def test_documents_of_another_rank_decide_too(
    recorded: RecordedPasses, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL wants all ranks to record a collective, or none; this rank's own documents would fit."""
    monkeypatch.setattr(recorded_passes, "_FEWEST_DOCUMENTS", 8)
    for _ in range(3):
        run_step(recorded, 1)
    assert recorder.kinds == [(0, True)]
    monkeypatch.setattr(Layout, "greatest", lambda layout, value: max(value, 9))
    for _ in range(3):
        run_step(recorded, 1)
    assert recorder.kinds == [(0, True)] * 2


def test_rows_of_one_document_here_and_of_several_on_another_rank_are_recorded_as_several(
    recorded: RecordedPasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Layout, "greatest", lambda layout, value: max(value, 9))
    run_step(recorded, 1, [[0], [0]])
    assert recorded._static is not None and recorded._static.documents == 64


def test_a_recording_that_fails_on_another_rank_leaves_eager_passes_here_too(
    recorded: RecordedPasses, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Layout, "greatest", lambda layout, value: max(value, 1))
    for _ in range(3):
        run_step(recorded, 1)
    assert recorded.problem == "another rank cannot record" and not recorded._passes


def test_a_recording_that_fails_is_said_once_and_leaves_eager_passes(
    recorded: RecordedPasses, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.fails = True
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            run_step(recorded, 2)
    assert [record.message for record in caplog.records if "cuda graphs" in record.message] == [
        "cuda graphs: none from here on, steps are launched kernel by kernel: operation not permitted"
    ]


def test_a_recording_that_is_required_and_fails_is_an_error(recorded: RecordedPasses, recorder: Recorder) -> None:
    recorder.fails = recorded._required = True
    run_step(recorded, 1)
    run_step(recorded, 1)
    with pytest.raises(UserError, match="cuda_graphs is on, but a step cannot be recorded: operation not permitted"):
        run_step(recorded, 1)


class OnGPU:
    """An engine by its look."""

    device, world_size = torch.device("cuda"), 1

    def __init__(self, engine: TorchEngine, **changes: Any) -> None:
        self.__dict__ |= changes
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.mark.parametrize(
    ("graphs", "changes", "srte", "problem"),
    [
        ("off", {}, "none", None),
        ("auto", {}, "none", "recorded"),
        ("on", {}, "none", "recorded"),
        ("auto", {"world_size": 2}, "none", "recorded"),
        ("auto", {"device": torch.device("cpu")}, "none", None),
        ("on", {"device": torch.device("cpu")}, "none", "the run is on the CPU"),
        ("on", {}, "learnable", "longer than the learnable SRTE's table"),
    ],
)
def test_which_runs_are_recorded(
    engine: TorchEngine,
    caplog: pytest.LogCaptureFixture,
    graphs: str,
    changes: dict[str, Any],
    srte: str,
    problem: str | None,
) -> None:
    model = tiny_config(srte_encoding=srte, max_position_embeddings=8 if srte == "learnable" else 64)
    training = TrainingConfig.model_validate(TRAINING | {"cuda_graphs": graphs})
    given: Any = OnGPU(engine, **changes)
    if graphs == "on" and problem != "recorded":
        with pytest.raises(UserError, match=problem):
            build_passes(given, model, training, WEIGHTS)
        return
    with caplog.at_level(logging.INFO):
        passes = build_passes(given, model, training, WEIGHTS)
    assert isinstance(passes, RecordedPasses) is (problem == "recorded")
    if problem not in (None, "recorded"):
        assert problem in caplog.text


def test_an_engine_that_cannot_record_is_refused_by_name() -> None:
    engine: Any = SimpleNamespace(device=torch.device("cuda"), world_size=1)
    with pytest.raises(UserError, match="SimpleNamespace does not record its passes"):
        build_passes(engine, tiny_config(), TrainingConfig.model_validate(TRAINING | {"cuda_graphs": "on"}), WEIGHTS)


def test_the_end_of_the_process_groups_discards_recordings(
    monkeypatch: pytest.MonkeyPatch, engine: TorchEngine
) -> None:
    """NCCL would wait for ever to close a communicator that a CUDA graph refers to."""
    made = pretend_gpu(monkeypatch)
    passes = RecordedPasses(engine, WEIGHTS, EagerPasses(engine, WEIGHTS))
    for step in range(3):
        inputs = pass_inputs([[0, 7], [0]], step)
        passes.begin([inputs.micro])
        passes.backward(inputs, passes.forward(inputs))
        passes.step(1e-3)
    assert made and not any(graph.was_reset for graph in made)
    engine.layout.close()
    assert all(graph.was_reset for graph in made)
