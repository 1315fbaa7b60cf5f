"""One validation dataset or several by name: forms of the setting, metrics, bits per byte."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fusiontree.data.config import DataConfig
from fusiontree.data.validation import ValidationData
from fusiontree.training.config import TrainingConfig
from fusiontree.utils.errors import UserError
from tests.data.batches import SEQ, open_data
from tests.data.datasets import documents, random_dataset, write


def config_of(validation: Any, train: str = "x", **more: Any) -> DataConfig:
    return DataConfig.model_validate({"train": train, "validation": validation, "num_workers": 0, **more})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {}),
        ("a", {"": ("a", "shards")}),
        ({"path": "a", "type": "megatron"}, {"": ("a", "megatron")}),
        ({"web": "a", "books": {"path": "b", "type": "uint16"}}, {"web": ("a", "shards"), "books": ("b", "uint16")}),
    ],
)
def test_the_forms_of_the_setting(given: Any, expected: dict[str, tuple[str, str]]) -> None:
    config = config_of(given)
    assert {name: (d.path, d.type) for name, d in config.validation_sets.items()} == expected
    again = DataConfig.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"web/a": "a"}, "validation set 'web/a': use letters"),
        ({"": "a"}, "validation set '': use letters"),
        ({"web": "x/"}, "validation 'x/' is trained on"),
        ({"web": {"pth": "a"}}, "path\n  Field required"),
        ({"web": "pipe:cat {name}"}, "runs a shell command"),
        (3, "valid string"),
    ],
)
def test_wrong_sets_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        config_of(given)
    forms = {part for problem in caught.value.errors() for part in problem["loc"] if part in ("<path>", "<named>")}
    assert len(forms) <= 1  # only the errors of the form that was meant


def open_sets(config: DataConfig, interval: int = 5) -> dict[str, ValidationData]:
    values = {"seq_len": SEQ, "max_steps": 10, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3}
    section = TrainingConfig.model_validate(values | {"validation": {"interval": interval}})
    return ValidationData.for_training(config, section, 264, 0, 1, open_data(config).sources)


def test_each_set_is_read_and_checked(tmp_path: Path) -> None:
    train, web, books = (random_dataset(tmp_path / name, seed=i) for i, name in enumerate(("train", "web", "books")))
    sets = open_sets(config_of({"web": str(web), "books": str(books)}, str(train)))
    assert [data.source.place for data in sets.values()] == [str(web), str(books)]
    first, second = (next(data.micro_batches()).input_ids_BS for data in sets.values())
    assert not first.equal(second)
    assert open_sets(config_of({"web": str(web)}, str(train)), interval=0) == {}
    copy = random_dataset(tmp_path / "copy", seed=0)
    with pytest.raises(UserError, match=f"'{copy}' holds the same documents as data.train"):
        open_sets(config_of({"web": str(web), "copy": str(copy)}, str(train)))


def test_bits_per_byte_need_the_bytes_of_the_text(tmp_path: Path) -> None:
    train = random_dataset(tmp_path / "train")
    without = write(tmp_path / "without", [documents(20, seed=3)])
    with_bytes = write(tmp_path / "with", [documents(20, seed=4)])
    values = json.loads((with_bytes / "dataset.json").read_text())
    values["statistics"]["bytes_per_token"] = 4.0
    (with_bytes / "dataset.json").write_text(json.dumps(values))
    sets = open_sets(config_of({"a": str(without), "b": str(with_bytes)}, str(train)))
    assert sets["a"].metrics("a", 2.0, 7) == {"validation_loss/a": 2.0, "validation_tokens/a": 7}
    assert sets["b"].metrics("", 2.0, 9) == {
        "validation_loss": 2.0,
        "validation_tokens": 9,
        "validation_bits_per_byte": pytest.approx(2.0 / math.log(2) / 4.0),
    }
