"""The histogram of documents, and what the table shows of it."""

from __future__ import annotations

from typing import Any

import pytest

from fusiontree.benchmarking.table import length_histogram, print_table

RESULT: dict[str, Any] = {
    "device": "cpu",
    "world_size": 1,
    "torch": "2",
    "engine": "fsdp2",
    "parameters": 1_570_000_000,
    "seq_len": 64,
    "data": ["synthetic tokens (vocabulary 264, seed 0)"],
    "step_time_s": 0.5,
    "tokens_per_s_per_gpu": 128.0,
    "model_tflops_per_gpu": 0.25,
    "matmul_precision": "bf16",
    "mfu": None,
}


def test_histogram_counted_by_hand() -> None:
    groups = length_histogram([1, 2, 3, 4, 7, 8, 64, 64, 39])
    assert [(g["at_least"], g["below"], g["documents"]) for g in groups] == [
        (1, 2, 1),
        (2, 4, 2),
        (4, 8, 2),
        (8, 16, 1),
        (32, 64, 1),
        (64, 128, 2),
    ]
    assert [g["token_share"] * 192 for g in groups] == pytest.approx([1, 5, 11, 8, 39, 128])


def test_the_table_shows_packed_documents(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = [1, 63, 64, 40, 24]
    print_table(RESULT | {"documents_per_row": 5 / 3, "document_histogram": length_histogram(lengths)})
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["1", "1", "0.5%"] in lines
    assert ["16", "to", "31", "1", "12.5%"] in lines
    assert ["32", "to", "63", "2", "53.6%"] in lines
    assert ["64", "1", "33.3%"] in lines  # no document is longer than its row
    assert ["parameters", "1.57", "G"] in lines
    assert ["data", "synthetic", "tokens", "(vocabulary", "264,", "seed", "0)"] in lines
    assert ["useful", "work", "250", "GFLOP/s", "per", "process"] in lines


def test_one_document_a_row_needs_no_histogram(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(RESULT | {"documents_per_row": 1.0, "document_histogram": length_histogram([64, 64])})
    printed = capsys.readouterr().out
    assert "64 tokens, one document" in printed and "of all tokens" not in printed


def test_mfu_of_fp8_products_is_said_to_be_of_the_bf16_peak(capsys: pytest.CaptureFixture[str]) -> None:
    one_document = {"documents_per_row": 1.0, "document_histogram": length_histogram([64]), "mfu": 0.625}
    for precision, said in (("bf16", "62.5%\n"), ("fp8", "62.5% of the bf16 peak\n")):
        print_table(RESULT | one_document | {"matmul_precision": precision})
        assert f"MFU           {said}" in capsys.readouterr().out
