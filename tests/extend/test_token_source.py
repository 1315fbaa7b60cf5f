"""A token source from a file outside the product: mixtures, exact resume on another number of ranks, its own errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fusiontree.config.plugins import load_plugins
from fusiontree.data.config import DataConfig
from fusiontree.data.sources.base import TOKEN_SOURCES, TokenSpan
from fusiontree.utils.errors import UserError
from tests.data.batches import global_batches, open_data
from tests.data.datasets import TOKENIZER, documents, write
from tests.end_to_end.runs import CONFIG, ROOT, metrics, train

PLUGIN = ROOT / "docs" / "extend" / "uint16_file.py"


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    load_plugins([str(PLUGIN)])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same documents as a uint16 file and as one token shard of the byte tokenizer."""
    base, docs = tmp_path_factory.mktemp("data"), documents(150, seed=5)
    np.concatenate(docs).astype("<u2").tofile(base / "tokens.bin")
    return base / "tokens.bin", write(base / "shards", [docs], _byte_tokenizer())


def _byte_tokenizer() -> Any:
    from fusiontree.data.tokenizers import ByteTokenizer

    assert ByteTokenizer.info.vocab_size == TOKENIZER.vocab_size
    return ByteTokenizer.info


def source(path: Path, weight: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"path": str(path), "weight": weight, **more}


def config_of(*sources: dict[str, Any], **more: Any) -> DataConfig:
    return DataConfig.model_validate({"train": list(sources), "num_workers": 0, **more})


def test_a_file_gives_the_batches_of_a_shard_with_its_documents(files: tuple[Path, Path]) -> None:
    """Tokens, labels, positions and their hashes: nothing but the place of the tokens differs."""
    file, shards = files
    from_file, _ = global_batches(config_of(source(file, type="uint16")), 40)
    from_shards, _ = global_batches(config_of(source(shards)), 40)
    assert from_file == from_shards


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.2, 0.8)])
def test_a_mixture_resumes_exactly_on_other_ranks(files: tuple[Path, Path], weights: tuple[float, float]) -> None:
    file, shards = files
    config = config_of(source(shards, weights[0]), source(file, weights[1], type="uint16"))
    whole, _ = global_batches(config, 24)
    first, state = global_batches(config, 9, size=1)
    second, state = global_batches(config, 8, 3, json.loads(json.dumps(state)))
    third, _ = global_batches(config, 7, 2, state)
    assert first + second + third == whole
    assert {s["path"] for s in state["sources"]} == {str(file), str(shards)}


def test_a_changed_file_does_not_resume(files: tuple[Path, Path], tmp_path: Path) -> None:
    config = config_of(source(files[0], type="uint16"))
    _, state = global_batches(config, 2)
    changed = np.fromfile(files[0], "<u2")
    changed[100] ^= 1
    changed.tofile(tmp_path / "tokens.bin")
    with pytest.raises(UserError, match="is another dataset or was rebuilt"):
        next(open_data(config_of(source(tmp_path / "tokens.bin", type="uint16"))).steps(state))
    moved = tmp_path / "moved.bin"
    moved.write_bytes(files[0].read_bytes())
    next(open_data(config_of(source(moved, type="uint16"))).steps(state))


def test_wrong_entries_are_refused_with_the_way_out(files: tuple[Path, Path]) -> None:
    def error(**more: Any) -> str:
        with pytest.raises(UserError) as caught:
            open_data(config_of(source(files[0], **more)))
        return str(caught.value)

    assert "unknown type of token source 'uint61'" in error(type="uint61")
    assert "uint16" in error(type="uint61") and "--plugin" in error(type="uint61")
    assert "known options: tokenizer" in error(type="uint16", options={"tokeniser": "byte"})
    assert "of type shards has no options" in error(options={"tokenizer": "byte"})
    with pytest.raises(UserError, match="is not a file with tokens"):
        open_data(config_of(source(files[1], type="uint16")))


def test_a_truncated_file_is_damage(files: tuple[Path, Path], tmp_path: Path) -> None:
    """``on_damage`` decides about the rows of every source."""
    copy = tmp_path / "tokens.bin"
    copy.write_bytes(files[0].read_bytes())
    data = open_data(config_of(source(copy, type="uint16"), on_damage="skip"))
    data.sources[0]._tokens = data.sources[0]._tokens[:60]  # type: ignore[attr-defined]
    batch, _ = next(data.steps())
    assert batch.skipped_rows and "truncated" in batch.damage[0]


@pytest.mark.parametrize(
    ("tokens", "starts"),
    [
        (np.zeros(16, np.uint16), np.zeros(0, np.int64)),  # a token too few
        (np.zeros(17, np.int64), np.zeros(0, np.int64)),  # signed
        (np.zeros(17, np.uint16), np.zeros(0, np.int32)),  # would change the hash
    ],
)
def test_a_source_that_breaks_the_interface_is_named(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tokens: np.ndarray, starts: np.ndarray
) -> None:
    data = open_data(config_of(source(files[0], type="uint16")))
    monkeypatch.setattr(type(data.sources[0]), "read", lambda *_: TokenSpan(tokens, starts))
    with pytest.raises(UserError, match=r"of type Uint16File returned .* tokens of shape \(17,\)"):
        next(data.steps())


def test_a_token_outside_the_vocabulary_is_located(files: tuple[Path, Path], tmp_path: Path) -> None:
    changed = np.fromfile(files[0], "<u2")
    changed[70] = 999
    changed.tofile(tmp_path / "wrong.bin")
    with pytest.raises(UserError, match=r"wrong\.bin, token 70, holds token 999"):
        global_batches(config_of(source(tmp_path / "wrong.bin", type="uint16")), 60)


def test_the_types_that_exist() -> None:
    assert TOKEN_SOURCES.names()[:3] == ["shards", "megatron", "synthetic"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 4.0)])
def test_training_resumes_on_another_number_of_ranks(
    files: tuple[Path, Path], tmp_path: Path, weights: tuple[float, float]
) -> None:
    """The real program; the plugin is named in the configuration alone."""
    file, shards = files
    data = {"train": [source(shards, weights[0]), source(file, weights[1], type="uint16")]}
    training = CONFIG["training"] | {"validation": {"interval": 0}, "max_steps": 6}
    values = CONFIG | {"run_dir": str(tmp_path / "run"), "plugins": [str(PLUGIN)], "data": data, "training": training}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    for overrides, processes in [(["training.exit_at_step=3"], 2), ([], 0)]:
        done = train(config, *overrides, processes=processes)
        assert done.returncode == 0, done.stderr
    kind = {"seq_len": 64, "global_batch_size": 8, "seed": 0}
    expected, _ = global_batches(DataConfig.model_validate(data), 6, **kind)
    assert metrics(tmp_path / "run", "tokens_hash") == [f"{batch.tokens_hash:08x}" for batch in expected]
