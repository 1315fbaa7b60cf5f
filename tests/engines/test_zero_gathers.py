"""ZeRO-3 moves a block's parameters together: what a step gathers, when, and what it reduces, counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engines.gather_worker import LAYERS
from tests.parallel.launch import run_ranks

pytestmark = [pytest.mark.xdist_group("zero"), pytest.mark.timeout(600)]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_block_is_gathered_once_a_pass(tmp_path: Path, checkpointing: str) -> None:
    output = tmp_path / "found.json"
    run_ranks(["-m", "tests.engines.gather_worker", str(output), checkpointing], 2, tmp_path, timeout=500)
    found = json.loads(output.read_text())
    forward, backward = " ".join(found["notes"]).split(" backward ")
    # Each block is on its way while the one before it computes, comes once, and comes whole.
    expected = ["gather 0"]
    for layer in range(LAYERS):
        expected += [f"gather {layer + 1}"] * (layer + 1 < LAYERS) + [f"forward {layer}"]
    assert forward == " ".join(expected)
    # A block's gradients (with the last one's the head's) are reduced when it is done, the embedding's at the end.
    expected = [f"gather {LAYERS - 1}"]
    for layer in reversed(range(LAYERS - 1)):
        expected += [f"gather {layer}", "reduce"]
    assert backward == " ".join([*expected, "reduce", "reduce"])
    assert found["nodes"] == 4 * LAYERS  # (in, bc), (q, k, v), (up, skip), (gate down, MLP up)
