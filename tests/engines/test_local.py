"""One process without ``fully_shard`` trains as one process with it."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fusiontree.checkpoint.save_plan import pieces_of
from fusiontree.engines import build, torch_engine
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.layout import Layout
from fusiontree.training.config import TrainingConfig
from tests.engines.batches import micro_batch
from tests.helpers import tiny_config


def train(
    own: bool, precision: str, tied: bool, poison: bool, engine_name: Any = "fsdp2"
) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Two micro batches a step, clipped; return norms, losses and the state after three steps."""
    values = {"seq_len": 16, "max_steps": 3, "global_batch_size": 2, "micro_batch_size": 1, "precision": precision}
    training = TrainingConfig.model_validate(values | {"max_grad_norm": 0.5, "activation_checkpointing": "selective"})
    model = tiny_config(tie_word_embeddings=tied)
    with Layout("cpu") as layout, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_engine, "is_local", lambda mesh: own)
        engine = build.build_engine(model, ParallelConfig(engine=engine_name), training, layout)
        assert isinstance(engine, torch_engine.TorchEngine)
        assert isinstance(engine.module.layers[0], FSDPModule) is (not own and engine_name == "fsdp2")
        seen: list[Any] = []
        for step in range(3):
            for micro in range(2):
                g = torch.Generator().manual_seed(2 * step + micro)
                ids = torch.randint(0, 64, (1, 16), generator=g)
                inputs = micro_batch(ids, torch.arange(16)[None] % 11)
                loss = engine.forward(inputs).loss_sum / 32
                seen.append(float(loss.detach()))
                engine.backward(loss * (float("nan") if poison and step == 1 else 1.0), last=micro == 1)
            result = engine.step(1e-2)
            seen.append(0.0 if result.skipped else result.grad_norm)
            assert (result.skipped is not None) == (poison and step == 1)
        seen.append(float(engine.evaluate(inputs)))
        seen.append(engine.state_dict()["optimizer_step"])
        state = {name: whole(tensor) for name, tensor in engine.state_tensors().items()}
    return seen, state


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Values of a tensor of which this rank has all."""
    values = torch.full(tensor.shape, torch.nan)
    for offset, piece in pieces_of(tensor):
        values[tuple(slice(at, at + size) for at, size in zip(offset, piece.shape, strict=True))] = piece
    return values


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("precision", "rtol"), [("fp32", 2e-6), ("bf16", 2e-3)])
@pytest.mark.parametrize("poison", [False, True])
def test_equals_fully_shard_over_one_rank(precision: str, rtol: float, tied: bool, poison: bool) -> None:
    seen, state = train(True, precision, tied, poison)
    want, wanted_state = train(False, precision, tied, poison)
    torch.testing.assert_close(torch.tensor(seen), torch.tensor(want), rtol=rtol, atol=0)
    assert state.keys() == wanted_state.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32
        # AdamW turns the rounding of a gradient near zero into a step of either sign; few elements are.
        distance = (tensor - wanted_state[name]).norm() / wanted_state[name].norm().clamp(min=1e-6)
        assert distance < (2e-2 if precision == "bf16" else 1e-4), f"{name}: {distance:.1e}"


@pytest.mark.parametrize("reshard", [True, False])
def test_blocks_are_kept_from_forward_to_backward_where_asked(reshard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"seq_len": 16, "max_steps": 3, "global_batch_size": 1, "micro_batch_size": 1}
    training = TrainingConfig.model_validate(values)
    monkeypatch.setattr(torch_engine, "is_local", lambda mesh: False)
    ids = torch.arange(16)[None]
    inputs = micro_batch(ids)
    with Layout("cpu") as layout:
        parallel = ParallelConfig(reshard_after_forward=reshard)
        engine: Any = build.build_engine(tiny_config(), parallel, training, layout)

        def sharded() -> list[bool]:
            return [isinstance(p, DTensor) for p in engine.module.layers.parameters()]

        engine.evaluate(inputs)
        assert all(sharded())
        loss = engine.forward(inputs).loss_sum
        few = sum("ssm." in name for name, _ in engine.module.layers.named_parameters())  # with the root's
        assert sum(sharded()) == (len(sharded()) - few if reshard else 0)
        engine.backward(loss, last=True)
        assert all(sharded())


@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("own", [True, False])
def test_an_engine_that_is_given_up_gives_back_its_memory(own: bool, precision: str, engine: str) -> None:
    if not own and engine == "fsdp2":
        pytest.skip("fully_shard's memory is torch's")
    values = {"seq_len": 16, "max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "precision": precision}
    with Layout("cpu") as layout, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_engine, "is_local", lambda mesh: own)
        trainer: Any = build.build_engine(
            tiny_config(), ParallelConfig(engine=engine), TrainingConfig.model_validate(values), layout
        )
        ids = torch.arange(16)[None]
        loss = trainer.forward(micro_batch(ids, labels_BS=ids)).loss_sum
        trainer.backward(loss, last=True)
        assert trainer.step(1e-3).grad_norm > 0
        held = [weakref.ref(p) for p in (*trainer.module.parameters(), *trainer.optimizer.state)]
        assert len(held) > 40
        del trainer, loss
        gc.collect()
        assert not any(parameter() is not None for parameter in held)
