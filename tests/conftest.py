"""Fixtures of all tests, the shards of the slow suite, and the summary of GPU tests."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.sharding import parse_shard, shard_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow-shard", metavar="K/N", help="of the slow tests, run shard K (from 0) of N")


def pytest_configure(config: pytest.Config) -> None:
    shard = config.getoption("--slow-shard")
    try:
        config.stash[_SHARD] = parse_shard(shard) if shard else None
    except ValueError as error:
        raise pytest.UsageError(f"--slow-shard: {error}") from None


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist appends the group to each id
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (shard := config.stash[_SHARD]) is None:
        return
    index, count = shard
    kept = [i for i in items if i.get_closest_marker("slow") and shard_of(i.nodeid, count) == index]
    config.hook.pytest_deselected(items=[i for i in items if i not in set(kept)])
    items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say of the GPU tests how many ran, and how many were skipped for which reason."""
    reports = terminalreporter.stats
    ran = [r for kind in ("passed", "failed") for r in reports.get(kind, []) if _is_gpu_test(r)]
    skipped = Counter(
        str(r.longrepr[2]).removeprefix("Skipped: ") for r in reports.get("skipped", []) if _is_gpu_test(r)
    )
    if ran or skipped:
        terminalreporter.section("GPU tests")
        terminalreporter.write_line(f"{len(ran):5d} ran")
        for reason, count in skipped.most_common():
            terminalreporter.write_line(f"{count:5d} skipped: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Show why a GPU test failed at once: the time on a GPU may end before pytest's summary."""
    if report.failed and _is_gpu_test(report) and "PYTEST_XDIST_WORKER" not in os.environ:
        sys.__stderr__.write(f"\n{report.nodeid}\n{report.longreprtext[-3000:]}\n")
        sys.__stderr__.flush()


def _is_gpu_test(report: object) -> bool:
    return isinstance(report, pytest.TestReport) and "gpu" in report.keywords


@pytest.fixture(autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """Fail the test that leaves a process group behind, not those that find it there."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        pytest.fail("the test left a process group initialized")


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Matrix products in fp32 without TF32, which a GPU may have been told to use."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


_SHARD = pytest.StashKey[tuple[int, int] | None]()
