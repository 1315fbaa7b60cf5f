"""``activation_checkpointing: auto``: the mix for given bytes and budgets, its measurements, and runs that use it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fusiontree.engines import torch_engine
from fusiontree.engines.build import build_engine
from fusiontree.models.mixers.base import Seconds
from fusiontree.ops.documents import Documents
from fusiontree.parallel import kept_memory
from fusiontree.parallel.activation_checkpointing import CheckpointedForward, Checkpointing, checkpoint_activations
from fusiontree.parallel.auto_checkpointing import GIB, AutoCheckpointing
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.kept_memory import kept_bytes
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.recompute_mix import LayerCosts, choose_mix, describe_mix, peak_bytes
from fusiontree.training.config import TrainingConfig
from fusiontree.utils.errors import UserError
from tests.end_to_end.runs import metrics
from tests.engines.batches import micro_batch
from tests.helpers import tiny_config, tiny_model
from tests.parallel.auto_memory import partial_memory
from tests.parallel.table import MODEL, REFERENCE
from tests.parallel.test_parity import ParityTable

F, S, N = "full", "selective", "none"
SIZES = {F: 1.0, S: 4.0, N: 6.0}
LAYER = LayerCosts(SIZES, {F: 10.0, S: 1.0, N: 0.0})
LARGE = LayerCosts({F: 1.0, S: 10.0, N: 30.0}, {F: 10.0, S: 1.0, N: 0.0})
FREE = LayerCosts({F: 4.0, S: 4.0, N: 4.0}, {F: 10.0, S: 1.0, N: 0.0})


@pytest.mark.parametrize(
    ("layers", "spare", "modes"),
    [
        ([LAYER] * 4, 0.0, [F, F, F, F]),
        ([LAYER] * 4, 2.9, [F, F, F, F]),
        ([LAYER] * 4, 3.0, [F, F, F, S]),
        ([LAYER] * 4, 7.0, [F, F, S, S]),
        ([LAYER] * 4, 8.0, [F, F, S, N]),  # the rest is too small for a third selective layer
        ([LAYER] * 4, 12.0, [S, S, S, S]),
        ([LAYER] * 4, 17.0, [S, S, N, N]),
        ([LAYER] * 4, 20.0, [N, N, N, N]),
        ([LARGE, LAYER], 3.0, [F, S]),
        ([LAYER, LARGE], 9.0, [N, F]),  # more time saved per byte in the small layer
        ([LAYER, LARGE], 12.0, [S, S]),
        ([FREE, LAYER], 0.0, [N, F]),
        ([], 1.0, []),
    ],
)
def test_the_mix_of_a_budget(layers: list[LayerCosts], spare: float, modes: list[str]) -> None:
    assert choose_mix(layers, spare) == modes


def test_the_mix_is_within_one_recomputed_layer_of_the_best() -> None:
    for spare in range(21):
        mixes = itertools.product((F, S, N), repeat=4)
        added = [(m, sum(SIZES[mode] - SIZES[F] for mode in m), sum(LAYER.seconds[mode] for mode in m)) for m in mixes]
        best = min(seconds for _, size, seconds in added if size <= spare)
        chosen = choose_mix([LAYER] * 4, spare)
        assert sum(SIZES[mode] - SIZES[F] for mode in chosen) <= spare
        assert best <= sum(LAYER.seconds[mode] for mode in chosen) < best + LAYER.seconds[F]


def test_the_peak_of_a_mix() -> None:
    assert peak_bytes([SIZES] * 3, [N, N, N]) == 18
    assert peak_bytes([SIZES] * 3, [F, F, F]) == 2 + 6  # the last block is recomputed while two inputs are kept
    assert peak_bytes([SIZES] * 3, [F, F, S]) == max(1 + 1 + 4, 1 + 6)
    assert describe_mix([F, S, N, N]) == "full in 1 layer, selective in 1, none in 2"


def block_inputs() -> tuple[Tensor, tuple[Any, ...]]:
    """Return a block's input and the arguments beside it, as a model's first block receives them."""
    model, seen = tiny_model(layer_pattern="F"), []
    model.layers[0].register_forward_pre_hook(lambda block, args: seen.append(args))
    positions = torch.arange(32).repeat(2, 1) % 11
    model(torch.arange(64).view(2, 32) % 40, documents=Documents.from_positions(positions))
    x_BSC, *rest = seen[0]
    return x_BSC.detach().requires_grad_(), tuple(rest)


def test_more_recomputation_keeps_fewer_bytes() -> None:
    x_BSC, rest = block_inputs()
    for letter in "FMA":
        block = tiny_model(layer_pattern=letter).layers[0]
        kept = kept_bytes(block.forward, x_BSC, *rest)
        input_bytes = x_BSC.untyped_storage().nbytes()
        assert input_bytes <= kept[F] < kept[S] < kept[N]
        assert (kept[F] > input_bytes) is (letter != "M")  # the result of attention is kept too


def test_the_count_leaves_out_parameters_and_what_layers_share() -> None:
    weight = torch.nn.Parameter(torch.ones(16, 16))
    shared, x = torch.ones(4, 16), torch.ones(4, 16, requires_grad=True)

    def forward(x: Tensor, other: Tensor) -> Tensor:
        return torch.nn.functional.linear((x * other).exp(), weight.t()) @ weight

    # x, to multiply (other needs no gradient of its own); exp's result, for itself and the first product; that product.
    assert kept_bytes(forward, x, shared)[N] == 2 * 4 * 16 * 4


def test_the_count_lets_go_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: waiting for the collector of reference cycles would add every layer's bytes to the measured peak."""
    seen: list[Any] = []
    add = kept_memory._KeptMemory.add
    monkeypatch.setattr(kept_memory._KeptMemory, "add", lambda kept, tensor: (seen.append(kept), add(kept, tensor)))
    x_BSC, rest = block_inputs()
    kept_bytes(tiny_model(layer_pattern="F").layers[0].forward, x_BSC, *rest)
    assert len(set(map(id, seen))) == 3 and not any(kept._storages for kept in seen)


