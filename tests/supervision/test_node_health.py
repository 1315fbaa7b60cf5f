from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusiontree.supervision import node_health
from fusiontree.supervision.config import SupervisionConfig
from fusiontree.supervision.device_speed import Probe
from fusiontree.supervision.monitors import RunMonitors
from fusiontree.supervision.node_health import check
from fusiontree.supervision.stragglers import slow_ranks
from fusiontree.tracking.records import Records, read_records
from fusiontree.utils.errors import UserError


def nodes(count: int, odd: int | None = None, **changes: Any) -> list[dict[str, Any]]:
    same = {
        "config": "c",
        "source": "s",
        "python": "3.11.7",
        "packages": {"torch": "2.13.0"},
        "cuda": None,
        "driver": None,
        "matmul_tflops": 700.0,
        "memory_gb_per_s": 2900.0,
        "clock_mhz": 1980,
    }
    reports = [same | {"rank": rank, "host": f"node{rank // 2}"} for rank in range(count)]
    if odd is not None:
        reports[odd] |= changes
    return reports


def test_healthy_nodes_pass() -> None:
    assert check(nodes(8)) == []
    assert check(nodes(1)) == []


@pytest.mark.parametrize(("key", "value"), [("matmul_tflops", 400.0), ("memory_gb_per_s", 1000.0), ("clock_mhz", 1200)])
@pytest.mark.parametrize("count", [2, 8])
def test_a_slow_node_is_named(key: str, value: float, count: int) -> None:
    (said,) = check(nodes(count, 1, **{key: value}))
    assert said.startswith("rank 1 (node0) is slow")
    assert f"{value:g}" in said


@pytest.mark.parametrize(
    ("key", "value"), [("packages", {"torch": "2.12.0"}), ("config", "other"), ("source", "old"), ("python", "3.12.1")]
)
def test_other_code_or_configuration_is_an_error_that_names_the_node(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"not run the same {key}: rank 5 \(node2\)"):
        check(nodes(8, 5, **{key: value}))


def start(monkeypatch: pytest.MonkeyPatch, folder: Path, mode: str, reports: list[dict[str, Any]]) -> list[dict]:
    """Do the check of a start on the main rank; return its events."""
    monkeypatch.setattr(node_health, "examine", lambda *_: reports)
    config = SupervisionConfig.model_validate({"health_check": mode})
    engine: Any = SimpleNamespace(is_main=True, world_size=len(reports))
    try:
        RunMonitors(engine, config, Records(folder, enabled=True)).at_start(folder, {})
    finally:
        events = read_records(folder / "events.jsonl")
    return events


def test_a_start_writes_what_it_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert start(monkeypatch, tmp_path, "warn", nodes(4)) == []
    assert len(json.loads((tmp_path / "health.json").read_text())) == 4
    (event,) = start(monkeypatch, tmp_path, "warn", nodes(4, 3, matmul_tflops=1.0))
    assert event["event"] == "slow_node"
    assert "rank 3 (node1)" in event["reason"]


def test_a_start_that_must_not_be_stops_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rank 3 \(node1\) is slow.* supervision\.health_check=warn"):
        start(monkeypatch, tmp_path, "stop", nodes(4, 3, matmul_tflops=1.0))
    with pytest.raises(UserError, match="not run the same source"):
        start(monkeypatch, tmp_path, "warn", nodes(4, 3, source="old"))
    assert [e["event"] for e in read_records(tmp_path / "events.jsonl")] == ["slow_node", "unfit_node"]
    start(monkeypatch, tmp_path, "off", nodes(4, 3, source="old"))


def ranks(own: list[float], matmul: list[float]) -> list[dict[str, Any]]:
    pairs = zip(own, matmul, strict=True)
    return [{"host": f"node{i}", "own_s": o, "matmul_s": m, "step_s": 1.0} for i, (o, m) in enumerate(pairs)]


def test_slow_ranks_are_named_with_what_is_slow() -> None:
    assert slow_ranks(ranks([0.01, 0.01, 0.3, 0.01], [0.002] * 4), 1.5)[0]["reason"] == (
        "rank 2 (node2) is 30.0 times slower in data and host work"
    )
    (slow,) = slow_ranks(ranks([0.01] * 4, [0.002, 0.002, 0.002, 0.005]), 1.5)
    assert (slow["rank"], slow["what"]) == (3, "computing")
    assert [s["rank"] for s in slow_ranks(ranks([0.01, 0.4], [0.002, 0.002]), 1.5)] == [1]
    # Ten times slower, but a hundredth of a step: nobody's trouble.
    assert slow_ranks(ranks([0.001, 0.01, 0.001], [0.002] * 3), 1.5) == []


def test_the_probe_measures_something() -> None:
    probe = Probe(torch.device("cpu"))
    assert 1e8 < probe.matmul_flops() < 1e13
    assert 1e8 < probe.copy_bytes_per_s() < 1e13
