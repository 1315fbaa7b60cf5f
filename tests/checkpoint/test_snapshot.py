"""Page-locked memory is unlocked before it is freed: CUDA would take later memory at its address for locked."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from fusiontree.checkpoint.save_plan import holdings_of, make_plan
from fusiontree.checkpoint.snapshot import Snapshot


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Addresses of the memory that is locked."""
    found: set[int] = set()

    def register(address: int, size: int, flags: int) -> int:
        found.add(address)
        return 0

    cudart = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=found.remove)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    return found


def make() -> Snapshot:
    return Snapshot(make_plan(holdings_of({"model.weight": torch.ones(4, 4)}), None), torch.device("cuda"))


def test_memory_stays_locked_while_a_buffer_is_in_use(locked: set[int]) -> None:
    snapshot = make()
    assert snapshot.locked and len(locked) == 1
    buffers = dict(snapshot.buffers)
    del snapshot
    gc.collect()
    assert len(locked) == 1
    buffers.clear()
    gc.collect()
    assert not locked


def test_memory_is_unlocked_once(locked: set[int]) -> None:
    snapshot = make()
    snapshot.close()
    assert not locked and not snapshot.locked
    snapshot.close()
    del snapshot
    gc.collect()
