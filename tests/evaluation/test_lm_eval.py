"""lm-evaluation-harness on a checkpoint, beside its own adapter of Hugging Face models on the exported folder.

Skipped where lm_eval is not installed (``pip install 'fusiontree[lm-eval]'``).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm_eval is not installed")
pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="accelerate is not installed, which the harness's hf adapter needs")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from fusiontree.cli import main as fusiontree
from fusiontree.evaluate import main
from fusiontree.evaluation.lm_eval_model import FusionTreeLM
from tests.convert.checkpoints import convert, training_run
from tests.parallel.launch import run_ranks

WORDS = [
    ("The sun is", [" hot", " cold"], 0),
    ("Ice is", [" warm", " cold and wet"], 1),
    ("Two and two make", [" four", " nine"], 0),
    ("A bird can", [" fly", " bark"], 0),
    ("Question? Answer:", [" A", " B", " C"], 2),
]
CHOICE = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
metadata: {version: 1.0}
"""
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
fewshot_split: test
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}} {{choices[0]}}"
metric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]
""",
    "tiny_writing": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run, its export, and a folder of tasks on a local file."""
    folder = tmp_path_factory.mktemp("lm_eval")
    training_run(folder / "run", layer_pattern="FMA")
    convert(folder / "run", folder / "hf", "--to", "hf", "--check-logits", "off")
    (folder / "tasks").mkdir()
    lines = [json.dumps({"text": text, "choices": choices, "answer": answer}) for text, choices, answer in WORDS]
    (folder / "words.jsonl").write_text("\n".join(lines * 3) + "\n")
    for name, rest in {**TASKS, "absent": TASKS["tiny_choice"]}.items():
        file = folder / ("absent.jsonl" if name == "absent" else "words.jsonl")
        text = CHOICE.replace("NAME", name).replace("FILE", str(file)) + rest
        (folder / "tasks" / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def theirs(place):
    return get_model("hf")(
        pretrained=str(place / "hf"), trust_remote_code=True, device="cpu", dtype="float32", batch_size=3
    )


def ours(place, **changes: Any) -> FusionTreeLM:
    return FusionTreeLM(place / "run", **{"device": "cpu", "batch_size": 3, **changes})


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


PAIRS = [(text, choice) for text, choices, _ in WORDS for choice in choices]
PAIRS += [
    ("", "no context"),
    ("spaces at the end  ", "of a context"),
    ("long " * 30, "and cut"),
    ("w" * 100, "v" * 64),
]


@pytest.mark.parametrize("side", ["left", "right"])
def test_loglikelihoods_are_those_of_the_export_in_the_harness(place, theirs, side):
    requests = instances("loglikelihood", PAIRS)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours(place, padding_side=side).loglikelihood(requests)
    assert [f[0] for f in found] == pytest.approx([e[0] for e in expected], abs=1e-4)
    assert len({round(e[0], 3) for e in expected}) == len(PAIRS)  # so that an exchange would show


def test_log_probabilities_of_texts_are_those_of_the_export_in_the_harness(place, theirs):
    texts = [("short",), ("long " * 30,), ("exactly a row".ljust(64, "."),), ("one more".ljust(65, "."),), ("a",)]
    requests = instances("loglikelihood_rolling", texts)
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours(place).loglikelihood_rolling(requests) == pytest.approx(expected, abs=1e-4, rel=1e-6)


def test_greedy_texts_are_those_of_the_export_in_the_harness(place, theirs):
    contexts = [text for text, _, _ in WORDS] + ["long " * 30, "a"]
    arguments = [(context, {"until": ["e", "\n"], "max_gen_toks": 8, "do_sample": False}) for context in contexts]
    arguments += [(context, {"until": [], "max_gen_toks": 12}) for context in contexts]
    requests = instances("generate_until", arguments)
    texts = ours(place).generate_until(requests)
    assert texts == theirs.generate_until(requests, disable_tqdm=True)
    assert len(set(texts)) > len(contexts)


def evaluate(place: Path, capsys, tasks: str, *options: str) -> dict[str, Any]:
    arguments = ["--checkpoint", str(place / "run"), "--device", "cpu", "--lm-eval", tasks]
    code = main([*arguments, "--include-path", str(place / "tasks"), "--json", *options])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def test_tasks_on_a_local_file_have_the_exports_results(place, theirs, capsys):
    import lm_eval
    from lm_eval.tasks import TaskManager

    values = evaluate(place, capsys, ",".join(TASKS), "--batch-size", "2")
    manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    expected = lm_eval.simple_evaluate(theirs, tasks=list(TASKS), task_manager=manager, bootstrap_iters=100)
    found = {(r["task"], f"{r['metric']},{r['filter']}"): r["value"] for r in values["results"]["lm_eval"]}
    assert {task for task, _ in found} == set(TASKS)
    for (task, metric), value in found.items():
        assert value == pytest.approx(expected["results"][task][metric], rel=1e-5)
    assert values["settings"] == {"batch_size": 2, "seed": 0}
    few = evaluate(place, capsys, "tiny_choice", "--num-fewshot", "2", "--limit", "4")["results"]["lm_eval"]
    assert {record["shots"] for record in few} == {2}


def test_data_that_is_missing_is_one_error(place, capsys):
    arguments = ["--checkpoint", str(place / "run"), "--device", "cpu", "--include-path", str(place / "tasks")]
    assert main([*arguments, "--lm-eval", "absent"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match("error: the data of absent cannot be loaded.*absent.jsonl.*HF_HOME", error)


@pytest.mark.timeout(900)
@pytest.mark.slow  # the harness's list of its own tasks takes long
def test_an_unknown_task_is_one_error(place, capsys):
    arguments = ["--checkpoint", str(place / "run"), "--device", "cpu", "--include-path", str(place / "tasks")]
    assert main([*arguments, "--lm-eval", "tiny_choise"]) == 2
    assert "no task 'tiny_choise'; did you mean 'tiny_choice'" in capsys.readouterr().err


@pytest.mark.timeout(900)
@pytest.mark.slow  # as above
def test_the_harness_command_knows_the_model_type(place, capsys):
    words = ["--model_args", f"checkpoint={place / 'run'},dtype=float32", "--tasks", "tiny_choice"]
    words += ["--device", "cpu", "--batch_size", "2"]
    words += ["--include_path", str(place / "tasks"), "--output_path", str(place / "out")]
    assert fusiontree(["lm-eval", *words]) == 0
    assert "tiny_choice" in capsys.readouterr().out
    (file,) = (place / "out").rglob("results*.json")
    values = json.loads(file.read_text())
    assert values["config"]["model"] == "fusiontree"
    assert values["config"]["model_num_parameters"] > 1000
    assert sys.argv[0] != "lm_eval"


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_several_processes_share_the_requests(place, capsys, tmp_path):
    single = evaluate(place, capsys, ",".join(TASKS))
    arguments = ["-m", "fusiontree.evaluate", "--checkpoint", str(place / "run"), "--device", "cpu"]
    arguments += ["--lm-eval", ",".join(TASKS), "--include-path", str(place / "tasks")]
    run_ranks([*arguments, "--output", str(tmp_path / "out.json")], 2, tmp_path, timeout=300.0)
    several = json.loads((tmp_path / "out.json").read_text())
    assert several["processes"] == 2
    for left, right in zip(single["results"]["lm_eval"], several["results"]["lm_eval"], strict=True):
        assert left["task"] == right["task"] and left["metric"] == right["metric"]
        assert left["value"] == pytest.approx(right["value"], rel=1e-5)
