"""A tiny run of the real programs: a dataset, a configuration file, and the commands a user types."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from tests.tiny import tiny_section

ROOT = Path(__file__).resolve().parent.parent.parent

# Slow decay and a large initialisation make leaks of state or documents show in loss and gradient norm.
CONFIG = {
    "model": tiny_section(
        vocab_size=264,
        window_size=12,
        drop_branch_prob=0.2,
        load_balance_coeff=0.1,
        entropy_reg_coeff=0.05,
        z_loss_coeff=0.001,
        mamba={"d_state": 8, "chunk_size": 16},
    ),
    "training": {
        "seq_len": 64,
        "max_steps": 20,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "precision": "fp32",
        "device": "cpu",
        "learning_rate": 0.003,
        "warmup_steps": 4,
        "gate_margin": 0.0,
        "validation": {"interval": 10, "rows": 5},
    },
    "checkpoint": {"save_interval": 7},
    "logging": {"log_interval": 1},
}


def environment() -> dict[str, str]:
    """The environment of a user's shell: one thread per process, no launcher's variables."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("SLURM_")}
    return kept | {"OMP_NUM_THREADS": "1"}


def write_texts(folder: Path, count: int = 60) -> Path:
    """Write small text files with something to learn; documents of 5 to 300 bytes straddle rows and micro batches."""
    folder.mkdir(parents=True)
    for number in range(count):
        words = " ".join(f"{(number * 7 + i * i) % 23:x}" for i in range(3 + (number * 37) % 120))
        (folder / f"{number:03d}.txt").write_text(words)
    return folder


def build_data(folder: Path) -> Path:
    """Build train and validation shards with the tool; several shards each."""
    from tools.build_shards import main

    texts = write_texts(folder / "texts")
    output = folder / "data"
    options = ["--validation-fraction", "0.15", "--shard-mb", "0.003", "--processes", "1"]
    assert main(["--input", str(texts), "--output", str(output), *options]) == 0
    return output


def write_config(folder: Path, data: Path, name: str = "run") -> Path:
    """Write the configuration of a run in ``folder / name``."""
    values = CONFIG | {
        "run_dir": str(folder / name),
        "data": {"train": str(data / "train"), "validation": str(data / "validation")},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def train(config: Path, *overrides: str, processes: int = 0, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the training entry: plain python, or ``processes`` ranks under torchrun."""
    python = Path(sys.executable)
    torchrun = [str(python.parent / "torchrun"), "--standalone", f"--nproc-per-node={processes}"]
    launcher = [*torchrun, "-m", "fusiontree.train"] if processes else [str(python), "-m", "fusiontree.train"]
    command = [*launcher, "--config", str(config), *overrides]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout)


def metrics(run_dir: Path, key: str = "loss") -> list[float]:
    """One value per logged step."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record[key] for record in map(json.loads, lines) if key in record]


def events(run_dir: Path) -> list[str]:
    """Names of what happened, in order."""
    return [json.loads(line)["event"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
