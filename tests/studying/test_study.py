"""Runs of a study side by side: what is started, skipped, resumed and reported."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fusiontree.study import _slots, build_parser
from fusiontree.studying.results import RESULTS, collect
from fusiontree.studying.runs import Run, plan_runs
from fusiontree.studying.workers import DONE, Workers
from fusiontree.supervision.run_lock import RUN_LOCK
from fusiontree.tracking.records import read_records
from fusiontree.utils.environment import name_of_gpu
from fusiontree.utils.errors import UserError
from tests.studying.test_runs import BASE, study

TRAIN = """
import json, pathlib, sys, time
folder, steps, fails, waits = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1", sys.argv[4] == "1"
folder.mkdir(parents=True, exist_ok=True)
with (folder / "metrics.jsonl").open("a") as file:
    for step in range(1, steps + 1):
        record = dict(step=step, tokens=256 * step, lm_loss=5.0 - 0.01 * step, tokens_per_s=100.0, step_time_s=0.1)
        file.write(json.dumps(record) + chr(10))
if waits:
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    print("ready", flush=True)
    time.sleep(60)
if fails:
    sys.exit("error: no such thing")
"""


class Stubs(Workers):
    """Workers whose runs only write metrics."""

    fails: tuple[str, ...] = ()
    waits = False
    evaluation_fails = False

    def command(self, run: Run, evaluates: bool) -> list[str]:
        if evaluates and self.evaluation_fails:
            return [sys.executable, "-c", "import sys; sys.exit('error: no memory')"]
        if evaluates:
            values = {"results": {"recall": [{"length": 64, "token_accuracy": 0.25}]}}
            code = f"open({str(self.folder / run.name / 'evaluation.json')!r}, 'w').write({json.dumps(values)!r})"
            return [sys.executable, "-c", code]
        flags = [str(int(run.arm in self.fails)), str(int(self.waits))]
        return [sys.executable, "-c", TRAIN, str(self.folder / run.name), str(run.steps), *flags]


def workers(
    folder: Path, said: list[str], time_limit_s: float | None = None, elsewhere: Any = (), **changes: Any
) -> Stubs:
    values = study(**changes)
    return Stubs(
        values,
        plan_runs(values),
        folder,
        2,
        gpus=0,
        only=lambda run: run.arm != "llama",
        time_limit_s=time_limit_s,
        say=said.append,
        elsewhere=elsewhere,
    )


def started(said: list[str]) -> list[str]:
    return sorted(line.split(":")[0] for line in said if ": started" in line or ": resumed" in line)


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    first = workers(tmp_path, said)
    first.fails = ("fused",)
    first.run_all()
    assert first.failed == {f"tiny/fused/seed-{seed}": "exit code 1: error: no such thing" for seed in (0, 3)}
    assert started(said) == [f"tiny/{arm}/seed-{seed}" for arm in ("fused", "mean") for seed in (0, 3)]
    assert all((tmp_path / f"tiny/mean/seed-{seed}" / DONE).is_file() for seed in (0, 3))

    said.clear()
    second = workers(tmp_path, said)
    second.run_all()
    assert started(said) == ["tiny/fused/seed-0", "tiny/fused/seed-3"]  # finished runs are not started again
    assert not second.failed
    results = collect(second.study, second.runs(), tmp_path, second.is_finished, second.failed)
    states = {run["name"]: run["state"] for run in results["runs"]}
    assert states["tiny/fused/seed-0"] == "finished" and states["tiny/llama/seed-0"] == "waiting"


def test_an_error_of_an_earlier_attempt_is_no_reason(tmp_path: Path) -> None:
    class Silent(Stubs):
        def command(self, run: Run, evaluates: bool) -> list[str]:
            return [sys.executable, "-c", "import os; os._exit(3)"]

    log = tmp_path / "tiny" / "mean" / "seed-0.log"
    log.parent.mkdir(parents=True)
    log.write_text("error: of an earlier attempt\n")
    values = study()
    only = {"only": lambda run: run.name == "tiny/mean/seed-0", "time_limit_s": None, "say": lambda line: None}
    failing = Silent(values, plan_runs(values), tmp_path, 1, gpus=0, **only)
    failing.run_all()
    assert failing.failed == {"tiny/mean/seed-0": "exit code 3: no output"}


def test_the_time_limit_stops_the_runs(tmp_path: Path) -> None:
    said: list[str] = []
    stopped = workers(tmp_path, said, time_limit_s=3.0)
    stopped.waits = True
    stopped.run_all()
    assert stopped.interrupted == 2 and not stopped.failed
    assert len(started(said)) == 2
    assert not any(stopped.is_finished(run) for run in stopped.runs())
    assert "the time limit is reached: 2 runs save a checkpoint and stop" in said


def test_a_signal_while_a_run_starts_stops_that_run_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusiontree.studying.workers._GRACE_S", 10.0)
    start = subprocess.Popen

    def signalled(*arguments: Any, **options: Any) -> Any:
        process = start(*arguments, **options)
        wait_for(lambda: any(b"ready" in log.read_bytes() for log in tmp_path.rglob("*.log")))
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(subprocess, "Popen", signalled)
    said: list[str] = []
    stopped = workers(tmp_path, said)
    stopped.waits = True
    stopped.run_all()
    assert len(started(said)) == 1 and "signal SIGTERM: 1 runs save a checkpoint and stop" in said
    assert stopped.interrupted == 1 and not stopped.failed
    assert time.monotonic() - stopped.began < 10  # after the grace period the run would be killed


def test_finished_runs_are_evaluated_and_rates_follow_the_search(tmp_path: Path) -> None:
    said: list[str] = []
    searching = workers(tmp_path, said, learning_rates=[1e-3, 2e-3], evaluate=["--tasks", "recall"])
    searching.run_all()
    assert started(said) == sorted(
        f"tiny/{arm}/{name}" for arm in ("fused", "mean") for name in ("lr-0.001-seed-0", "lr-0.002-seed-0", "seed-3")
    )
    results = collect(searching.study, searching.runs(), tmp_path, searching.is_finished, {})
    entry = next(run for run in results["runs"] if run["name"] == "tiny/mean/seed-3")
    assert entry["rate"] in (1e-3, 2e-3)
    assert entry["evaluation"] == {"recall": [{"length": 64, "token_accuracy": 0.25}]}
    assert len(json.dumps(results)) < 40_000
    searched = [run for run in results["runs"] if run["searched"] and run["arm"] != "llama"]
    assert [run["state"] for run in searched] == ["finished"] * 4
    evaluated = [run["rate"] for run in searched if "evaluation" in run]
    assert evaluated == [entry["rate"]] * 2  # both arms have the same losses
    said.clear()
    again = workers(tmp_path, said, learning_rates=[1e-3, 2e-3], evaluate=["--tasks", "recall"])
    again.run_all()
    assert not said


def test_a_trained_run_of_a_search_is_evaluated_once_its_rate_is_chosen(tmp_path: Path) -> None:
    settings = {"learning_rates": [1e-3, 2e-3], "evaluate": ["--tasks", "recall"]}
    said: list[str] = []
    first = workers(tmp_path, said, **settings)
    first.only = lambda run: run.name == "tiny/mean/lr-0.001-seed-0"
    first.run_all()
    assert len(said) == 2 and not list(tmp_path.rglob("evaluation.json"))
    second = workers(tmp_path, said, **settings)
    second.only = lambda run: run.searched and run.arm == "mean"
    second.run_all()  # equal losses: the lower rate
    assert [path.parent.name for path in tmp_path.rglob("evaluation.json")] == ["lr-0.001-seed-0"]


def test_a_failed_evaluation_does_not_change_the_chosen_rate(tmp_path: Path) -> None:
    settings = {"learning_rates": [1e-3, 2e-3], "evaluate": ["--tasks", "recall"]}
    said: list[str] = []
    first = workers(tmp_path, said, **settings)
    first.evaluation_fails = True
    first.only = lambda run: run.arm == "mean"
    first.run_all()
    assert set(first.failed) == {"tiny/mean/lr-0.001-seed-0", "tiny/mean/seed-3"}
    assert not [line for line in said if line.startswith("tiny/mean/lr-0.002-seed-0: evaluated")]
    assert next(run.rate for run in first.runs() if run.name == "tiny/mean/seed-3") == 1e-3
    second = workers(tmp_path, [], **settings)
    second.only = first.only
    second.run_all()
    found = sorted(path.parent.name for path in tmp_path.rglob("evaluation.json"))
    assert found == ["lr-0.001-seed-0", "seed-3"]


def test_a_rate_that_another_machine_decides_is_evaluated_where_it_was_trained(tmp_path: Path) -> None:
    settings = {"learning_rates": [1e-3, 2e-3], "evaluate": ["--tasks", "recall"]}
    entries: list[dict[str, Any]] = []
    for rate in ("0.001", "0.002"):
        name = f"tiny/mean/lr-{rate}-seed-0"
        machine = workers(tmp_path / rate, [], **settings)
        machine.only = lambda run, name=name: run.name == name
        machine.run_all()
        results = collect(machine.study, machine.runs(), machine.folder, machine.is_finished, {})["runs"]
        entries += [run for run in results if run["name"] == name]
    assert not list(tmp_path.rglob("evaluation.json"))
    for rate in ("0.002", "0.001"):  # the entries hold each machine's own run too, as those of --known may
        again = workers(tmp_path / rate, [], elsewhere=entries, **settings)
        again.only = lambda run: run.searched and run.arm == "mean"
        again.run_all()
    assert [path.parent.name for path in tmp_path.rglob("evaluation.json")] == ["lr-0.001-seed-0"]


def test_a_rate_that_diverges_is_not_chosen(tmp_path: Path) -> None:
    settings = {"learning_rates": [1e-3, 2e-3], "evaluate": []}
    first = workers(tmp_path, [], **settings)
    first.only = lambda run: run.searched and run.arm == "mean"
    first.run_all()
    records = tmp_path / "tiny/mean/lr-0.001-seed-0/metrics.jsonl"
    records.write_text(records.read_text().replace("lm_loss", "not finite"))
    second = workers(tmp_path, [], **settings)
    assert next(run.rate for run in second.runs() if run.name == "tiny/mean/seed-3") == 2e-3


def test_what_was_finished_on_another_machine_is_not_run_again_and_decides_rates(tmp_path: Path) -> None:
    rates = {"learning_rates": [1e-3, 2e-3], "evaluate": []}
    first = workers(tmp_path / "first", [], **rates)
    first.only = lambda run: run.searched and run.arm == "mean"
    first.run_all()
    results = collect(first.study, first.runs(), first.folder, first.is_finished, {})["runs"]
    for run in results:  # the losses decide, not the order
        run["final_loss"] = 1.0 if "lr-0.002" in run["name"] else 2.0
    said: list[str] = []
    second = workers(tmp_path / "second", said, elsewhere=results, **rates)
    second.only = lambda run: run.arm == "mean"
    second.run_all()
    assert started(said) == ["tiny/mean/seed-3"]
    assert next(run.rate for run in second.runs() if run.name == "tiny/mean/seed-3") == 2e-3
    changed = [{**run, "steps": run["steps"] + 1} for run in results]  # of another budget
    third = workers(tmp_path / "third", [], elsewhere=changed, **rates)
    assert not any(third.is_finished(run) for run in third.runs())


def test_runs_share_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert _slots(build_parser().parse_args(["--out", "x", "--per-gpu", "2"])) == (4, 2)
    with pytest.raises(UserError, match="--per-gpu 0: give at least 1"):
        _slots(build_parser().parse_args(["--out", "x", "--per-gpu", "0"]))
    placed: list[str] = []

    def start(command: list[str], env: dict[str, str], **_: Any) -> Any:
        placed.append(env["CUDA_VISIBLE_DEVICES"])
        return None

    sharing = workers(tmp_path, [])
    sharing.gpus, sharing.slots = 2, 4
    monkeypatch.setattr(subprocess, "Popen", start)
    sharing._start_jobs()
    assert placed == ["4", "6", "4", "6"]


def test_runs_are_placed_on_the_gpus_that_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    assert [name_of_gpu(0), name_of_gpu(1)] == ["4", "6"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert name_of_gpu(1) == "1"


def wait_for(condition: Any, limit_s: float = 400.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_study_goes_on_and_reports(tmp_path: Path) -> None:
    """Real training on CPUs: the study is killed, started again, and writes its report; a broken arm is named."""
    out, file = tmp_path / "out", tmp_path / "study.yaml"
    arms = {"fused": {}, "mean": BASE["arms"]["mean"], "broken": {"set": {"data.train": "nowhere"}}}
    file.write_text(yaml.safe_dump(BASE | {"arms": arms, "seeds": [0]}))
    command = [sys.executable, "-m", "fusiontree.study", str(file), "--out", str(out), "--processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = out / "tiny/fused/seed-0"
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        wait_for(lambda: any(r["step"] >= 10 for r in read_records(run / "metrics.jsonl")))
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: any(e["event"] == "interrupted" for e in read_records(run / "events.jsonl")))
    assert not (run / DONE).exists()
    other = run.parent.parent / "mean/seed-0"
    wait_for(lambda: read_records(other / "events.jsonl") and not (other / RUN_LOCK).exists())

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert again.returncode == 1, again.stdout + again.stderr
    assert "failed: tiny/broken/seed-0: exit code 2" in again.stderr
    assert "tiny/fused/seed-0: resumed after step" in again.stdout
    assert any(event["event"] == "resume" for event in read_records(run / "events.jsonl"))
    results = json.loads((out / RESULTS).read_text())
    assert {r["arm"]: r["state"] for r in results["runs"]} == {
        "fused": "finished",
        "mean": "finished",
        "broken": "failed",
    }
    report = (out / "report.md").read_text()
    assert "tiny/broken/seed-0: failed" in report and "final.png" in report
    assert (out / "loss_flops.png").is_file()