class Recorded:
    """A memory of the test's sizes that notes what is asked of it."""

    def __init__(self, budget: float, peaks: Sequence[float]) -> None:
        self.available, self.peaks, self.released = budget, iter(peaks), 0

    def budget(self) -> float:
        return self.available

    def begin_step(self) -> None:
        pass

    def peak(self, nbytes: Sequence[dict[str, float]], modes: Sequence[str]) -> float:
        return next(self.peaks)

    def release(self) -> None:
        self.released += 1


def automatic(
    monkeypatch: pytest.MonkeyPatch, memory: Recorded, others: list[dict[str, Any]] | None = None
) -> AutoCheckpointing:
    """Return the choice for four layers of ``SIZES`` GiB, on a rank with ``memory`` beside ``others``."""
    sizes = {mode: size * GIB for mode, size in SIZES.items()}
    monkeypatch.setattr("fusiontree.parallel.auto_checkpointing.kept_bytes", lambda *args, **kwargs: sizes)
    forwards = [CheckpointedForward(lambda x: x, F) for _ in range(4)]
    for forward in forwards:
        monkeypatch.setattr(forward, "forward", lambda x: x.exp())

    def gather(mine: str) -> list[str]:
        return [mine, *(json.dumps(json.loads(mine) | other) for other in others or [])]

    seconds = [Seconds(0.0, 30.0)] * 4
    return AutoCheckpointing(Checkpointing(forwards), memory, gather, seconds=seconds, tokens=1.0, limit=0.9)


def run_step(checkpointing: AutoCheckpointing) -> list[str]:
    with checkpointing.step():
        x = torch.ones(2, requires_grad=True)
        for forward in checkpointing.forwards:
            x = forward(x)
    return checkpointing.modes


def test_the_second_step_corrects_the_first_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Recorded(20 * GIB, [14 * GIB, 17 * GIB])
    checkpointing, lines = automatic(monkeypatch, memory), []
    checkpointing.announce = lines.append
    assert run_step(checkpointing) == [F, F, S, S] and not checkpointing.settled
    # 6 GiB were added and the peak grew by 3: three are left.
    assert run_step(checkpointing) == [F, S, S, S] and checkpointing.settled
    assert lines == ["full in 1 layer, selective in 3 (auto, 20.0 of 20.0 GiB)"]
    assert memory.released == 2
    assert run_step(checkpointing) == checkpointing.modes


def test_the_fullest_rank_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"budget": 17.0 * GIB, "base": 14.0 * GIB}
    assert run_step(automatic(monkeypatch, Recorded(40 * GIB, [14 * GIB]), [other])) == [F, F, F, S]
    larger = {"kept": [{F: 1.0 * GIB, S: 7.0 * GIB, N: 8.0 * GIB}] * 4}
    assert run_step(automatic(monkeypatch, Recorded(22 * GIB, [14 * GIB]), [larger])) == [F, F, F, N]


def test_a_budget_too_small_names_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"needs 14 GiB .*memory_limit 0\.9 allows 13\.9 GiB; use more ranks"):
        run_step(automatic(monkeypatch, Recorded(13.9 * GIB, [14 * GIB])))


def test_out_of_memory_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointing = automatic(monkeypatch, Recorded(20 * GIB, [14 * GIB]))
    run_step(checkpointing)
    said = r"auto, full in 2 layers, selective in 2 .*Tried to allocate 2 GiB; lower training\.memory_limit"
    with pytest.raises(UserError, match=said), checkpointing.step():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a capacity of 80 GiB")


