"""Answers to requests of lm-evaluation-harness, without the harness: against the model's plain logits."""

from __future__ import annotations

import random

import pytest
import torch

import fusiontree.evaluation.responder as responder_module
from fusiontree.data.tokenizers import ByteTokenizer
from fusiontree.evaluation.generation_options import GenerationOptions
from fusiontree.evaluation.responder import Responder, rolling_windows
from fusiontree.generation.decoding import generate
from fusiontree.generation.sampling import SamplingConfig
from fusiontree.utils.errors import UserError
from tests.helpers import tiny_model
from tests.parallel.table import DELTA

LENGTH = 64
EOS = 256
TOKENIZER = ByteTokenizer()
NEVER = list(range(257, 264))
# Short, equal, long and too long contexts; one whose continuation fills the row; spaces at the end; no context.
PAIRS = [
    ("The sun is", " hot"),
    ("The sun is", " cold and very far away"),
    ("a", "b"),
    ("x" * 40, "yz"),
    ("long " * 30, "continuation"),
    ("w" * 100, "v" * LENGTH),
    ("ends with spaces  ", "so these move"),
    ("", "no context at all"),
    ("Question? Answer:", " A"),
    ("Question? Answer:", " B"),
    ("Question? Answer:", " C"),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=264, layer_pattern="FMAG", **DELTA).eval()


def responder(model, **changes) -> Responder:
    return Responder(model, TOKENIZER, **{"batch_size": 3, **changes})


