"""The network test before training names what is wrong: by arithmetic, and between hosts of their own."""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.planning.network_check import Measured, Preflight, judge, rounds
from fusiontree.utils.environment import ProcessPlace
from tests.end_to_end.runs import ROOT
from tests.slurm.hosts import Hosts, missing_for_hosts
from tests.slurm.jobs import read

NAMES = {node: f"n{node}" for node in range(9)}
MISSING = missing_for_hosts()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8])
def test_every_node_meets_every_other_once(count: int) -> None:
    nodes = list(range(10, 10 + count))
    schedule = rounds(nodes)
    met = [pair for pairs in schedule for pair in pairs]
    assert sorted(met) == list(combinations(nodes, 2))
    for pairs in schedule:
        ends = [node for pair in pairs for node in pair]
        assert len(ends) == len(set(ends))


def test_an_error_without_a_text_is_reported_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the rank would end, and its node be taken for silent."""

    def fails(self: Preflight, number: int, pair: tuple[int, int]) -> Measured:
        raise TimeoutError

    monkeypatch.setattr(Preflight, "_measure", fails)
    store = torch.distributed.HashStore()
    limits = {"size_bytes": 8, "pair_timeout_s": 1.0, "join_timeout_s": 1.0, "budget_s": 1.0}
    Preflight(ProcessPlace(0, 2, 0, 1), torch.device("cpu"), store, "n0", **limits)._take_part(0, [(0, 1)])
    assert json.loads(store.get("done/0/0"))["error"] == "TimeoutError"


def links(rates: dict[tuple[int, int], float | str], nodes: int = 4) -> list[Measured]:
    """All links at 10 GB/s but those in ``rates``; a text is an error."""
    result = []
    for pair in combinations(range(nodes), 2):
        rate = rates.get(pair, 10.0)
        result.append(Measured(pair, error=rate) if isinstance(rate, str) else Measured(pair, rate, rate))
    return result


def test_the_guilty_one_is_named() -> None:
    assert judge(links({}), [], NAMES) == []
    assert judge(links({(1, 2): 3.0}), [], NAMES) == [
        "the link between node 1 (n1) and node 2 (n2) is slow, 3 GB/s where a sound one has 10"
    ]
    assert judge(links({(0, 3): "time-out"}), [], NAMES) == [
        "the link between node 0 (n0) and node 3 (n3) is dead: time-out"
    ]
    slow_node = links({(0, 2): 3.0, (1, 2): 2.0, (2, 3): 4.0})
    assert judge(slow_node, [], NAMES) == [
        "node 2 (n2) is slow to all others: at most 4 GB/s, where a sound link has 10 GB/s"
    ]
    dead_node = links({(0, 2): "x", (1, 2): "x", (2, 3): "x"})
    assert judge(dead_node, [], NAMES) == ["node 2 (n2) reaches no other node, where a sound link has 10 GB/s"]
    assert judge(links({}, nodes=3), [3], NAMES) == ["node 3 (n3) does not answer"]
    inside = [Measured((node, node), 1.0 if node == 1 else 100.0) for node in range(3)]
    assert judge(inside, [], NAMES) == ["the link inside node 1 (n1) is slow, 1 GB/s where a sound one has 100"]


def preflight(hosts: Hosts, folder: Path, absent: int | None = None, per_host: int = 1) -> dict[str, Any]:
    """Run it with ranks on every host but ``absent``; return its JSON object."""
    logs, count = [], len(hosts.addresses)
    # A busy machine makes any link several times slower for a moment; the limited one is a hundred times slower.
    options = ["--pair-timeout", "10", "--join-timeout", "60", "--size-mb", "0.5", "--slow-below", "0.05"]
    options += ["--json", "--output", str(folder / "net.json")]
    for rank in range(count * per_host):
        host = rank // per_host
        if host == absent:
            continue
        logs.append(folder / f"{rank}.log")
        place = {"RANK": rank, "WORLD_SIZE": count * per_host, "LOCAL_RANK": rank % per_host}
        hosts.start(
            host,
            [sys.executable, "-m", "fusiontree.preflight", *options],
            logs[-1],
            PYTHONPATH=str(ROOT),
            MASTER_ADDR=hosts.addresses[0],
            MASTER_PORT="29600",
            LOCAL_WORLD_SIZE=str(per_host),
            **{key: str(value) for key, value in place.items()},
        )
    codes = [process.wait(timeout=280) for process in hosts.started]
    assert (folder / "net.json").exists(), "\n".join(map(read, logs))
    result = json.loads((folder / "net.json").read_text())
    assert json.loads(read(logs[0]).splitlines()[-1]) == result
    assert codes[0] == (1 if result["problems"] else 0), read(logs[0])
    return result


@pytest.mark.parametrize("fault", ["none", "absent", "parted", "slow"])
@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"hosts of their own cannot be made here: no {', '.join(MISSING)}")
def test_hosts_with_one_fault(fault: str, tmp_path: Path) -> None:
    with Hosts(2 if fault == "none" else 4) as hosts:
        if fault == "parted":
            hosts.part(1, 3)
        elif fault == "slow":
            hosts.slow(2, megabit_per_s=8)
        found = preflight(
            hosts, tmp_path, absent=3 if fault == "absent" else None, per_host=2 if fault == "none" else 1
        )
    problems = found["problems"]
    if fault == "none":  # two hosts with two ranks each: inside and between
        assert problems == []
        assert [tuple(link["pair"]) for link in found["links"]] == [(0, 0), (1, 1), (0, 1)]
        assert all(link["all_reduce_gb_per_s"] > 0 and link["all_gather_gb_per_s"] > 0 for link in found["links"])
    elif fault == "absent":
        assert problems == ["node 3 (never came) does not answer"]
        assert len(found["links"]) == 3
    elif fault == "parted":
        (problem,) = problems
        assert problem.startswith("the link between node 1 (host-1) and node 3 (host-3) is dead")
    else:
        (problem,) = problems
        assert problem.startswith("node 2 (host-2) is slow to all others")
