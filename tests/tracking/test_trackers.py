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

from fusiontree.config.plugins import load_plugins
from fusiontree.tracking import tracker, wandb_tracker
from fusiontree.tracking.config import LoggingConfig
from fusiontree.tracking.records import Records, read_records
from fusiontree.tracking.tensorboard_tracker import TensorboardTracker
from fusiontree.tracking.tracker_process import flatten, follow
from fusiontree.tracking.wandb_tracker import WandbTracker, unreachable
from fusiontree.utils.errors import UserError


def wandb_config(mode: str) -> LoggingConfig:
    return LoggingConfig.model_validate({"trackers": ["wandb"], "wandb": {"mode": mode}})


OFFLINE = wandb_config("offline")


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
    records.open_trackers(OFFLINE, tmp_path / "run", {}, after_step=2)
    for step in range(1, 7):
        records.metrics({"step": step, "loss": 1.0})
    records.close()
    assert sent(tmp_path) == [3, 4, 5, 6]
    assert events(tmp_path) == []


def test_a_tracker_that_hangs_is_ended_in_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, records: Records
) -> None:
    fake_wandb(monkeypatch, tmp_path, "time.sleep(1000)")
    records.open_trackers(OFFLINE, tmp_path / "run", {}, after_step=0)
    began = time.monotonic()
    for step in range(1, 200):
        records.metrics({"step": step, "loss": 1.0})
    assert time.monotonic() - began < 5
    records.close(patience_s=1.0)
    assert time.monotonic() - began < 10
    assert events(tmp_path) == ["wandb_failed"]
    assert len(read_records(tmp_path / "run" / "metrics.jsonl")) == 199


def test_a_tracker_that_fails_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, records: Records) -> None:
    fake_wandb(monkeypatch, tmp_path, "raise OSError('no licence')")
    records.open_trackers(OFFLINE, tmp_path / "run", {}, after_step=0)
    deadline = time.monotonic() + 60
    step = 0
    while not events(tmp_path) and time.monotonic() < deadline:
        step += 1
        records.metrics({"step": step, "loss": 1.0})
        time.sleep(0.05)
    records.metrics({"step": step + 1, "loss": 1.0})
    records.close()
    assert events(tmp_path) == ["wandb_failed"]
    assert "no licence" in (tmp_path / "run" / "tracker-wandb.log").read_text()


@pytest.mark.parametrize("kind", ["closed", "silent"])
def test_an_unreachable_server_means_offline_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, records: Records, closed_port: int, silent_port: int, kind: str
) -> None:
    fake_wandb(monkeypatch, tmp_path, "assert options['mode'] == 'offline'")
    monkeypatch.setattr(wandb_tracker, "REACH_S", 1.0)
    port = closed_port if kind == "closed" else silent_port
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    began = time.monotonic()
    records.open_trackers(wandb_config("online"), tmp_path / "run", {}, after_step=0)
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


