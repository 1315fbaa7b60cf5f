from __future__ import annotations

import pytest
import torch

from fusiontree.data.answer_rows import IGNORED, AnswerRows, copy_rows, needle_rows, recall_rows
from fusiontree.utils.errors import UserError

ALPHABET = torch.arange(10, 60)


def whole(rows: AnswerRows) -> torch.Tensor:
    """The rows with their last token; labels must be the tokens themselves."""
    text = torch.cat([rows.input_ids_BS, rows.labels_BS[:, -1:]], dim=1)
    asked = rows.labels_BS != IGNORED
    assert torch.equal(rows.labels_BS[asked], text[:, 1:][asked])
    return text


@pytest.mark.parametrize("length", [15, 16, 40])
@pytest.mark.parametrize(("depth", "share"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_the_needle_lies_where_it_should_and_is_asked_for_at_the_end(length, depth, share):
    rows = needle_rows(ALPHABET, length, depth, rows=6, needle_tokens=4, seed=1)
    text = whole(rows)
    assert rows.input_ids_BS.shape == (6, length)
    at = round(share * (length + 1 - 16))
    assert torch.equal(text[:, at : at + 8], text[:, -8:])
    assert torch.equal((rows.labels_BS != IGNORED).sum(1), torch.full((6,), 4))
    assert torch.equal(rows.labels_BS[:, -4:], text[:, at + 4 : at + 8])
    assert bool(torch.isin(text, ALPHABET).all())


def test_the_control_differs_in_the_needle_alone():
    with_needle, without = (
        whole(needle_rows(ALPHABET, 50, 0.5, rows=20, needle_tokens=3, seed=1, with_needle=flag))
        for flag in (True, False)
    )
    differing = (with_needle != without).any(dim=0).nonzero().flatten()
    at = round(0.5 * (51 - 12))
    assert set(differing.tolist()) == set(range(at, at + 6))


def test_rows_follow_from_the_seed_and_differ_between_seeds_depths_and_lengths():
    first = needle_rows(ALPHABET, 40, 0.5, 3, 4, seed=1).input_ids_BS
    assert torch.equal(first, needle_rows(ALPHABET, 40, 0.5, 3, 4, seed=1).input_ids_BS)
    assert not torch.equal(first, needle_rows(ALPHABET, 40, 0.5, 3, 4, seed=2).input_ids_BS)
    assert not torch.equal(first[:, -4:], needle_rows(ALPHABET, 40, 0.25, 3, 4, seed=1).input_ids_BS[:, -4:])
    assert not torch.equal(first[:, :9], needle_rows(ALPHABET, 41, 0.5, 3, 4, seed=1).input_ids_BS[:, :9])


@pytest.mark.parametrize("length", [3, 10, 11])
def test_copy_asks_for_all_that_can_be_known(length):
    rows = copy_rows(ALPHABET, length, rows=5, seed=0)
    text = whole(rows)
    half = (length + 1) // 2
    assert torch.equal(text[:, :half], text[:, half:])
    assert (rows.labels_BS != IGNORED).sum(1).tolist() == [half - 1] * 5
    assert (rows.labels_BS[:, :half] == IGNORED).all()


@pytest.mark.parametrize(("length", "pairs"), [(15, 4), (31, 8), (60, 8), (61, 1)])
def test_every_question_of_recall_has_its_one_answer_before(length, pairs):
    rows = recall_rows(ALPHABET, length, pairs, rows=6, seed=0)
    text = whole(rows)
    assert rows.input_ids_BS.shape == (6, length)
    for row, asked in zip(text.tolist(), (rows.labels_BS != IGNORED), strict=True):
        columns = (asked.nonzero().flatten() + 1).tolist()
        context = row[: length + 1 - 2 * pairs]
        assert columns == list(range(length + 2 - 2 * pairs, length + 1, 2))
        keys = [row[column - 1] for column in columns]
        assert len(set(keys)) == pairs
        for column in columns:
            assert context.count(row[column - 1]) == 1
            assert context[context.index(row[column - 1]) + 1] == row[column]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: needle_rows(ALPHABET, 14, 0.5, 1, 4, 0), "row of 14 tokens holds no needle"),
        (lambda: needle_rows(ALPHABET, 40, 1.5, 1, 4, 0), "depth 1.5"),
        (lambda: copy_rows(ALPHABET, 2, 1, 0), "row of 2 tokens"),
        (lambda: recall_rows(ALPHABET, 14, 4, 1, 0), "row of 14 tokens holds no 4 pairs.*needs 15"),
        (lambda: recall_rows(ALPHABET, 400, 26, 1, 0), "26 different keys.*25"),
    ],
)
def test_rows_that_cannot_be_made_are_one_clear_error(make, message):
    with pytest.raises(UserError, match=message):
        make()
