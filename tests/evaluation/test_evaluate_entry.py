"""``python -m fusiontree.evaluate`` as a person calls it, on a checkpoint and dataset of bytes."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fusiontree.cli.run_lm_eval import main as run_lm_eval
from fusiontree.data.config import DataConfig
from fusiontree.data.tokenizers import ByteTokenizer, save_tokenizer
from fusiontree.data.validation import ValidationData
from fusiontree.evaluate import main
from tests.data.datasets import write
from tests.helpers import save_checkpoint, tiny_model

SEQ_LEN = 32


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=264, layer_pattern="FA", srte_encoding="learnable")


@pytest.fixture(scope="module")
def place(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    texts = [f"document {number} says {'abc'[number % 3] * 20}." for number in range(12)]
    shards = [[np.append(tokens, 256) for tokens in ByteTokenizer().encode_utf8([text.encode() for text in texts])]]
    write(folder / "held_out", shards, ByteTokenizer.info)
    write(folder / "foreign", shards, replace(ByteTokenizer.info, name="other", sha256="0" * 64))
    (folder / "text.txt").write_bytes("fünf Wörter über den\r\n Gate-Mix\r ".encode() * 3)
    run = folder / "run"
    run.mkdir()
    values = {
        "model": model.config.model_dump(mode="json", by_alias=True),
        "training": {"seq_len": SEQ_LEN},
        "data": {"validation": str(folder / "held_out")},
        "evaluation": {"rows": 3},
    }
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    files = save_tokenizer(ByteTokenizer.info, run, run)
    save_checkpoint(run / "checkpoints", 5, tensors, {"config": values}, files)
    return folder


@pytest.fixture
def call(place, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        device = [] if "--device" in arguments else ["--device", "cpu"]
        code = main(["--checkpoint", str(place / "run"), *device, *arguments])
        return code, *capsys.readouterr()

    return run


def test_all_tasks_give_a_table_or_one_json_object(call, place, monkeypatch):
    tasks = ["--tasks", "perplexity", "text", "needle", "copy", "recall", "--text", str(place / "text.txt")]
    sizes = ["--lengths", "20", "40", "--depths", "0", "1", "--recall-pairs", "3", "--output", str(place / "out.json")]
    code, out, _ = call(*tasks, *sizes, "--json")
    assert code == 0
    values = json.loads(out)
    assert json.loads((place / "out.json").read_text()) == values
    results = values["results"]
    assert list(results) == ["perplexity", "text", "needle", "copy", "recall"]
    assert [(r["length"], r["depth"]) for r in results["needle"]] == [(20, 0.0), (20, 1.0), (40, 0.0), (40, 1.0)]
    assert [r["length"] for r in results["copy"]] == [r["length"] for r in results["recall"]] == [20, 40]
    assert {r["rows"] for task in ("needle", "copy", "recall") for r in results[task]} == {3}  # of the run's section
    assert results["copy"][0]["chance_nats_per_token"] == pytest.approx(math.log(256))
    text = results["text"][0]
    size = len((place / "text.txt").read_bytes())
    assert text["tokens"] == size - 1
    assert text["bits_per_byte"] == pytest.approx(text["nats_per_token"] / math.log(2))
    assert text["bits_per_token"] == pytest.approx(text["nats_per_token"] / math.log(2))
    _, out, shown = call(*tasks, *sizes)  # a pipe or a file: JSON for programs, the table for people
    assert json.loads(out)["results"] == results
    assert "{" not in shown
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    table = call(*tasks, *sizes)[1].splitlines()
    assert table[0] == "perplexity"
    assert "nats_per_token" in table[1] and "bits_per_byte" in table[1]
    assert not any(line.startswith("{") for line in table)
    assert "\n".join(table) in shown
    assert list(json.loads(call(*tasks, *sizes, "--json")[1])["results"]) == list(results)


def test_perplexity_is_the_loss_over_the_rows_of_the_held_out_split(call, place, model):
    results = json.loads(call("--batch-size", "3", "--json")[1])["results"]["perplexity"][0]
    data = ValidationData(
        DataConfig(train="x", validation=str(place / "held_out")),
        seq_len=SEQ_LEN,
        micro_batch_size=1,
        max_rows=0,
        vocab_size=264,
    )
    nats, tokens, letters = 0.0, 0, 0
    for batch in data.micro_batches():
        start = 0
        bounds = [*(batch.positions_BS[0] == 0).nonzero().flatten().tolist()[1:], SEQ_LEN]
        for end in bounds:
            with torch.no_grad():
                logits = model(batch.input_ids_BS[:, start:end]).logits_BSV[0]
            labels = batch.labels_BS[0, start:end]
            nats += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            tokens += int((labels >= 0).sum())
            letters += int(((labels >= 0) & (labels < 256)).sum())
            start = end
    assert results["rows"] == data.rows > 5
    assert results["tokens"] == tokens
    assert results["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert results["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
    assert results["bits_per_token"] == pytest.approx(nats / math.log(2) / tokens, rel=1e-5)
    assert letters < tokens  # ends of documents have no bytes
    assert results["bits_per_byte"] == pytest.approx(nats / math.log(2) / letters, rel=1e-5)
    some = json.loads(call("--max-rows", "2", "--json")[1])["results"]["perplexity"][0]
    assert some["rows"] == 2


def test_a_run_may_have_several_validation_sets(place, model, capsys):
    values = {"model": model.config.model_dump(mode="json", by_alias=True), "training": {"seq_len": SEQ_LEN}}
    values["data"] = {"validation": {"web": str(place / "held_out"), "code": str(place / "held_out")}}
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    run = place / "several"
    files = save_tokenizer(ByteTokenizer.info, place / "run", place / "run")
    run.mkdir()
    save_checkpoint(run / "checkpoints", 5, tensors, {"config": values}, files)
    assert main(["--checkpoint", str(run), "--device", "cpu", "--json"]) == 0
    web, code = json.loads(capsys.readouterr().out)["results"]["perplexity"]
    assert (web.pop("set"), code.pop("set")) == ("web", "code") and web == code and web["tokens"] > 100


def test_the_alphabet_may_be_what_the_dataset_holds(call):
    out = call("--tasks", "copy", "--alphabet", "data", "--json")[1]
    letters = set("".join(f"document {number} says abc." for number in range(12)).encode())
    assert json.loads(out)["results"]["copy"][0]["alphabet"] == len(letters)


def test_the_same_seed_gives_the_same_numbers_and_batches_do_not_matter(call):
    def results(*options: str) -> list[float]:
        values = json.loads(call("--json", "--tasks", "needle", "recall", "--recall-pairs", "2", *options)[1])
        return [record["nats_per_token"] for records in values["results"].values() for record in records]

    first = results()
    assert results("--batch-size", "1") == pytest.approx(first, rel=1e-5)
    assert results("--seed", "1") != pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--tasks", "copy", "needles"],
            "--tasks copy needles: unknown evaluation task 'needles'; did you mean 'needle'",
        ),
        (["--rows", "0"], "--rows 0: .*greater"),
        (["--batch-size", "0"], "--batch-size 0"),
        (["--tasks", "text"], "give --text FILE"),
        (["--tasks", "text", "--text", "no.txt"], "text file 'no.txt' cannot be read"),
        (["--tasks", "text", "--text", __file__, "--stride", "33"], "stride 33"),
        (["--tasks", "needle", "--lengths", "15", "8"], "row of 8 tokens"),
        (["--tasks", "needle", "--depths", "2"], "depth 2"),
        (["--tasks", "copy", "--lengths", "65"], "65 tokens.*max_position_embeddings 64"),
        (["--data", "PLACE/held_ou"], "held_ou' does not exist; did you mean 'held_out'"),
        (["--data", "PLACE/foreign"], "tokenizer 'other'.*trained with 'byte'"),
        (["--output", "no/folder/x.json"], "folder 'no/folder' does not exist"),
        (["--device", "tpu"], "device 'tpu'"),
        (["--num-fewshot", "0"], "--num-fewshot is for tasks of lm-evaluation-harness; give --lm-eval"),
        (["--include-path", "x"], "--include-path is for tasks"),
        (["--lm-eval", "hellaswag", "--seq-len", "8"], "--seq-len has no effect on the tasks of --lm-eval"),
    ],
)
def test_what_the_user_got_wrong_is_one_error_with_exit_code_2(call, place, arguments, message):
    code, out, err = call(*[argument.replace("PLACE", str(place)) for argument in arguments])
    assert (code, out) == (2, "")
    assert re.search(f"error: .*{message}", err.splitlines()[-1])


def test_a_check_reads_paths_as_the_evaluation_does(call, place, monkeypatch):
    monkeypatch.setenv("PLACE", str(place))
    assert call("--check", "--data", "$PLACE/held_out", "--text", "$PLACE/text.txt")[0] == 0
    assert call("--check", "--data", f"file://{place}/held_out")[0] == 0
    assert call("--check", "--data", "pipe:cat {name}")[0] == 0
    code, _, err = call("--check", "--data", "$PLACE/held_ou")
    assert code == 2 and f"--data {place}/held_ou: there is no such file or folder" in err


def test_a_result_is_written_whole_or_not_at_all(call, tmp_path, monkeypatch):
    """A study takes the file for a finished evaluation."""
    arguments = ("--tasks", "copy", "--lengths", "16", "--output", str(tmp_path / "x.json"))
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space left")))
        with pytest.raises(OSError, match="no space"):
            call(*arguments)
    assert not list(tmp_path.iterdir())
    code, out, _ = call(*arguments)
    assert code == 0 and json.loads((tmp_path / "x.json").read_text()) == json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("program", ["evaluate", "lm-eval"])
def test_without_the_harness_the_error_says_how_to_install_it(call, monkeypatch, capsys, program):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if program == "evaluate":
        code, _, err = call("--lm-eval", "hellaswag")
    else:
        code, err = run_lm_eval(["--tasks", "hellaswag"]), capsys.readouterr().err
    assert code == 2
    assert "lm-evaluation-harness is not installed; pip install 'fusiontree[lm-eval]'" in err


def test_the_harness_command_shows_its_help_without_the_harness(capsys):
    with pytest.raises(SystemExit) as ended:
        run_lm_eval(["--help"])
    assert not ended.value.code and "checkpoint=RUN" in capsys.readouterr().out


def test_a_mistyped_checkpoint_is_an_error(place, capsys):
    assert main(["--checkpoint", str(place / "rum")]) == 2
    assert "did you mean 'run'?" in capsys.readouterr().err


@pytest.mark.parametrize("stranger", [False, True])
def test_what_a_stored_configuration_lacks_is_an_error(model, tmp_path, capsys, stranger):
    """A model of a later version; a converted model, which does not say how it was trained."""
    values = {"model": model.config.model_dump(mode="json", by_alias=True)}
    if stranger:
        values["model"] |= {"of_a_later_version": True}
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    folder = tmp_path / "checkpoints" / "step-00000005"
    files = save_tokenizer(ByteTokenizer.info, tmp_path, tmp_path)
    save_checkpoint(folder.parent, 5, tensors, {"config": values}, files)
    assert main(["--checkpoint", str(tmp_path), "--device", "cpu", "--tasks", "copy"]) == 2
    message = f"error: {folder} does not say the length of the rows it was trained on; give --seq-len N"
    if stranger:
        message = f"error: the configuration of '{folder}' describes no model of this version (model.of_a_later_"
    assert message in capsys.readouterr().err
    if not stranger:
        assert main(["--checkpoint", str(tmp_path), "--device", "cpu", "--tasks", "copy", "--seq-len", "16"]) == 0


@pytest.mark.parametrize("arguments", [["--row", "3"], ["--alphabet", "latin"]])
def test_unknown_options_fail(call, arguments):
    with pytest.raises(SystemExit) as ended:
        call(*arguments)
    assert ended.value.code == 2
