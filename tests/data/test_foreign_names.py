"""Names and values from a dataset.json or tokenizer_info.json are checked, and copies never overwrite."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fusiontree.data.format import DatasetInfo, TokenizerInfo, read_dataset, write_dataset
from fusiontree.data.tokenizers import ByteTokenizer, load_tokenizer, save_tokenizer, train_bpe
from fusiontree.utils.errors import UserError
from tests.data.datasets import documents, write

INFO = TokenizerInfo("huggingface", "t", 300, 0, "a" * 64, "tokenizer.json")


@pytest.mark.parametrize(
    "change",
    [
        {"file": "state.json"},
        {"file": "config.yaml"},
        {"file": "tokenizer_info.json"},
        {"file": "../tokenizer.json"},
        {"file": "/etc/passwd"},
        {"file": ""},
        {"file": None},
        {"file": ["tokenizer.json"]},
        {"kind": "pickle"},
        {"eos_id": 300},
        {"eos_id": -1},
        {"eos_id": True},
        {"eos_id": 1.0},
        {"vocab_size": 1 << 40},
        {"vocab_size": "300"},
        {"sha256": "A" * 64},
        {"name": 5},
    ],
)
def test_impossible_tokenizers_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """In a dataset, in a run or checkpoint, and by what writes into them."""
    info = replace(INFO, **change)
    folder = write(tmp_path / "d", [documents(3, 0)])
    written = read_dataset(folder)
    write_dataset(folder, DatasetInfo(info, written.dtype, written.shards))
    with pytest.raises(UserError, match=r"dataset.json describes an impossible tokenizer"):
        read_dataset(folder)
    run = tmp_path / "run"
    run.mkdir()
    (run / "state.json").write_text("precious")
    (run / "config.yaml").write_text("precious")
    with pytest.raises(UserError, match="describes an impossible tokenizer"):
        save_tokenizer(info, folder, run)
    assert sorted(p.name for p in run.iterdir()) == ["config.yaml", "state.json"]
    assert {p.read_text() for p in run.iterdir()} == {"precious"}
    (run / "tokenizer_info.json").write_text(json.dumps(asdict(info)))
    with pytest.raises(UserError, match=r"tokenizer_info.json' describes an impossible tokenizer"):
        load_tokenizer(run)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"kind": "byte"}', b'{"nosuch": 1}', b"null"])
def test_a_damaged_description_is_one_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer_info.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer_info.json' cannot be read"):
        load_tokenizer(tmp_path)


def test_copies_never_overwrite(tmp_path: Path) -> None:
    train_bpe(["some words"], 260, tmp_path / "tokenizer.json")
    run = tmp_path / "run"
    run.mkdir()
    assert [p.name for p in save_tokenizer(INFO, tmp_path, run)] == ["tokenizer_info.json", "tokenizer.json"]
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir()}
    save_tokenizer(INFO, tmp_path, run)
    save_tokenizer(replace(INFO, name="renamed"), tmp_path, run)  # a resume on a copy of the dataset
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir()} == before
    for info in (replace(INFO, eos_id=1), replace(INFO, sha256="b" * 64), ByteTokenizer.info):
        with pytest.raises(UserError, match=r"tokenizer_info.json' belongs to another tokenizer"):
            save_tokenizer(info, tmp_path, run)
    train_bpe(["other words"], 270, tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer.json' belongs to another tokenizer"):
        save_tokenizer(INFO, tmp_path, run)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir()} == before
