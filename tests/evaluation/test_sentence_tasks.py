"""Retrieval in sentences: a reader of the text answers everything, a uniform model is at chance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, train_bpe
from fusiontree.evaluation.config import TASKS, EvaluationConfig
from fusiontree.evaluation.scorer import ModelScorer, Scorer
from fusiontree.evaluation.sentence_tasks import SentenceTask
from fusiontree.evaluation.sentences import Writer, encoder
from fusiontree.evaluation.tasks import Setup, run_tasks
from fusiontree.generation.decoding import generate
from fusiontree.generation.sampling import SamplingConfig
from fusiontree.utils.errors import UserError
from tests.evaluation.scorers import Reader, Uniform
from tests.helpers import tiny_config, tiny_model

BY_DEPTH = ["needle_single", "needle_multikey", "needle_text"]
SPREAD = ["needle_multivalue", "needle_multiquery", "variable_tracking", "common_words", "frequent_words"]
LENGTH = 1100
PROSE = Path(__file__).resolve().parent.parent.parent / "docs" / "data.md"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe([PROSE.read_text()], 700, path)
    return HuggingFaceTokenizer(path)


def set_up(tokenizer: Tokenizer, scorer: Scorer, **settings: Any) -> Setup:
    given = {"lengths": [LENGTH], "depths": [0.0, 0.6, 1.0], "rows": 2, "batch_size": 3, "text": [str(PROSE)]}
    model = tiny_config(vocab_size=tokenizer.info.vocab_size)
    return Setup(model, tokenizer, EvaluationConfig.model_validate(given | settings), LENGTH, scorer)


def text_of(task: str, setup: Setup, depth: float = 0.5, seed: int = 0, length: int = LENGTH) -> tuple[list[int], Any]:
    made = TASKS.get(task).load()
    assert isinstance(made, SentenceTask)
    row = made.row(setup, Writer(encoder(setup.tokenizer), seed), length, depth)
    return row.context, row.question


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_a_reader_answers_everything(bpe: Tokenizer, name: str) -> None:
    tokenizer = ByteTokenizer() if name == "byte" else bpe
    results = run_tasks(set_up(tokenizer, Reader(tokenizer), tasks=[*BY_DEPTH, *SPREAD]))
    assert list(results) == [*BY_DEPTH, *SPREAD]
    for task, records in results.items():
        assert len(records) == (3 if task in BY_DEPTH else 1)
        for record in records:
            assert (record["choice_accuracy"], record["exact_match"]) == (1.0, 1.0), (task, record)
            assert record["nats_per_token"] == pytest.approx(0.01)


@pytest.mark.parametrize("distractors", [0, 3, 4])
def test_a_uniform_model_is_at_the_chance_that_records_state(distractors: int) -> None:
    tokenizer = ByteTokenizer()
    for records in run_tasks(
        set_up(tokenizer, Uniform(256), tasks=[*BY_DEPTH, *SPREAD], distractors=distractors, depths=[0.5])
    ).values():
        for record in records:
            assert record["choice_accuracy"] == record["chance_choice_accuracy"] == 1 / (distractors + 1)
            assert record["exact_match"] == 0
            assert 0 < record["chance_exact_match"] < 0.02
            assert record["nats_per_token"] == pytest.approx(math.log(256)) == record["chance_nats_per_token"]


@pytest.mark.parametrize("task", [*BY_DEPTH, *SPREAD])
@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_rows_have_exactly_their_length_and_every_wrong_answer_its_form(bpe: Tokenizer, name: str, task: str) -> None:
    tokenizer = ByteTokenizer() if name == "byte" else bpe
    setup = set_up(tokenizer, Uniform(256))
    for length in (LENGTH, LENGTH + 1):
        context, question = text_of(task, setup, length=length)
        assert len(context) + question.length == length + 1
    answers = ["".join(tokenizer.decode(piece) for piece, _ in answer) for answer in question.answers]
    assert len(set(answers)) == len(answers) == 4
    if task != "needle_single":  # what wrong answers name is in the row too
        words = set(tokenizer.decode(context).replace(".", " ").split())
        for answer in question.answers[1:]:
            scored = "".join(tokenizer.decode(piece) for piece, is_scored in answer if is_scored)
            assert set(scored.replace(",", " ").split()) <= words
    again, _ = text_of(task, setup, length=length)
    other, _ = text_of(task, setup, seed=1, length=length)
    assert again == context != other


@pytest.mark.parametrize("task", BY_DEPTH)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_needle_lies_at_its_depth_between_sentences(task: str, depth: float) -> None:
    tokenizer = ByteTokenizer()
    context, question = text_of(task, set_up(tokenizer, Uniform(256)), depth)
    text = tokenizer.decode(context)
    needle = tokenizer.decode([*question.prompt, *question.answers[0][0][0]])
    assert text.count(needle) == 1
    before, after = text.split(needle)
    others = 3 * (len(needle) + 2) if task != "needle_single" else 0  # needles that may stand before or after
    line = 90 if task == "needle_single" else 400  # docs/data.md has long lines
    assert abs(len(before) - depth * (len(before) + len(after))) <= others + line
    assert after.startswith(".\n")
    if depth == 0 and task == "needle_single":
        assert before == ""
    if depth == 1 and task != "needle_multikey":
        assert after == ".\n"
    if depth < 1 or task != "needle_text":  # the text ends in the middle of a line
        assert before == "" or before[-1] in ".\n"


def test_the_haystack_of_needle_text_is_the_text(bpe: Tokenizer) -> None:
    for tokenizer in (ByteTokenizer(), bpe):
        context, _ = text_of("needle_text", set_up(tokenizer, Uniform(256)))
        lines = [line for line in tokenizer.decode(context).split("\n") if line and not line.startswith("The code of")]
        prose = PROSE.read_text()
        assert len(lines) > 3 and all(line in prose for line in lines)


def test_the_right_answer_is_not_always_in_the_same_place_of_the_row() -> None:
    tokenizer = ByteTokenizer()
    setup = set_up(tokenizer, Uniform(256))
    first = set()
    for seed in range(12):
        context, question = text_of("needle_multiquery", setup, seed=seed)
        text = tokenizer.decode(context)
        keys = [part.split()[0] for part in text.split("The code of ")[1:]]
        first.add(keys.index(tokenizer.decode(question.prompt).split()[3]))
    assert first == {0, 1, 2, 3}


def test_exact_match_is_what_greedy_decoding_writes() -> None:
    tokenizer = ByteTokenizer()
    model = tiny_model(vocab_size=264, max_position_embeddings=512).eval()
    never = tokenizer.unknown_ids(264)
    setup = set_up(tokenizer, ModelScorer(model, never), lengths=[300], depths=[0.5], tasks=["needle_single"])
    task = TASKS.get("needle_single").load()
    assert isinstance(task, SentenceTask)
    row = task.row(setup, Writer(encoder(tokenizer), "x"), 300, 0.5)
    prompt = [*row.context, *row.question.prompt]
    options = {"max_new_tokens": 3, "sampling": SamplingConfig(greedy=True)}
    written = tuple(generate(model, [prompt], never=never, **options).rows[0].tokens)
    wrong = (*written[:2], (written[2] + 1) % 256)

    class Fixed(SentenceTask):
        name = "fixed"

        def row(self, setup: Setup, writer: Writer, length: int, depth: float) -> Any:
            return row._replace(question=type(row.question)(row.question.prompt, [[(self.answer, True)]]))

    for answer, expected in ((written, 1.0), (wrong, 0.0)):
        Fixed.answer = answer
        (record,) = Fixed().run(set_up(tokenizer, setup.scorer, distractors=0, rows=1))
        assert record["exact_match"] == expected
        logits = model(torch.tensor([[*prompt, *answer[:-1]]])).logits_BSV[0, -3:].detach().log_softmax(-1)
        nats = -float(logits.gather(1, torch.tensor(answer)[:, None]).mean())
        assert record["nats_per_token"] == pytest.approx(nats, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tasks": ["needle_single"], "lengths": [50]},
            "row of 50 tokens does not hold the sentences of task needle",
        ),
        ({"tasks": ["variable_tracking"], "lengths": [200]}, "row of 200 tokens"),
        (
            {"tasks": ["common_words"], "lengths": [70]},
            "row of 70 tokens is too short for the list of task common",
        ),
        ({"tasks": ["common_words"], "lengths": [45]}, "row of 45 tokens is too short"),
        ({"tasks": ["common_words"], "lengths": [45], "distractors": 0}, "row of 45 tokens is too short"),
        ({"tasks": ["frequent_words"], "lengths": [130]}, "row of 130 tokens is too short"),
        ({"tasks": ["needle_text"], "lengths": [100_000]}, "text to hide needles in has .* a row needs 9"),
        ({"tasks": ["needle_text"], "text": []}, "no dataset is given"),
        ({"tasks": ["needle_single"], "depths": [1.5]}, "depth 1.5 is not between"),
    ],
)
def test_rows_that_cannot_be_made_are_one_error_before_the_first_task(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_tasks(set_up(ByteTokenizer(), Uniform(256), **settings))
