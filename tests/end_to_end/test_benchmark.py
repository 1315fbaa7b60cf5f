"""The benchmark as a user calls it, on packed documents and a CPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusiontree import benchmark
from fusiontree.benchmarking import others, peers
from fusiontree.cli import benchmark_options
from fusiontree.config.load import load_config
from fusiontree.data.loader import TrainingData
from fusiontree.models.flops import training_flops_per_token
from fusiontree.utils.errors import UserError
from tests.end_to_end.runs import write_config


@pytest.fixture
def config(data: Path, tmp_path: Path) -> str:
    return str(write_config(tmp_path, data))


def lengths_of_rows(path: str, steps: int, *overrides: str) -> list[int]:
    """Tokens of the documents in the rows that ``steps`` steps after one of warm-up read, counted one by one."""
    config = load_config(path, overrides)
    training = config.training.model_copy(update={"curriculum": None})
    data = TrainingData(config.data, training, config.model.vocab_size)
    lengths: list[int] = []
    stream = data.steps()
    for step in range(1 + steps):
        for micro in next(stream)[0].micro_batches:
            for position in micro.positions_BS[micro.row_weight_B > 0].flatten().tolist():
                if step == 0:
                    continue
                if position == 0:
                    lengths.append(0)
                lengths[-1] += 1
    stream.close()
    return lengths


def test_packed_rows_and_whole_rows(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = {}
    for name, options in (("packed", []), ("whole", ["--one-document"])):
        assert benchmark.main(["--config", config, "--steps", "2", "--warmup", "1", *options]) == 0
        printed = capsys.readouterr().out
        assert ("of all tokens" in printed) == (name == "packed")
        results[name] = json.loads(printed.splitlines()[-1])
    model = load_config(config, []).model
    lengths = lengths_of_rows(config, steps=2)
    packed, whole = results["packed"], results["whole"]
    groups = packed["document_histogram"]
    assert sum(group["documents"] for group in groups) == len(lengths) > 16
    assert [group["documents"] for group in groups if group["at_least"] == 32] == [
        sum(32 <= length < 64 for length in lengths)
    ]
    assert sum(group["token_share"] for group in groups) == pytest.approx(1)
    assert packed["documents_per_row"] == pytest.approx(len(lengths) / 16)
    assert packed["model_flops_per_token"] == training_flops_per_token(model, lengths) < whole["model_flops_per_token"]
    assert whole["model_flops_per_token"] == training_flops_per_token(model, 64)
    assert whole["documents_per_row"] == 1


def test_rows_that_only_fill_the_last_pass_are_not_counted(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    override = "training.micro_batch_size=3"  # eight rows in three passes
    assert benchmark.main(["--config", config, "--steps", "1", "--warmup", "1", override]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    lengths = lengths_of_rows(config, 1, override)
    assert sum(lengths) == 8 * 64
    assert sum(group["documents"] for group in result["document_histogram"]) == len(lengths)
    assert result["documents_per_row"] == pytest.approx(len(lengths) / 8)


SYNTHETIC = "data.train=[{path: synthetic, type: synthetic, weight: 1, options: {vocab_size: 264}}]"


def test_no_dataset_is_needed(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The table and the JSON object say that the tokens are synthetic."""
    words = ["--config", config, "--steps", "1", "--warmup", "1", SYNTHETIC, "training.seq_len=1024"]
    documents = []
    for options in (["--one-document"], []):
        assert benchmark.main([*words, "model.max_position_embeddings=1024", *options]) == 0
        printed = capsys.readouterr().out
        result = json.loads(printed.splitlines()[-1])
        assert result["data"] == ["synthetic tokens (vocabulary 264, seed 0)"]
        assert f"  data          {result['data'][0]}\n" in printed
        documents.append(result["documents_per_row"])
    assert documents[0] == 1 < documents[1]