def test_all_records_of_a_step_are_sent_once(tmp_path: Path) -> None:
    """A step's own metrics, its validation and its evaluation; those of the checkpoint's step were sent before."""
    path = tmp_path / "metrics.jsonl"
    lines = follow(path, after_step=1)

    def new() -> list[str]:
        return [min(record) for record in iter(lambda: next(lines), None)]

    of_step = ['"loss": 1.0', '"evaluation_s": 0.1', '"validation_loss": 2.0']
    text = "".join(f'{{"step": {step}, {values}}}\n' for step in (1, 2) for values in of_step)
    path.write_text(text)
    assert new() == ["loss", "evaluation_s", "step"]  # the smallest name of each record
    back = tmp_path / "new"
    back.write_text(text + '{"step": 3, "evaluation_s": 0.2}\n')
    back.replace(path)
    assert new() == ["evaluation_s"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'fusiontree\[wandb\]'"):
        WandbTracker.prepare(OFFLINE, tmp_path, {})
    with pytest.raises(UserError, match=r"pip install 'fusiontree\[tensorboard\]'"):
        TensorboardTracker.prepare(LoggingConfig(trackers=["tensorboard"]), tmp_path, {})


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
    records.open_trackers(wandb_config("online"), tmp_path / "run", {"model": {"hidden_size": 32}}, after_step=0)
    for step in (1, 2, 3):
        records.metrics({"step": step, "train_speed": 4.0 / step})
    records.close(patience_s=120)
    assert events(tmp_path) == ["wandb_offline"], (tmp_path / "run" / "tracker-wandb.log").read_text()
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert b"train_speed" in file.read_bytes()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read an event folder with TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


@pytest.mark.slow
def test_the_real_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    run.mkdir()
    config = LoggingConfig(trackers=["tensorboard"])
    records = Records(run, enabled=True)
    records.open_trackers(config, run, {"model": {"hidden_size": 32}}, after_step=0)
    for step in range(1, 6):
        records.metrics({"step": step, "loss": 1.0, "gates": {"mean": [0.5]}, "tokens_hash": "ab", "mfu": None})
    records.close(patience_s=120)
    assert [step for step, _ in scalars(run / "tensorboard")["loss"]] == [1, 2, 3, 4, 5]

    resumed = Records(run, enabled=True)
    resumed.truncate_metrics(3)
    resumed.open_trackers(config, run, {}, after_step=3)
    for step in (4, 5, 6):
        resumed.metrics({"step": step, "loss": 2.0, "gates": {"mean": [0.25]}})
        resumed.metrics({"step": step, "validation_loss": 3.0})
    resumed.close(patience_s=120)
    assert events(tmp_path) == [], (run / "tracker-tensorboard.log").read_text()
    found = scalars(run / "tensorboard")
    assert found["loss"] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    assert found["gates/mean/0"][-1] == (6, 0.25)
    assert [step for step, _ in found["validation_loss"]] == [4, 5, 6]
    assert "tokens_hash" not in found


def test_a_plugin_adds_a_tracker(tmp_path: Path, records: Records) -> None:
    """Its module is a file outside the path, which the tracker's process imports as well."""
    plugin = tmp_path / "lines.py"
    plugin.write_text(
        "from fusiontree.tracking.tracker import TRACKERS, TrackerStart\n"
        "class Lines:\n"
        "    def __init__(self, options, after_step):\n"
        "        self.file = open(options['file'], 'w')\n"
        "    @classmethod\n"
        "    def prepare(cls, config, run_dir, values):\n"
        "        return TrackerStart({'file': str(run_dir / config.options['lines']['name'])})\n"
        "    def log(self, values, step):\n"
        "        self.file.write(f\"{step} {values['gates/mean/0']}\\n\")\n"
        "    def close(self):\n"
        "        self.file.close()\n"
        "TRACKERS.register('lines', Lines)\n"
    )
    load_plugins([str(plugin)])
    config = LoggingConfig(trackers=["lines"], options={"lines": {"name": "out.txt"}})
    records.open_trackers(config, tmp_path / "run", {}, after_step=0)
    records.metrics({"step": 1, "gates": {"mean": [0.5]}})
    records.close()
    assert events(tmp_path) == []
    assert (tmp_path / "run" / "out.txt").read_text() == "1 0.5\n"


@pytest.mark.parametrize(
    ("given", "trackers", "mode"),
    [
        ({}, [], "online"),
        ({"wandb": {"mode": "offline"}}, ["wandb"], "offline"),
        ({"wandb": {"mode": "disabled", "project": "p"}}, [], "online"),
        ({"trackers": ["wandb", "tensorboard"], "wandb": {"mode": "disabled"}}, ["tensorboard"], "online"),
        ({"trackers": ["tensorboard"], "wandb": {"mode": "offline"}}, ["tensorboard"], "offline"),
        ({"trackers": ["wandb"]}, ["wandb"], "online"),
    ],
)
def test_the_former_mode_selects_wandb(given: dict, trackers: list[str], mode: str) -> None:
    config = LoggingConfig.model_validate(given)
    assert (config.trackers, config.wandb.mode) == (trackers, mode)
    assert LoggingConfig.model_validate(config.model_dump()) == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trackers": ["tensorbord"]}, "did you mean 'tensorboard'"),
        ({"trackers": ["wandb", "wandb"]}, "lists wandb twice"),
        ({"options": {"aim": {}}}, "aim is not in logging.trackers"),
    ],
)
def test_wrong_trackers_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoggingConfig.model_validate(given)