def plain(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Score one continuation by all logits of its row alone; the row keeps the last LENGTH inputs."""
    row = (context + continuation)[-LENGTH - 1 :]
    with torch.no_grad():
        logits = model(torch.tensor([row[:-1]])).logits_BSV[0, -len(continuation) :].double()
    targets = torch.tensor(continuation)
    logprobs = logits.log_softmax(-1)[torch.arange(len(targets)), targets]
    logits[:, NEVER] = -torch.inf
    return float(logprobs.sum()), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("batch_size", "columns"), [(1, 1), (3, 1), (3, 16), (20, 1)])
def test_loglikelihoods_are_those_of_the_row_alone(model, side, batch_size, columns, monkeypatch):
    monkeypatch.setitem(responder_module.COLUMNS, "cpu", columns)
    answers = responder(model, batch_size=batch_size, padding_side=side).loglikelihood(PAIRS)
    for (context, continuation), answer in zip(PAIRS, answers, strict=True):
        text = (context + continuation).encode()
        start = len(context.rstrip().encode())
        before, after = list(text[:start]) or [EOS], list(text[start:])
        logprob, is_greedy = plain(model, before, after)
        assert answer.logprob == pytest.approx(logprob, abs=1e-4)
        assert answer.is_greedy == is_greedy


def test_logits_are_computed_in_parts(model, monkeypatch):
    expected = responder(model).loglikelihood(PAIRS)
    monkeypatch.setattr(responder_module, "LOGITS_AT_ONCE", 264 * 5)
    answers = responder(model).loglikelihood(PAIRS)
    assert [a.logprob for a in answers] == pytest.approx([a.logprob for a in expected], abs=1e-5)
    assert [a.is_greedy for a in answers] == [a.is_greedy for a in expected]


def test_choices_of_one_token_share_a_row_and_answers_are_reported_as_they_come(model, monkeypatch):
    rows = 0
    forward = type(model).forward

    def counting(self, input_ids_BS, **options):
        nonlocal rows
        rows += len(input_ids_BS)
        return forward(self, input_ids_BS, **options)

    monkeypatch.setattr(type(model), "forward", counting)
    told: dict[int, object] = {}
    pairs = [("Question? Answer:", f" {letter}") for letter in "ABCD"] + [("Another", " one")]
    answers = responder(model).loglikelihood(pairs, told.__setitem__)
    assert rows == 2
    assert [told[index] for index in range(5)] == answers


def test_a_greedy_continuation_is_what_generation_writes(model):
    context = "The sun is"
    written = generate(
        model, [TOKENIZER.encode(context)], max_new_tokens=5, sampling=SamplingConfig(greedy=True), never=NEVER
    ).rows[0]
    request = responder_module.ScoreRequest
    tokens = written.tokens
    other = [*tokens[:-1], (tokens[-1] + 1) % 256]
    right, wrong = responder(model).score([request(TOKENIZER.encode(context), t) for t in (tokens, other)])
    assert right.is_greedy and not wrong.is_greedy
    assert right.logprob == pytest.approx(sum(written.logprobs), abs=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 16, 17, 23, 40])
def test_windows_score_every_token_once_with_what_fits_before(tokens):
    text = list(range(100, 100 + tokens))
    windows = list(rolling_windows(text, prefix=9, length=8))
    assert [token for window in windows for token in window.continuation] == text
    for number, (context, continuation) in enumerate(windows):
        inputs = (context + continuation)[:-1]
        assert len(inputs) == min(8, tokens)  # a full row wherever the text has one
        start = text.index(continuation[-1]) + 1 - len(context + continuation)
        assert context + continuation == ([9, *text] if number == 0 else text)[max(start, 0) :][: len(inputs) + 1]


def test_a_texts_log_probability_is_the_sum_over_its_windows(model):
    texts = ["", "a", "short text", "long " * 30]
    totals = responder(model).loglikelihood_rolling(texts)
    for text, total in zip(texts, totals, strict=True):
        tokens = TOKENIZER.encode(text)
        expected = sum(plain(model, *window)[0] for window in rolling_windows(tokens, EOS, LENGTH))
        assert total == pytest.approx(expected, abs=1e-3)
    assert totals[0] == 0.0
    with torch.no_grad():
        logits = model(torch.tensor([[EOS, *TOKENIZER.encode("short tex")]])).logits_BSV[0].log_softmax(-1)
    assert totals[2] == pytest.approx(float(logits[range(10), TOKENIZER.encode("short text")].sum()), abs=1e-4)


def alone(model, context: str, **options) -> str:
    """What greedy decoding writes for one prompt, cut on the left so that prompt and new tokens fit."""
    options = {"max_new_tokens": 12, **options}
    prompt = (TOKENIZER.encode(context) or [EOS])[-(LENGTH - options["max_new_tokens"]) :]
    row = generate(
        model,
        [prompt],
        sampling=SamplingConfig(greedy=True),
        stop_tokens=[EOS],
        decode=TOKENIZER.decode,
        never=NEVER,
        **options,
    ).rows[0]
    return row.text or ""


def test_continuations_are_those_of_each_prompt_alone_in_order(model):
    contexts = ["The sun", "a", "long " * 30, "", "x" * 50, "The sun is hot. The moon"]
    random.Random(0).shuffle(contexts)
    plain_texts = {context: alone(model, context) for context in contexts}
    stop = next(text[2:4] for text in plain_texts.values() if len(text) > 5 and text[2:4].isprintable())
    requests = [(context, {"max_gen_toks": 12, "do_sample": False, "temperature": 0.0}) for context in contexts]
    requests += [(context, {"until": stop, "max_new_tokens": 12}) for context in contexts]
    requests += [(context, {"until": [stop], "max_gen_toks": 3}) for context in contexts]
    texts = responder(model).generate_until(requests)
    n = len(contexts)
    assert texts[:n] == [plain_texts[context] for context in contexts]
    assert texts[n : 2 * n] == [alone(model, context, stop_strings=[stop]) for context in contexts]
    assert texts[2 * n :] == [alone(model, c, stop_strings=[stop], max_new_tokens=3) for c in contexts]
    assert any(stop in text for text in texts[:n]) and not any(stop in text for text in texts[n:])


def test_sampled_texts_depend_on_the_seed_and_not_on_their_batch(model):
    options = {"do_sample": True, "temperature": 0.8, "top_k": 0, "max_gen_toks": 8}
    requests = [(context, options) for context in ("The sun", "a", "The sun", "bc")]
    texts = responder(model).generate_until(requests)
    assert texts[0] != texts[2]  # repeats of one request are different draws
    assert responder(model, batch_size=1).generate_until(requests[1:]) == [texts[1], texts[0], texts[3]]
    assert responder(model, seed=1).generate_until(requests) != texts


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (256, (), SamplingConfig(greedy=True))),
        ({"until": "\n", "max_tokens": 5}, (5, ("\n",), SamplingConfig(greedy=True))),
        ({"until": ["a", "b", "a"], "temperature": 0}, (256, ("a", "b"), SamplingConfig(greedy=True))),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, (256, (), SamplingConfig(greedy=True))),
        ({"temperature": 0.7, "top_p": 0.5}, (256, (), SamplingConfig(temperature=0.7, top_p=0.5))),
        ({"do_sample": True}, (256, (), SamplingConfig())),
        ({"num_beams": 1, "repetition_penalty": 1.2}, (256, (), SamplingConfig(greedy=True, repetition_penalty=1.2))),
    ],
)
def test_options_of_tasks_are_read_as_the_harness_does(options, expected):
    assert GenerationOptions.of(options, 256) == GenerationOptions(*expected)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda r: r.generate_until([("a", {"max_gen_tok": 3})]), "'max_gen_tok'.*did you mean 'max_gen_toks'"),
        (lambda r: r.generate_until([("a", {"num_beams": 4})]), "num_beams 4"),
        (lambda r: r.generate_until([("a", {"until": ["x", ""]})]), "texts that are not empty"),
        (lambda r: r.generate_until([("a", {"max_gen_toks": 64})]), "64 new tokens.*no room"),
        (lambda r: r.generate_until([("a", {"do_sample": True, "temperature": 0.0})]), "temperature is 0.0"),
        (lambda r: r.loglikelihood([("a", "")]), "adds no token"),
        (lambda r: r.loglikelihood([("a", "b" * 65)]), "65 tokens.*at most 64"),
    ],
)
def test_requests_that_cannot_be_answered_are_one_clear_error(model, ask, message):
    with pytest.raises(UserError, match=message):
        ask(responder(model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"padding_side": "up"}, "'up'"),
        ({"max_length": -1}, "max_length is -1"),
    ],
)
def test_sizes_that_cannot_be_are_one_clear_error(model, change, message):
    with pytest.raises(UserError, match=message):
        responder(model, **change)


def test_rows_may_be_longer_than_in_training_unless_positions_are_learned(model):
    answer = responder(model, max_length=80).loglikelihood([("a" * 100, "bc")])[0]
    with torch.no_grad():
        logits = model(torch.tensor([TOKENIZER.encode("a" * 79 + "b")])).logits_BSV[0, -2:].log_softmax(-1)
    assert answer.logprob == pytest.approx(float(logits[[0, 1], [98, 99]].sum()), abs=1e-4)
    with pytest.raises(UserError, match="learnable SRTE"):
        responder(tiny_model(vocab_size=264, srte_encoding="learnable"), max_length=65)
