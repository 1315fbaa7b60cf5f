"""An evaluation task from a file outside the product: docs/extend/last_token.py."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fusiontree.config.plugins import load_plugins
from fusiontree.data.tokenizers import ByteTokenizer, save_tokenizer
from fusiontree.evaluate import main
from fusiontree.evaluation.config import TASKS, EvaluationConfig, TaskSpec
from fusiontree.evaluation.tasks import Setup, run_tasks
from fusiontree.utils.errors import UserError
from tests.end_to_end.runs import ROOT
from tests.evaluation.scorers import LogitsScorer, Uniform
from tests.helpers import save_checkpoint, tiny_config, tiny_model

PLUGIN = str(ROOT / "docs" / "extend" / "last_token.py")


class Repeats(LogitsScorer):
    """Predicts the token before."""

    def logits(self, text):
        import torch

        return torch.nn.functional.one_hot(torch.tensor(text), 256) * 20.0


def records(scorer, **settings):
    load_plugins([PLUGIN])
    config = EvaluationConfig.model_validate({"tasks": ["last_token"], "lengths": [3, 50], "rows": 5} | settings)
    return run_tasks(Setup(tiny_config(vocab_size=256), ByteTokenizer(), config, 8, scorer))["last_token"]


def test_a_scorer_that_knows_the_answer_and_one_that_knows_nothing() -> None:
    assert [(r["length"], r["token_accuracy"]) for r in records(Repeats())] == [(3, 1.0), (50, 1.0)]
    for record in records(Uniform(256)):
        assert record["token_accuracy"] == 0
        assert record["nats_per_token"] == pytest.approx(math.log(256)) == record["chance_nats_per_token"]
    with pytest.raises(UserError, match="rows of 1 tokens"):
        records(Uniform(256), lengths=[1])


def test_the_command_runs_it_on_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(vocab_size=264)
    values = {"model": model.config.model_dump(mode="json", by_alias=True), "training": {"seq_len": 16}}
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    files = save_tokenizer(ByteTokenizer.info, tmp_path, tmp_path)
    save_checkpoint(tmp_path / "checkpoints", 5, tensors, {"config": values}, files)
    given = ["--checkpoint", str(tmp_path), "--device", "cpu", "--json", "--plugin", PLUGIN, "--tasks", "last_token"]
    assert main(given) == 0
    (record,) = json.loads(capsys.readouterr().out)["results"]["last_token"]
    assert (record["length"], record["rows"]) == (16, 16)


def test_two_tasks_of_one_name_are_refused() -> None:
    load_plugins([PLUGIN])
    with pytest.raises(UserError, match="evaluation task 'last_token' is registered twice"):
        TASKS.register("last_token", TaskSpec("another", object))
