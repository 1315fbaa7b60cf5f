"""Trains a small byte model twice, undisturbed and killed many times; writes the losses for make.py.

    python docs/images/killed_run.py --out DIR

The second run's processes receive SIGKILL at a random step once a new checkpoint is complete. The same command then
starts them again on another number of ranks, until the run is finished. Writes docs/images/data/killed_run.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from random import Random
from typing import Any

from fusiontree.tracking.records import read_records

HERE = Path(__file__).parent
STEPS, SAVE_INTERVAL, KILLS, SEED = 320, 16, 14, 0
RANKS = (1, 2)
SETTINGS = (
    *("model.hidden_size=96", "model.num_layers=2", "model.gate_rank=16", "model.window_size=32"),
    *("training.seq_len=128", f"training.max_steps={STEPS}", "training.validation.interval=0", "training.device=cpu"),
    *("supervision.restart_backoff_s=0", "supervision.health_check=off", "data.validation=null"),
    *(f"checkpoint.save_interval={SAVE_INTERVAL}", "logging.log_interval=1"),
)


def launch(run_dir: Path, data: Path, ranks: int) -> subprocess.Popen[bytes]:
    """Start training in ``run_dir``, with its output in a file beside it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command += ["fusiontree.train", "--config", "quickstart", f"run_dir={run_dir}", f"data.train={data}", *SETTINGS]
    with run_dir.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def last_step(run_dir: Path) -> int:
    """Return the newest step in metrics.jsonl."""
    records = read_records(run_dir / "metrics.jsonl")
    return records[-1]["step"] if records else 0


def saves(run_dir: Path) -> int:
    """Return the number of checkpoints that were completed so far."""
    return sum(event["event"] == "save" for event in read_records(run_dir / "events.jsonl"))


def run_undisturbed(run_dir: Path, data: Path) -> None:
    """Train to the end on two ranks."""
    assert launch(run_dir, data, 2).wait() == 0, f"see {run_dir.with_suffix('.log')}"


def run_killed(run_dir: Path, data: Path, random: Random) -> list[int]:
    """Train to the end through ``KILLS`` kills; return the last logged step before each."""
    kills: list[int] = []
    while True:
        process = launch(run_dir, data, RANKS[len(kills) % len(RANKS)])
        if len(kills) == KILLS:
            assert process.wait() == 0, f"see {run_dir.with_suffix('.log')}"
            return kills
        begun, target = saves(run_dir), last_step(run_dir) + random.randint(2, SAVE_INTERVAL + 6)
        while saves(run_dir) == begun or last_step(run_dir) < target:
            assert process.poll() is None, f"ended by itself; see {run_dir.with_suffix('.log')}"
            time.sleep(0.05)
        kills.append(last_step(run_dir))
        for rank in children(process.pid):
            os.kill(rank, signal.SIGKILL)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def children(pid: int) -> list[int]:
    """Return the processes that ``pid`` started: torchrun gives each rank a session of its own."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def losses(path: Path) -> list[tuple[int, float]]:
    """Return each logged step with its loss."""
    return [(record["step"], record["lm_loss"]) for record in read_records(path) if "lm_loss" in record]


def main() -> None:
    """Build data, run both, write the file."""
    parser = argparse.ArgumentParser(description="Train undisturbed and killed many times; write the losses.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for data and runs; new")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True)
    sources = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
    build = [sys.executable, "-m", "fusiontree.cli", "data", "build", "--input", str(sources), "--include", "*.py"]
    subprocess.run([*build, "--tokenizer", "byte", "--output", str(out / "data")], check=True)
    undisturbed, killed = out / "undisturbed", out / "killed"
    run_undisturbed(undisturbed, out / "data")
    kills = run_killed(killed, out / "data", Random(SEED))
    values: dict[str, Any] = {
        "command": "python docs/images/killed_run.py --out DIR",
        "kills": kills,
        "undisturbed": losses(undisturbed / "metrics.jsonl"),
        "killed": losses(killed / "metrics.jsonl"),
        "discarded": losses(killed / "metrics.discarded.jsonl"),
    }
    pairs = list(zip(values["undisturbed"], values["killed"], strict=True))
    values["largest_relative_difference"] = max(abs(b - a) / a for (_, a), (_, b) in pairs)
    for name in ("undisturbed", "killed", "discarded"):
        values[name] = [[step, round(loss, 5)] for step, loss in values[name]]
    text = json.dumps(values).replace("], [", "],\n[")
    (HERE / "data").mkdir(exist_ok=True)
    (HERE / "data" / "killed_run.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
