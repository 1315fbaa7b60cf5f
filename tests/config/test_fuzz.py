"""Mutated configurations and environments: each is read, or refused with an error for a person; never a traceback."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path
from typing import Any

import pytest

from fusiontree.config.load import config_values, dump_config, load_config
from fusiontree.utils.environment import meeting_point, process_place, slurm_job
from fusiontree.utils.errors import UserError
from tests.config.test_load import BASE

TOKENS = [
    *("&a ", "*a", "<<: ", "{", "}", "[", "]", ": ", ", ", "- ", "'", '"', "\n", "\t", "#", "!!int ", "? ", "|\n", "%"),
    *(
        ".inf",
        "-.nan",
        "1e999",
        "0x1F",
        "010",
        "1:30",
        "9" * 25,
        "-1",
        "0",
        "null",
        "true",
        "off",
        "2024-01-01",
        "~",
        "$X",
    ),
    *("\0", "\x85", "\u2028", "\ufeff", "é", "\\", "training", "learning_rate", "run_dir", "data", "train", "weight"),
]
VARIABLES = [
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"),
    *("SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"),
    *("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_SIZE", "PMI_RANK"),
]
VALUES = ["", " ", "0", "1", "2", "8", "-1", "x", "4(x2),3", "4(x2", "1.5", "65536", "29500", "::1", "[::1]", "٣"]


def mutated(text: str, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        how = rng.randrange(5)
        if how == 0:
            text = text[:place] + rng.choice(TOKENS) + text[place:]
        elif how == 1:
            text = text[:place] + text[min(end, place + 12) :]
        elif how == 2:
            text = text[:place] + text[place:end] + text[place:]
        elif how == 3:
            words = text.split(" ")
            words[rng.randrange(len(words))] = rng.choice(TOKENS)
            text = " ".join(words)
        else:
            text = text.replace(rng.choice("0123456789"), rng.choice(TOKENS), 1)
    content = bytearray(text.encode("utf-8", errors="surrogatepass"))
    if content and rng.random() < 0.1:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def all_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(all_finite, value.values()))
    if isinstance(value, list):
        return all(map(all_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 16))])
def test_mutated_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("X", raising=False)
    rng = random.Random(seed)
    for _ in range(60):
        Path("run.yaml").write_bytes(mutated(BASE, rng))
        overrides = [mutated("training.learning_rate=1e-3", rng).decode(errors="replace")] * rng.randrange(2)
        try:
            config = load_config("run.yaml", overrides)
        except UserError as error:
            assert str(error).strip()
            continue
        assert all_finite(config_values(config))
        Path("again.yaml").write_text(dump_config(config), encoding="utf-8")
        assert load_config("again.yaml") == config


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_mutated_environments(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        with monkeypatch.context() as patch:
            for name in [
                name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "MPI_"))
            ] + VARIABLES:
                patch.delenv(name, raising=False)
            for name in rng.sample(VARIABLES, rng.randint(0, 8)):
                patch.setenv(name, rng.choice(VALUES))
            try:
                place = process_place()
                meeting_point()
                slurm_job()
            except UserError:
                continue
            assert 0 <= place.rank < place.world_size
            assert 0 <= place.local_rank < place.local_world_size <= place.world_size
