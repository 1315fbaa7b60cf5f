"""Loss by tokens of context, bytes of tokens, and the picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.data.batch import IGNORED, MicroBatch
from fusiontree.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, train_bpe
from fusiontree.evaluation.config import EvaluationConfig
from fusiontree.evaluation.plots import check_plot, plot_results
from fusiontree.evaluation.scorer import ModelScorer
from fusiontree.evaluation.scoring import score_positions
from fusiontree.evaluation.tasks import Setup, run_tasks
from fusiontree.evaluation.text_bytes import ByteCount
from fusiontree.utils.errors import UserError
from tests.data.test_tokenizer_files import byte_level
from tests.helpers import tiny_model

TEXT = "Zwei Wörter, 世界 und\n\tmehr  davon: é 😀 "


class Counting(ModelScorer):
    """Gives each label the loss that the test chooses: tokens of its document before it."""

    def __init__(self) -> None:
        self.dp_rank, self.dp_size, self.layout = 0, 1, None

    def score(self, micro: MicroBatch) -> Any:
        from fusiontree.ops.cross_entropy import TokenScores

        nats_BS = (micro.positions_BS + 1).float().masked_fill(micro.labels_BS == IGNORED, 0)
        return TokenScores(-nats_BS, nats_BS < 0)


def test_buckets_hold_powers_of_two_of_the_documents_own_tokens() -> None:
    positions = torch.tensor([[*range(5), *range(11)], list(range(16)), list(range(16))])
    labels = torch.zeros(3, 16, dtype=torch.int64)
    labels[0, 4] = IGNORED  # the next token begins another document
    batch = MicroBatch(
        labels, labels, positions, torch.tensor([0, 1, -1]), torch.tensor([1.0, 1.0, 0.0]), torch.zeros(3)
    )
    table = score_positions(Counting(), [batch], 2, 16)
    assert table.shape == (2, 5, 2)
    assert table[1, :, 1].tolist() == [1, 2, 4, 8, 1]
    assert table[1, :, 0].tolist() == [1, 2 + 3, 4 + 5 + 6 + 7, sum(range(8, 16)), 16]
    assert table[0, :, 1].tolist() == [2, 4, 1 + 4, 4, 0]  # 4 labels of the first document, 11 of the second
    assert table[0, :, 0].tolist() == [2, 10, 4 + 22, 8 + 9 + 10 + 11, 0]


def setup_of(place: Path, **settings: Any) -> Setup:
    model = tiny_model(vocab_size=264)
    config = EvaluationConfig.model_validate({"text": [str(place)], "batch_size": 3} | settings)
    return Setup(model.config, ByteTokenizer(), config, 16, ModelScorer(model), {})


def test_positions_of_a_file_add_up_to_its_loss(tmp_path: Path) -> None:
    place = tmp_path / "text.txt"
    place.write_bytes(TEXT.encode() * 3)
    results = run_tasks(setup_of(place, tasks=["text", "positions"], stride=16))
    (whole,), buckets = results["text"], results["positions"]
    assert [(r["from"], r["to"]) for r in buckets] == [(1, 1), (2, 3), (4, 7), (8, 15), (16, 16)]
    assert sum(r["tokens"] for r in buckets) == whole["tokens"]
    nats = sum(r["tokens"] * r["nats_per_token"] for r in buckets)
    assert nats / whole["tokens"] == pytest.approx(whole["nats_per_token"], rel=1e-9)
    assert all(0 < r["standard_error"] < 3 for r in buckets)


def test_the_standard_error_is_that_of_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / "text.txt"
    place.write_bytes(b"x" * 33)
    table = torch.tensor([[[3.0, 2.0]], [[9.0, 2.0]]], dtype=torch.float64)
    monkeypatch.setattr("fusiontree.evaluation.corpus_tasks.score_positions", lambda *a: table)
    (record,) = run_tasks(setup_of(place, tasks=["positions"]))["positions"]
    assert record["nats_per_token"] == 3.0
    assert record["standard_error"] == pytest.approx(math.sqrt(2 * 3.0**2) / 4)


def test_positions_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task positions needs text"):
        run_tasks(setup_of(tmp_path, tasks=["positions"], text=[]))


def test_bytes_of_byte_level_tokens_are_exact_even_in_the_middle_of_characters(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    train_bpe([TEXT * 4], 290, path)
    for tokenizer in (ByteTokenizer(), HuggingFaceTokenizer(path)):
        tokens = tokenizer.encode(TEXT)
        count = ByteCount(tokenizer)
        assert (count.source, count.is_exact) == ("tokens", True)
        assert count.count([*tokens, tokenizer.eos_id, *tokens]) == 2 * len(TEXT.encode())
        assert all(count.count(tokens[:n]) + count.count(tokens[n:]) == len(TEXT.encode()) for n in range(len(tokens)))
        assert count.count([tokenizer.info.vocab_size + 3]) == 0  # padding of the model's vocabulary


def test_added_tokens_count_their_own_text(tmp_path: Path) -> None:
    from tokenizers import AddedToken

    path = byte_level(tmp_path / "t.json", lambda t: t.add_tokens([AddedToken("é→", special=False)]))
    tokenizer = HuggingFaceTokenizer(path)
    assert ByteCount(tokenizer).count(tokenizer.encode("aé→b")) == len("aé→b".encode())


def test_a_tokenizer_that_changes_text_says_that_its_bytes_are_unknown(tmp_path: Path) -> None:
    from tokenizers import decoders, normalizers

    path = byte_level(tmp_path / "lower.json", lambda t: setattr(t, "normalizer", normalizers.Lowercase()))
    count = ByteCount(HuggingFaceTokenizer(path))
    assert (count.source, count.count([1, 2, 3])) == ("unknown", 0)
    fused = byte_level(
        tmp_path / "fused.json",
        lambda t: setattr(t, "decoder", decoders.Sequence([decoders.ByteLevel(), decoders.Fuse()])),
    )
    tokenizer = HuggingFaceTokenizer(fused)
    count = ByteCount(tokenizer)
    assert count.source == "decoded"
    assert count.count(tokenizer.encode(TEXT)) == len(TEXT.encode())


def test_the_picture_has_a_panel_per_kind_of_curve(tmp_path: Path) -> None:
    place = tmp_path / "text.txt"
    place.write_bytes(TEXT.encode() * 9)
    setup = setup_of(place, tasks=["text", "positions", "copy", "needle"], lengths=[20, 40], rows=2)
    results = run_tasks(setup)
    sizes = {}
    for name, tasks in {"both": list(results), "one": ["text", "positions"], "copy": ["copy"]}.items():
        check_plot(tasks)
        plot_results({task: results[task] for task in tasks}, tmp_path / f"{name}.png")
        header = (tmp_path / f"{name}.png").read_bytes()[:24]
        assert header[1:4] == b"PNG"
        sizes[name] = int.from_bytes(header[16:20], "big")
    assert sizes["both"] == 2 * sizes["one"] == 2 * sizes["copy"]
    with pytest.raises(UserError, match="nothing to draw of text, perplexity"):
        check_plot(["text", "perplexity"])
