"""Every layout computes the same model."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

from fusiontree.checkpoint.load import load_model
from tests.end_to_end.runs import CONFIG, ROOT, build_data, environment, metrics
from tests.parallel.table import ALL, FAST, MODEL, NOISE, REFERENCE, TOLERANCE, TRAINING, Cell

pytestmark = [pytest.mark.xdist_group("parity"), pytest.mark.timeout(1800)]


class Table:
    """Runs cells, several of one size in one start of processes, and keeps their run folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        data = build_data(folder)
        values = {**CONFIG, "model": MODEL, "training": TRAINING, "checkpoint": {"save_interval": 0}}
        values["data"] = {"train": str(data / "train"), "validation": str(data / "validation")}
        self.config = folder / "config.yaml"
        self.config.write_text(yaml.safe_dump(values))

    def run(self, cells: list[Cell], mutation: str | None = None) -> None:
        """Train the cells, which are of one number of ranks, under a mutation; cells that are there are not run."""
        jobs = [(str(self.run_dir(c, mutation)), c.overrides(), mutation) for c in cells]
        jobs = [job for job in jobs if not Path(job[0]).exists()]
        if not jobs:
            return
        ranks = cells[0].ranks
        command = [sys.executable, "-m", "tests.parallel.worker", str(self.config), json.dumps(jobs)]
        command.append(",".join(map(str, free_ports(len(jobs)))))
        place = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        place["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        with ExitStack() as stack:
            logs = [stack.enter_context(open(self.folder / f"rank{r}.log", "w+")) for r in range(ranks)]
            processes = [
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment() | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                for rank, log in enumerate(logs)
            ]
            try:
                wait_for_all(processes, timeout=120.0 * len(jobs))
            finally:
                for process in processes:
                    process.kill()
            failed = [rank for rank, process in enumerate(processes) if process.returncode]
            assert not failed, "".join(f"rank {r}:\n{_ends(Path(logs[r].name).read_text())}" for r in failed)

    def run_dir(self, cell: Cell, mutation: str | None = None) -> Path:
        """Where a cell's run is."""
        return self.folder / "runs" / (f"{mutation}-{cell.name}" if mutation else cell.name)

    def error(self, cell: Cell, mutation: str | None = None, against: Cell = REFERENCE) -> float:
        """Greatest relative difference of loss or gradient norm from the reference over all steps."""
        worst = 0.0
        for key in ("loss", "lm_loss", "grad_norm", "load_balance_loss", "entropy_loss", "validation_loss"):
            mine, theirs = metrics(self.run_dir(cell, mutation), key), metrics(self.run_dir(against), key)
            assert len(mine) == len(theirs)
            worst = max(worst, *(abs(a - b) / max(abs(b), 1e-3) for a, b in zip(mine, theirs, strict=True)))
        return worst


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for_all(processes: list[subprocess.Popen], timeout: float) -> None:
    """Wait until all have ended, or one has failed."""
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            time.sleep(2.0)  # the others may have something to say, too
            return
        assert time.monotonic() < end, f"not ended after {timeout:.0f} s"
        time.sleep(0.05)


def _ends(text: str) -> str:
    return text if len(text) < 9000 else text[:6000] + "\n…\n" + text[-3000:]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    table = Table(tmp_path_factory.mktemp("parity"))
    table.run([REFERENCE, NOISE])
    return table


def check(table: Table, cells: list[Cell]) -> None:
    reference = dict(load_model(table.run_dir(REFERENCE))[0].named_parameters())
    noise = table.error(NOISE)
    lines = [f"{'noise floor (other accumulation)':60s} {noise:.1e}"]
    wrong = []
    for cell in cells:
        error = table.error(cell)
        lines.append(f"{cell.name:60s} {error:.1e}")
        final = dict(load_model(table.run_dir(cell))[0].named_parameters())
        far = max(float((final[name] - p).abs().max()) for name, p in reference.items())
        if error > TOLERANCE or far > 1e-4:
            wrong.append(f"{cell.name}: error {error:.2e}, parameters {far:.2e} apart")
    print("\n" + "\n".join(lines))
    assert not wrong, "\n".join(wrong)


def test_the_layouts_of_the_fast_table_agree(table: Table) -> None:
    table.run(FAST)
    check(table, FAST)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", sorted({cell.ranks for cell in ALL}))
def test_every_layout_agrees(table: Table, ranks: int) -> None:
    cells = [cell for cell in ALL if cell.ranks == ranks]
    same = [c for c in cells if not any("tie_word" in e for e in c.extra)]
    table.run(cells)
    check(table, same)
