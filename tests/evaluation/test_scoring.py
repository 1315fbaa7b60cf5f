from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fusiontree.data.answer_rows import IGNORED, AnswerRows, copy_rows, needle_rows, recall_rows
from fusiontree.data.batch import MicroBatch
from fusiontree.data.tokenizers import ByteTokenizer
from fusiontree.evaluation.scorer import ModelScorer, micro_batch
from fusiontree.evaluation.scoring import CorpusScore, answer_table, score_answers, score_batches, score_text, text_rows
from fusiontree.evaluation.text_bytes import text_bytes
from fusiontree.generation.decoding import generate
from fusiontree.generation.sampling import SamplingConfig
from fusiontree.parallel.batch_sharding import fill_up_rows
from tests.evaluation.scorers import LogitsScorer
from tests.helpers import tiny_model

ALPHABET = torch.arange(60)


class LooksBack(LogitsScorer):
    """Predicts what followed the longest earlier match of the last tokens: the retrieval that the tasks measure."""

    def logits(self, text: list[int]) -> torch.Tensor:
        logits_SV = torch.zeros(len(text), 64)
        for at in range(1, len(text)):

            def match(earlier: int, at: int = at) -> int:
                size = 0
                while size <= earlier and text[earlier - size] == text[at - size]:
                    size += 1
                return size

            best = max(range(at), key=match)
            if match(best):
                logits_SV[at, text[best + 1]] = 20.0
        return logits_SV


@pytest.mark.parametrize(
    "rows",
    [needle_rows(ALPHABET, 40, 0.3, 5, 4, 0), copy_rows(ALPHABET, 31, 5, 0), recall_rows(ALPHABET, 40, 6, 5, 0)],
    ids=["needle", "copy", "recall"],
)
def test_a_model_that_looks_back_answers_everything(rows):
    score = score_answers(LooksBack(), rows, batch_size=2)
    # copy: a token that occurs twice in a row may mislead the match of a single token, no more
    assert score.token_accuracy > 0.95
    assert score.nats_per_token < 1.0


def test_without_its_needle_the_same_question_has_no_answer():
    rows = needle_rows(ALPHABET, 40, 0.3, 20, 4, 0)
    control = needle_rows(ALPHABET, 40, 0.3, 20, 4, 0, with_needle=False)
    assert score_answers(LooksBack(), rows, 8).row_accuracy == 1.0
    assert score_answers(LooksBack(), control, 8).row_accuracy == 0.0


def test_answer_scores_equal_the_full_logits_and_no_batching_changes_them():
    model = tiny_model()
    rows = recall_rows(ALPHABET, 40, 5, 7, 0)
    logits = model(rows.input_ids_BS).logits_BSV.detach().double()
    asked = rows.labels_BS != IGNORED
    nats = torch.nn.functional.cross_entropy(logits[asked], rows.labels_BS[asked])
    hits = (logits.argmax(-1) == rows.labels_BS) & asked
    for batch_size in (1, 3, 7):
        score = score_answers(ModelScorer(model), rows, batch_size)
        assert score.nats_per_token == pytest.approx(float(nats), rel=1e-5)
        assert score.token_accuracy == pytest.approx(int(hits.sum()) / int(asked.sum()))
        assert score.row_accuracy == pytest.approx(float((hits.sum(1) == asked.sum(1)).float().mean()))


def test_answers_are_chosen_among_ids_that_generation_draws():
    model = tiny_model()
    rows = recall_rows(ALPHABET, 40, 5, 7, 0)
    asked = rows.labels_BS != IGNORED
    never = sorted(set(range(64)) - set(rows.labels_BS[asked][:1].tolist()))
    score = score_answers(ModelScorer(model, never), rows, 7)  # one id is left
    assert score.token_accuracy == pytest.approx(
        float((rows.labels_BS[asked] == rows.labels_BS[asked][0]).double().mean())
    )
    assert score.nats_per_token == score_answers(ModelScorer(model), rows, 7).nats_per_token


def test_a_row_counts_as_found_exactly_when_greedy_decoding_writes_the_answer():
    model = tiny_model(layer_pattern="FMA")
    prompts = torch.randint(60, (6, 20), generator=torch.Generator().manual_seed(0))
    written = generate(model, prompts.tolist(), max_new_tokens=4, sampling=SamplingConfig(greedy=True))
    answers = torch.tensor([row.tokens for row in written.rows])
    for wrong in range(3):
        answers[wrong, wrong] = (answers[wrong, wrong] + 1) % 60
    text = torch.cat([prompts, answers], dim=1)
    labels = text[:, 1:].clone()
    labels[:, :19] = IGNORED
    assert score_answers(ModelScorer(model), AnswerRows(text[:, :-1], labels), 4).row_accuracy == 0.5


def test_packed_rows_score_as_their_documents_alone_and_fillers_not_at_all():
    model = tiny_model()
    documents = [torch.randint(60, (size,), generator=torch.Generator().manual_seed(size)) for size in (7, 9, 16)]
    filler = torch.zeros(16, dtype=torch.int64)
    rows = [torch.cat(documents[:2]), documents[2], filler]
    positions = [torch.cat([torch.arange(7), torch.arange(9)]), torch.arange(16), torch.arange(16)]
    labels = [torch.cat([d[1:], torch.tensor([IGNORED])]) for d in documents]
    batch = MicroBatch(
        input_ids_BS=torch.stack(rows),
        labels_BS=torch.stack([torch.cat(labels[:2]), labels[2], filler]),
        positions_BS=torch.stack(positions),
        rows_B=torch.tensor([0, 1, -1]),
        row_weight_B=torch.tensor([1.0, 1.0, 0.0]),
        sources_B=torch.zeros(3, dtype=torch.int64),
    )
    again = replace(batch, rows_B=torch.tensor([2, 3, -1]))
    score = score_batches(ModelScorer(model), [batch, again], 4)
    nats = sum(
        float(torch.nn.functional.cross_entropy(model(d[None]).logits_BSV[0, :-1].detach(), d[1:], reduction="sum"))
        for d in documents
    )
    assert score.tokens == 2 * (6 + 8 + 15)
    assert score.nats == pytest.approx(2 * nats, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / 29), rel=1e-5)


