"""Records of tasks as measures of a run, and the check of its tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fusiontree.cli.task_evaluation import check_tasks
from fusiontree.config.load import load_config
from fusiontree.data.tokenizers import ByteTokenizer
from fusiontree.evaluation.in_training import measures
from fusiontree.utils.errors import UserError
from tests.data.datasets import write
from tests.end_to_end.runs import ROOT


def test_measures_are_means_and_the_values_of_cells() -> None:
    records = [
        {"length": 8, "depth": depth, "rows": 4, "found": found, "alphabet": 9, "chance_nats_per_token": 2.0}
        for depth, found in ((0.0, 1.0), (0.5, 0.5))
    ]
    assert measures(records) == {"found": 0.75, "found/depth_0.0": 1.0, "found/depth_0.5": 0.5}
    assert measures(records[:1]) == {"found": 1.0}


def test_cells_are_named_by_what_differs_and_not_by_sizes_of_the_input() -> None:
    records = [
        {"set": name, "data": f"/data/{name}/x", "rows": rows, "tokens": 9 * rows, "nats_per_token": 1.0 * rows}
        for name, rows in (("web", 1), ("books", 2))
    ]
    assert list(measures(records)) == ["nats_per_token", "nats_per_token/set_web", "nats_per_token/set_books"]
    files = [{"file": f"/texts/{name}", "nats_per_token": 1.0} for name in ("a.txt", "b.txt")]
    assert list(measures(files))[1:] == ["nats_per_token/file_a.txt", "nats_per_token/file_b.txt"]


def test_tasks_are_checked_before_the_run(tmp_path: Path) -> None:
    tokens = [np.append(ByteTokenizer().encode_utf8([b"some text"])[0], 256)]
    data = write(tmp_path / "train", [tokens], ByteTokenizer.info)
    overrides = [f"data.train={data}", f"run_dir={tmp_path / 'run'}", "evaluation.interval=5"]

    def check(*more: str) -> None:
        check_tasks(load_config(ROOT / "configs/quickstart.yaml", [*overrides, *more]))

    check()
    check("evaluation.interval=0", "evaluation.lengths=[4]")
    with pytest.raises(UserError, match="a row of 4 tokens holds no needle"):
        check("evaluation.lengths=[4]")
    with pytest.raises(UserError, match="unknown evaluation task 'needel'"):
        check("evaluation.training_tasks=[needel]")
