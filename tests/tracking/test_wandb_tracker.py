"""The tracker may hang, crash or find no server: training never waits for it."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusiontree.tracking import wandb_tracker
from fusiontree.tracking.config import WandbConfig
from fusiontree.tracking.records import Records, read_records
from fusiontree.tracking.wandb_tracker import WandbTracker, flatten, follow, unreachable
from fusiontree.utils.errors import UserError

OFFLINE = WandbConfig(mode="offline")


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        yield server.getsockname()[1]


def fake_wandb(monkeypatch: pytest.MonkeyPatch, folder: Path, init: str) -> None:
    """Put a package named wandb in the tracker's way; ``init`` is what its init does."""
    package = folder / "site" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "import json, os, pathlib, time\n"
        f"out = pathlib.Path({str(folder / 'sent.jsonl')!r})\n"
        "class Run:\n"
        "    def log(self, values, step):\n"
        "        with out.open('a') as file: file.write(json.dumps([step, values]) + '\\n')\n"
        "    def finish(self): pass\n"
        f"def init(**options):\n    {init}\n    return Run()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{package.parent}:{Path(wandb_tracker.__file__).parent.parent.parent}")
    monkeypatch.syspath_prepend(str(package.parent))


def sent(folder: Path) -> list[int]:
    path = folder / "sent.jsonl"
    return [json.loads(line)[0] for line in path.read_text().splitlines()] if path.exists() else []


def events(folder: Path) -> list[str]:
    return [e["event"] for e in read_records(folder / "run" / "events.jsonl")]


@pytest.fixture
def records(tmp_path: Path) -> Records:
    (tmp_path / "run").mkdir()
    return Records(tmp_path / "run", enabled=True)


def test_all_steps_arrive_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, records: Records) -> None:
    fake_wandb(monkeypatch, tmp_path, "pass")
    records.open_tracker(OFFLINE, tmp_path / "run", {}, after_step=2)
    for step in range(1, 7):
        records.metrics({"step": step, "loss": 1.0})
    records.close()
    assert sent(tmp_path) == [3, 4, 5, 6]
    assert events(tmp_path) == []


def test_a_mirror_that_hangs_is_ended_in_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, records: Records
) -> None:
    fake_wandb(monkeypatch, tmp_path, "time.sleep(1000)")
    records.open_tracker(OFFLINE, tmp_path / "run", {}, after_step=0)
    began = time.monotonic()
    for step in range(1, 200):
        records.metrics({"step": step, "loss": 1.0})
    assert time.monotonic() - began < 5
    records.close(patience_s=1.0)
    assert time.monotonic() - began < 10
    assert events(tmp_path) == ["wandb_failed"]
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 199


def test_a_mirror_that_fails_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, records: Records) -> None:
    fake_wandb(monkeypatch, tmp_path, "raise OSError('no licence')")
    records.open_tracker(OFFLINE, tmp_path / "run", {}, after_step=0)
    deadline = time.monotonic() + 60
    step = 0
    while not events(tmp_path) and time.monotonic() < deadline:
        step += 1
        records.metrics({"step": step, "loss": 1.0})
        time.sleep(0.05)
    records.metrics({"step": step + 1, "loss": 1.0})
    records.close()
    assert events(tmp_path) == ["wandb_failed"]
    assert "no licence" in (tmp_path / "run" / "wandb-mirror.log").read_text()


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_an_unreachable_server_means_offline_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, records: Records, closed_port: int, silent_port: int, kind: str
) -> None:
    fake_wandb(monkeypatch, tmp_path, "assert options['mode'] == 'offline'")
    monkeypatch.setattr(wandb_tracker, "_REACH_S", 1.0)
    port = closed_port if kind == "closed" else silent_port
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    began = time.monotonic()
    records.open_tracker(WandbConfig(mode="online"), tmp_path / "run", {}, after_step=0)
    assert time.monotonic() - began < 8
    records.metrics({"step": 1, "loss": 1.0})
    records.close()
    assert sent(tmp_path) == [1]
    (event,) = read_records(tmp_path / "run" / "events.jsonl")
    assert event["event"] == "wandb_offline"
    assert f"127.0.0.1:{port}" in event["reason"]


def test_any_answer_counts_as_reachable(closed_port: int) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)  # answers 501
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert unreachable(f"http://127.0.0.1:{server.server_port}", 5.0) is None
    server.shutdown()
    assert unreachable(f"http://127.0.0.1:{closed_port}", 5.0)
    assert unreachable("no address", 5.0)


def test_a_file_that_is_rewritten_is_followed_without_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = follow(path, after_step=0)

    def new() -> list[int]:
        return [record["step"] for record in iter(lambda: next(lines), None)]

    assert new() == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert new() == [1, 2]
    with path.open("a") as file:
        file.write('ep": 3}\n')
    assert new() == [3]
    back = tmp_path / "new"
    back.write_text('{"step": 1}\n{"step": 2}\n')
    back.replace(path)
    assert new() == []
    with path.open("a") as file:
        file.write('{"step": 3}\n{"step": 4}\n')
    assert new() == [4]


def test_without_wandb_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wandb_tracker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fusiontree\[wandb\]'"):
        WandbTracker.start(OFFLINE, tmp_path, {}, 0)
    assert WandbTracker.start(WandbConfig(mode="disabled"), tmp_path, {}, 0) is None


def test_names_are_joined() -> None:
    assert flatten({"a": 1, "gates": {"mean": [0.5, 0.25]}, "mfu": None}) == {
        "a": 1,
        "gates/mean/0": 0.5,
        "gates/mean/1": 0.25,
    }


def test_the_real_wandb_offline(tmp_path: Path, records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead server and the real client: its own files hold what was logged."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    records.open_tracker(WandbConfig(mode="online"), tmp_path / "run", {"model": {"hidden_size": 32}}, after_step=0)
    for step in (1, 2, 3):
        records.metrics({"step": step, "train_speed": 4.0 / step})
    records.close(patience_s=120)
    assert events(tmp_path) == ["wandb_offline"], (tmp_path / "run" / "wandb-mirror.log").read_text()
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"train_speed" in file.read_bytes()