def test_the_step_is_printed_before_operations_are_timed(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operations compile for minutes: a time limit meanwhile does not take the step's figures."""

    def time_operations(*_: object) -> None:
        assert "useful work" in capsys.readouterr().out
        raise UserError("the time is over")

    monkeypatch.setattr("fusiontree.benchmarking.operations.time_operations", time_operations)
    assert benchmark.main(["--config", config, "--steps", "1", "--warmup", "1", "--ops"]) == 2


SIZES = "model.letter_sizes={F: {mlp_size: 16}}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--decode", "4"], "one GPU"),
        (["--decode", "0"], "--decode 0"),
        (["--peers", "falcon"], "one GPU"),
        (["--peers", "falcom"], "did you mean 'falcon'"),
        (["--ops", SIZES], "--ops: its layers have one size, and model.letter_sizes"),
        (["--peers", "falcon", SIZES], "--peers falcon: its layers have one size"),
        (["--profile", "trace.json"], "--profile"),
        (["--steps", "0"], "--steps 0"),
        (["--warmup", "1", "training.activation_checkpointing=auto"], "--warmup 1 must be at least 2"),
        (["training.seqlen=64"], "seq_len"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_step(
    config: str, options: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "run", lambda *_: pytest.fail("steps were taken"))
    assert benchmark.main(["--config", config, *options]) == 2
    assert words in capsys.readouterr().err


def test_decoding_beyond_a_learned_table_is_refused(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusiontree.utils.device.choose_device", lambda *_: torch.device("cuda"))
    args = benchmark_options.build_parser().parse_args(["--config", config, "--decode", "10"])
    benchmark_options.check_options(load_config(config, []), args)
    with pytest.raises(UserError, match="max_position_embeddings=64"):
        benchmark_options.check_options(load_config(config, ["model.srte_encoding=learnable"]), args)


def test_the_step_that_is_recorded_is_not_timed(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusiontree.utils.device.choose_device", lambda *_: torch.device("cuda"))
    args = benchmark_options.build_parser().parse_args(["--config", config, "--warmup", "2"])
    benchmark_options.check_options(load_config(config, ["training.cuda_graphs=off"]), args)
    with pytest.raises(UserError, match="--warmup 2 must be at least 3"):
        benchmark_options.check_options(load_config(config, []), args)


def test_the_peer_needs_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "fusiontree[hf]" in peers.falcon_missing()


def test_llama_trains_beside_ours(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By the same trainer, on the documents of our steps; the names of peers end where a setting begins."""
    sizes = ["model.hidden_size=64", "model.gate_rank=32", "model.mamba.head_dim=32", "model.num_layers=6"]
    words = ["--config", config, "--steps", "1", "--warmup", "1", "--peers", "llama", *sizes]
    assert benchmark.main(words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    llama = result["others"]["llama"]
    assert result["overrides"] == sizes and list(result["others"]) == ["llama"]
    assert llama["parameters"] == pytest.approx(result["parameters"], rel=0.02)
    assert llama["documents_per_row"] == result["documents_per_row"] > 1
    assert llama["tokens_per_s_per_gpu"] > 0 and 4 < llama["loss"] < 7
    speeds = result["tokens_per_s_per_gpu"] / llama["tokens_per_s_per_gpu"]
    assert llama["ours_over_peer_tokens"] == pytest.approx(speeds)


def test_settings_may_stand_between_options(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(benchmark, "run", lambda config, args: seen.append(config) or {})
    words = ["training.seed=5", "--config", config, "training.seq_len=32", "--steps", "1", "model.window_size=4"]
    assert benchmark.main(words) == 0
    training = seen[0].training
    assert (training.seed, training.seq_len, seen[0].model.window_size) == (5, 32, 4)


def test_a_peer_that_does_not_fit_leaves_the_other_figures(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(peers, "train_falcon", too_large)
    monkeypatch.setattr(peers, "decode_ours", lambda *_, **__: {"tokens_per_s": 3.0})
    monkeypatch.setattr(peers, "decode_falcon", lambda *_, **__: {"tokens_per_s": 1.0})
    micro = SimpleNamespace(input_ids_BS=torch.zeros(2, 8, dtype=torch.int64), labels_BS=None)
    args = argparse.Namespace(peers=["falcon"], decode=4, steps=1, warmup=1)
    wanted = others.falcon_and_decoding(load_config(config, []), args, micro, None, torch.device("cpu"))
    found = others.time_others(wanted, {})
    assert "out of memory" in found["falcon_h1"]["error"]
    assert (found["decode"], found["falcon_h1_decode"]) == ({"tokens_per_s": 3.0}, {"tokens_per_s": 1.0})