@pytest.mark.parametrize("limit", [0.0, -0.5, 1.01, float("nan")])
def test_a_limit_outside_its_range_is_refused(limit: float) -> None:
    values = {"seq_len": 16, "max_steps": 3, "global_batch_size": 1, "memory_limit": limit}
    with pytest.raises(ValueError, match="memory_limit"):
        TrainingConfig.model_validate(values)


@pytest.fixture
def half_memory() -> Iterator[None]:
    with partial_memory(0.5):
        yield


def trained(engine_name: str, precision: str, mode: str) -> tuple[list[float], list[Tensor], Checkpointing]:
    """Return losses and norms of three steps of two micro-batches, the parameters, and the checkpointing."""
    values = {"seq_len": 32, "max_steps": 3, "global_batch_size": 2, "micro_batch_size": 1, "precision": precision}
    training = TrainingConfig.model_validate(values | {"activation_checkpointing": mode})
    seen = []
    with Layout("cpu") as layout:
        parallel = ParallelConfig.model_validate({"engine": engine_name})
        engine: Any = build_engine(tiny_config(layer_pattern="FMAFF"), parallel, training, layout)
        for step, micro in itertools.product(range(3), range(2)):
            if micro == 0:
                context = engine.checkpointing.step()
                context.__enter__()
            ids = torch.randint(0, 64, (1, 32), generator=torch.Generator().manual_seed(2 * step + micro))
            loss = engine.forward(micro_batch(ids, torch.arange(32)[None] % 11)).loss_sum / 64
            engine.backward(loss, last=micro == 1)
            seen.append(float(loss.detach()))
            if micro == 1:
                seen.append(engine.step(1e-2).grad_norm)
                context.__exit__(None, None, None)
        state = [t.detach().clone() for name, t in engine.state_tensors().items() if name.startswith("model.")]
    return seen, [getattr(t, "local", t) for t in state], engine.checkpointing


@pytest.mark.usefixtures("half_memory")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_mix_changes_no_bit(engine: str, precision: str) -> None:
    seen, _, checkpointing = trained(engine, precision, "auto")
    assert checkpointing.settled and len(set(checkpointing.modes)) > 1, checkpointing.modes
    for mode in ("none", "full"):
        assert trained(engine, precision, mode)[0] == seen


def test_modes_may_change_between_steps() -> None:
    model = tiny_model(layer_pattern="FMA")
    checkpointing = checkpoint_activations(model, "auto")
    ids = torch.arange(64).view(2, 32) % 40
    results = []
    for modes in ((F, F, F), (N, S, F), (S, N, N)):
        for forward, mode in zip(checkpointing.forwards, modes, strict=True):
            forward.mode = mode
        model.zero_grad()
        model(ids, labels_BS=ids).loss_sum.backward()
        results.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.slow
def test_a_resumed_run_measures_again_and_has_the_same_losses(tmp_path: Path) -> None:
    table, run = ParityTable(tmp_path, MODEL, steps=7), tmp_path / "auto"
    overrides = REFERENCE._replace(checkpointing="auto").overrides()
    starts: list[Any] = [(str(run), [*overrides, f"training.exit_at_step={stop}"], None) for stop in (4, 7)]
    table.train(1, [(str(table.run_dir(REFERENCE)), REFERENCE.overrides(), None), *starts])
    for key in ("loss", "grad_norm", "validation_loss"):
        assert metrics(run, key) == metrics(table.run_dir(REFERENCE), key)


def measured(engine_name: str, precision: str, shared: bool) -> list[dict[str, float]]:
    """Return the measured bytes of each layer; ``shared`` treats parameters as shared with other ranks."""
    values = {"seq_len": 32, "max_steps": 1, "global_batch_size": 1, "precision": precision}
    training = TrainingConfig.model_validate(values | {"activation_checkpointing": "auto"})
    parallel = ParallelConfig.model_validate({"engine": engine_name})
    with Layout("cpu") as layout, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_engine, "is_local", lambda mesh: not shared)
        engine: Any = build_engine(tiny_config(layer_pattern="FMA"), parallel, training, layout)
        with engine.checkpointing.step():
            engine.backward(engine.forward(micro_batch(torch.arange(32)[None])).loss_sum / 32, last=True)
            engine.step(1e-3)
        return engine.checkpointing._kept


@pytest.mark.xdist_group("zero")
def test_the_count_does_not_depend_on_where_an_engine_keeps_parameters() -> None:
    for precision in ("fp32", "bf16"):
        local = measured("ddp", precision, shared=False)
        for engine in ("ddp", "fsdp2", "zero3"):
            assert measured(engine, precision, shared=True) == local, (precision, engine)
    # zero1 casts parameters in each forward, and the backward pass needs the cast copies.
    cast = measured("zero1", "bf16", shared=True)
    assert all(a["none"] > b["none"] and a["full"] == b["full"] for a, b in zip(cast, local, strict=True))
