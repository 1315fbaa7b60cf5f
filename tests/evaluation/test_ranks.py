"""Evaluation by several processes gives the numbers of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusiontree.data.tokenizers import ByteTokenizer, save_tokenizer
from fusiontree.evaluate import main
from tests.data.datasets import write
from tests.helpers import save_checkpoint, tiny_model
from tests.parallel.launch import run_ranks

TASKS = ["perplexity", "text", "positions", "copy", "recall", "needle_text"]
SIZES = [
    "--lengths",
    "501",
    "--rows",
    "3",
    "--recall-pairs",
    "3",
    "--depths",
    "0.5",
    "--stride",
    "20",
    "--max-rows",
    "13",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    model = tiny_model(vocab_size=264, layer_pattern="FMA", max_position_embeddings=1024)
    texts = [f"document {number} says {'abc'[number % 3] * 40}.\n" for number in range(40)]
    tokens = [np.append(ByteTokenizer().encode_utf8([text.encode()])[0], 256) for text in texts]
    write(folder / "held_out", [tokens], ByteTokenizer.info)
    (folder / "text.txt").write_bytes("fünf Wörter über den\r\n Gate-Mix\r\n".encode() * 16)
    run = folder / "run"
    run.mkdir()
    values = {
        "model": model.config.model_dump(mode="json", by_alias=True),
        "training": {"seq_len": 33},  # divides by nothing
        "data": {"validation": str(folder / "held_out")},
    }
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    save_checkpoint(run / "checkpoints", 5, tensors, {"config": values}, save_tokenizer(ByteTokenizer.info, run, run))
    return folder


def options(place: Path, *more: str) -> list[str]:
    given = ["--checkpoint", str(place / "run"), "--device", "cpu", "--text", str(place / "text.txt"), "--json"]
    return [*given, *SIZES, "--tasks", *TASKS, *more]


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, Any]:
    assert main(options(place, "--output", str(place / "alone.json"))) == 0
    results: dict[str, Any] = json.loads((place / "alone.json").read_text())["results"]
    assert list(results) == TASKS
    return results


@pytest.mark.parametrize(
    ("ranks", "cp"), [(2, 2), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((2, 1), (4, 2)))]
)
def test_every_layout_gives_the_records_of_one_process(place: Path, alone: dict[str, Any], ranks: int, cp: int) -> None:
    output = place / f"ranks{ranks}cp{cp}.json"
    arguments = options(place, "--output", str(output), "--cp", str(cp), "--batch-size", "2")
    run_ranks(["-m", "fusiontree.evaluate", *arguments], ranks, place, timeout=170)
    values = json.loads(output.read_text())
    assert (values["processes"], values["cp"]) == (ranks, cp)
    for task, records in alone.items():
        assert len(values["results"][task]) == len(records)
        for record, expected in zip(values["results"][task], records, strict=True):
            assert record.keys() == expected.keys()
            for name, value in expected.items():
                wanted = value if isinstance(value, str) else pytest.approx(value, rel=1e-6)
                assert record[name] == wanted, (task, name)
    printed = [(place / f"rank{rank}.log").read_text().count("{") for rank in range(ranks)]
    assert printed[0] and not any(printed[1:])


def test_cp_without_processes_is_an_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(place, "--cp", "2")) == 2
    assert "--cp 2 does not divide 1 processes" in capsys.readouterr().err
