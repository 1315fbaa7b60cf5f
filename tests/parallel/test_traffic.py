"""Counts the bytes that a layout sends and holds, and its operations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.parallel.launch import run_ranks
from tests.parallel.table import MODEL

pytestmark = [pytest.mark.xdist_group("traffic")]
ENGINES = pytest.mark.parametrize("engine", ["fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that measures a layout (once) and gives each rank's figures."""
    folder = tmp_path_factory.mktemp("traffic")
    kept: dict[str, list[dict[str, Any]]] = {}

    def measure(
        cp: int, tp: int, seq_len: int = 64, checkpointing: str = "none", engine: str = "fsdp2", mix: str = "gate"
    ) -> list[dict[str, Any]]:
        name = f"{engine}-cp{cp}-tp{tp}-{seq_len}-{checkpointing}-{mix}"
        if name not in kept:
            output, layout = str(folder / name), [str(n) for n in (1, cp, tp, seq_len)]
            arguments = ["-m", "tests.parallel.traffic", output, engine, *layout, checkpointing, mix]
            run_ranks(arguments, cp * tp, folder, timeout=200)
            kept[name] = [json.loads(Path(f"{output}.{rank}").read_text()) for rank in range(cp * tp)]
        return kept[name]

    return measure


@ENGINES
def test_a_block_gathers_once_and_scatters_once(measured: Any, engine: str) -> None:
    for rank in measured(2, 2, checkpointing="selective", engine=engine):
        tp = {kind: n for kind, n in rank["block_forward"].items() if kind.startswith("tp")}
        assert tp == {"tp all_gather": 1, "tp reduce_scatter": 1}


@ENGINES
def test_summed_branches_are_summed_before_they_are_sent(measured: Any, engine: str) -> None:
    gate, summed = (measured(1, 2, engine=engine, mix=mix) for mix in ("gate", "sum"))
    stream = 64 // 2 * MODEL["hidden_size"] * 4  # bytes of the other rank's tokens
    for rank, other in zip(gate, summed, strict=True):
        assert rank["block_bytes"] == 3 * stream and other["block_bytes"] == 2 * stream


@ENGINES
def test_no_gradient_is_reduced_over_tp_in_a_micro_batch(measured: Any, engine: str) -> None:
    """The one all-reduce over tp belongs to nothing of the model's weights: there is none in the backward pass."""
    for rank in measured(2, 2, checkpointing="selective", engine=engine):
        assert rank["calls"].get("tp all_reduce", 0) == rank["forward_calls"].get("tp all_reduce", 0)


@ENGINES
def test_parameters_are_shared_out_over_all_ranks(measured: Any, engine: str) -> None:
    whole = measured(1, 1, engine=engine)[0]["local_parameters"]
    ranks = measured(2, 2, checkpointing="selective", engine=engine)
    assert sum(rank["local_parameters"] for rank in ranks) == whole
    for rank in ranks:
        assert rank["local_parameters"] == pytest.approx(whole / 4, rel=0.02)


@ENGINES
def test_selective_recomputation_repeats_no_matrix_product(measured: Any, engine: str) -> None:
    forward, total = measured(1, 1, engine=engine)[0]["products"]
    assert measured(2, 2, checkpointing="selective", engine=engine)[0]["products"] == [forward, total]


@pytest.mark.slow
def test_bytes_of_context_parallelism(measured: Any) -> None:
    """Convolution, scans and local heads do not grow with the row; global heads follow their formula, both ways."""
    short, long = measured(2, 1, 64), measured(2, 1, 256)
    width, kv_heads, heads, layers, cp = 8, 2, 4, 2, 2
    assert MODEL["head_dim"] == width and MODEL["global_heads"] == heads
    for rank in range(cp):
        for part in ("cp conv", "cp scan", "cp delta", "cp local heads"):
            assert short[rank]["bytes"][part] == long[rank]["bytes"][part] > 0, part
        state_and_matrix = 4 * 8 * 4 * (8 + 4)  # fp32, 8 heads, 4 key channels, 8 value channels; of the other rank
        assert short[rank]["bytes"]["cp delta"] == 2 * state_and_matrix
        for figures, piece in ((short[rank], 32), (long[rank], 128)):
            keys_and_values = (cp - 1) * piece * 2 * kv_heads * width * 4
            queries_and_outputs = 2 * (piece // 2) * heads * width * 4
            forward = layers * (keys_and_values + queries_and_outputs)
            assert figures["forward_bytes"]["cp global heads"] == forward
            assert figures["bytes"]["cp global heads"] == 2 * forward


@pytest.mark.slow
def test_the_scan_is_not_done_twice(measured: Any) -> None:
    alone = measured(1, 1, 256)[0]["scan_flops"]
    assert sum(rank["scan_flops"] for rank in measured(2, 1, 256)) <= 1.02 * alone
