"""On a GPU: measured bytes are those that the allocator counts, and ``auto`` stays within its budget."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from fusiontree.engines.build import build_engine
from fusiontree.ops.documents import Documents
from fusiontree.parallel import auto_checkpointing
from fusiontree.parallel.activation_checkpointing import CheckpointedForward, Checkpointing
from fusiontree.parallel.auto_checkpointing import CudaMemory
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.kept_memory import kept_bytes
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.recompute_mix import MODES
from fusiontree.training.config import TrainingConfig
from tests.engines.batches import micro_batch
from tests.helpers import tiny_config, tiny_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TOKENS = 4096
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "num_heads": 8,
    "num_kv_heads": 4,
    "global_heads": 4,
    "head_dim": 64,
    "window_size": 128,
    "max_position_embeddings": TOKENS,
    "mamba": {"head_dim": 64, "d_state": 64, "chunk_size": 64},
}


@pytest.mark.parametrize("letter", "FMA")
def test_the_count_is_what_the_allocator_keeps(letter: str) -> None:
    model, seen = tiny_model(layer_pattern=letter, **SIZES).cuda().bfloat16(), []
    block: Any = model.layers[0]
    hook = block.register_forward_pre_hook(lambda block, args: seen.append(args))
    ids = torch.arange(TOKENS, device="cuda")[None] % 48
    documents = Documents.from_positions(torch.arange(TOKENS)[None] % 1500).to("cuda")
    model(ids, documents=documents)
    hook.remove()
    x_BSC, rest = seen[0][0].detach().requires_grad_(), seen[0][1:]
    seen.clear()
    counted = kept_bytes(block.forward, x_BSC, *rest)
    before = torch.cuda.memory_allocated()
    assert kept_bytes(block.forward, x_BSC, *rest) == counted
    assert torch.cuda.memory_allocated() == before
    for mode in MODES:
        forward = CheckpointedForward(block.forward, mode)
        forward(x_BSC, *rest)  # compiles, and makes what later calls share
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out: tuple[Tensor, Any] = forward(x_BSC, *rest)
        kept = torch.cuda.memory_allocated() - before - out[0].untyped_storage().nbytes()
        kept += x_BSC.untyped_storage().nbytes()  # which was there before
        print(f"{letter} {mode}: counted {counted[mode] / 2**20:.2f} MiB, allocated {kept / 2**20:.2f} MiB")
        assert abs(counted[mode] - kept) < 0.05 * kept + 2**16, mode
        del out


def trained(mode: str) -> tuple[list[float], int, Checkpointing]:
    """Return the losses of four steps, the peak of the last one, and the checkpointing."""
    values = {"seq_len": TOKENS, "max_steps": 4, "global_batch_size": 1, "precision": "bf16", "device": "cuda"}
    training = TrainingConfig.model_validate(values | {"activation_checkpointing": mode})
    gc.collect()  # an engine that is not yet freed would be part of the peak
    losses, ids = [], torch.randint(0, 64, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with Layout("cuda") as layout:
        parallel = ParallelConfig.model_validate({"engine": "ddp"})
        engine: Any = build_engine(tiny_config(layer_pattern="F" * 12, **SIZES), parallel, training, layout)
        for _ in range(4):
            torch.cuda.reset_peak_memory_stats()
            with engine.checkpointing.step():
                loss = engine.forward(micro_batch(ids)).loss_sum / TOKENS
                engine.backward(loss, last=True)
                engine.step(1e-3)
            losses.append(float(loss.detach()))
            del loss
        return losses, torch.cuda.max_memory_allocated(), engine.checkpointing


def test_auto_fills_its_budget_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    full, none = trained("full"), trained("none")
    budget = (full[1] + none[1]) / 2
    monkeypatch.setattr(CudaMemory, "budget", lambda self: budget)
    auto = trained("auto")
    print(
        f"full {full[1] / 2**20:.0f}, none {none[1] / 2**20:.0f}, auto {auto[1] / 2**20:.0f} MiB: {auto[2].summary()}"
    )
    assert isinstance(auto[2], auto_checkpointing.AutoCheckpointing) and len(set(auto[2].modes)) > 1
    assert 0.8 * budget < auto[1] <= budget
    assert auto[0] == pytest.approx(full[0], rel=1e-3) and auto[0] == pytest.approx(none[0], rel=1e-3)


def test_the_budget_is_a_share_of_the_device() -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    budget = CudaMemory(torch.device("cuda", 0), 0.92).budget()
    assert 0 < budget <= 0.92 * total