@pytest.mark.parametrize("length", [2, 7, 8, 9, 17, 40])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_a_text_is_scored_once_a_token_with_enough_before_it(length, stride):
    tokens = list(range(100, 100 + length))
    scored = []
    for number, (ids, labels) in enumerate(text_rows(tokens, 8, stride)):
        assert len(ids) == len(labels) == min(8, length - 1)
        for column in (labels != IGNORED).nonzero().flatten().tolist():
            assert labels[column] == ids[column] + 1
            assert column + 1 > (8 - stride if number else 0)  # tokens before the scored one
            scored.append(int(labels[column]))
    assert scored == tokens[1:]


def test_text_score_is_the_sum_over_its_windows():
    model = tiny_model()
    tokens = torch.randint(60, (30,), generator=torch.Generator().manual_seed(0)).tolist()
    nats = 0.0
    for target in range(1, 30):
        # windows of 8 that move on by 4 and end with the text: the first that holds the target scores it
        start = 0
        while target > start + 8:
            start = min(start + 4, 29 - 8)
        logits = model(torch.tensor([tokens[start:target]])).logits_BSV[0, -1].detach()
        nats -= float(logits.log_softmax(-1)[tokens[target]])
    for batch_size in (1, 3, 100):
        score = score_text(ModelScorer(model), tokens, seq_len=8, stride=4, batch_size=batch_size)
        assert score.tokens == 29
        assert score.nats == pytest.approx(nats, rel=1e-5)


def test_a_stride_that_leaves_tokens_out_is_refused():
    with pytest.raises(ValueError, match="stride 9"):
        list(text_rows([1, 2, 3], 8, 9))


def test_scores_of_nothing_and_of_broken_models_are_no_error():
    assert math.isnan(CorpusScore(0.0, 0).nats_per_token)
    assert math.isnan(CorpusScore(0.0, 0).perplexity)
    assert CorpusScore(1e6, 10).perplexity == math.inf


def test_bytes_of_a_rows_text_leave_out_ends_and_cut_characters():
    tokenizer = ByteTokenizer()
    text = "für 世界"
    tokens = tokenizer.encode(text)
    assert text_bytes(tokenizer, [*tokens, 256, *tokens]) == 2 * len(text.encode())
    assert text_bytes(tokenizer, tokens[2:-1]) == len("r 世".encode())  # half of ü before, two thirds of 界 after
    assert text_bytes(tokenizer, [256, 256]) == 0 == text_bytes(tokenizer, [])
    score = CorpusScore(nats=8 * math.log(2), tokens=4, text_bytes=16)
    assert (score.bits_per_token, score.bits_per_byte) == (pytest.approx(2), pytest.approx(0.5))
    assert math.isnan(CorpusScore(1.0, 4).bits_per_byte)


class SomeRank(ModelScorer):
    """One of several ranks that share the rows; keeps its part of the table."""

    def __init__(self, model, rank: int, ranks: int) -> None:
        super().__init__(model)
        self.dp_rank, self.dp_size = rank, ranks
        self.part, self.shapes = None, []

    def score(self, micro):
        self.shapes.append(tuple(micro.input_ids_BS.shape))
        return super().score(micro)

    def sum_over_rows(self, values):
        self.part = values
        return values


@pytest.mark.parametrize(("ranks", "batch_size"), [(2, 4), (3, 1), (4, 2), (9, 4)])
def test_ranks_share_rows_in_batches_of_one_shape_and_their_parts_add_up(ranks, batch_size):
    model = tiny_model()
    rows = recall_rows(ALPHABET, 40, 5, 7, 0)
    whole = answer_table(ModelScorer(model), rows, 7)
    scorers = [SomeRank(model, rank, ranks) for rank in range(ranks)]
    for scorer in scorers:
        answer_table(scorer, rows, batch_size)
    assert all(scorer.shapes == scorers[0].shapes for scorer in scorers)
    parts = torch.stack([scorer.part for scorer in scorers])
    assert ((parts != 0).any(-1).sum(0) == 1).all()  # each row on one rank
    torch.testing.assert_close(parts.sum(0), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("multiple", [1, 2, 4, 6])
def test_rows_are_filled_up_by_another_document_without_labels(multiple):
    rows = recall_rows(ALPHABET, 15, 2, 3, 0)
    micro = micro_batch(rows.input_ids_BS, rows.labels_BS)
    filled = fill_up_rows(micro, multiple)
    length = filled.input_ids_BS.shape[1]
    assert length % multiple == 0 and 15 <= length < 15 + multiple
    assert (filled.labels_BS[:, 15:] == IGNORED).all()
    assert filled.positions_BS[0].tolist() == [*range(15), *range(length - 15)]
    model = ModelScorer(tiny_model())
    for score, expected in zip(model.score(filled), model.score(micro), strict=True):
        torch.testing.assert_close(score[:, :15], expected)
