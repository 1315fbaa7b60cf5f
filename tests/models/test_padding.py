"""Padded rows compute what unpadded rows compute; unclear masks are refused. Shape legend: B rows, S tokens."""

from __future__ import annotations

import pytest
import torch

from fusiontree.models.token_layout import documents_of_padding
from fusiontree.ops.documents import Documents
from tests.helpers import tiny_model
from tests.models.variants import VARIANTS

LENGTHS = [11, 2, 19, 1]


def texts():
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(0, 64, (length,), generator=generator) for length in LENGTHS]


def pad(side, width=19, value=0):
    input_ids_BS = torch.full((len(LENGTHS), width), value)
    mask_BS = torch.zeros(len(LENGTHS), width, dtype=torch.bool)
    for row, text in enumerate(texts()):
        first = {"left": width - len(text), "right": 0, "both": (width - len(text)) // 2}[side]
        input_ids_BS[row, first : first + len(text)] = text
        mask_BS[row, first : first + len(text)] = True
    return input_ids_BS, mask_BS


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("kind", VARIANTS)
@torch.no_grad()
def test_padded_rows_equal_unpadded_ones(kind, side):
    model = tiny_model(**VARIANTS[kind])
    input_ids_BS, mask_BS = pad(side, width=23, value=5)
    out = model(input_ids_BS, padding_mask_BS=mask_BS)
    for row, text in enumerate(texts()):
        alone = model(text[None])
        torch.testing.assert_close(out.logits_BSV[row, mask_BS[row]], alone.logits_BSV[0], atol=1e-4, rtol=0)
        padded_sums, sums = out.layer_sums.sums_LB, alone.layer_sums.sums_LB
        for padded, whole in [
            *((padded_sums[name], sums[name]) for name in ("gate", "entropy", "square")),
            (out.layer_sums.count_B, alone.layer_sums.count_B),
        ]:
            torch.testing.assert_close(padded[..., row], whole[..., 0], atol=1e-3, rtol=1e-5)


@torch.no_grad()
def test_labels_of_pads_never_count():
    model = tiny_model()
    input_ids_BS, mask_BS = pad("right")
    labels_BS = torch.full_like(input_ids_BS, 7)
    out = model(input_ids_BS, labels_BS=labels_BS, padding_mask_BS=mask_BS)
    alone = [model(text[None], labels_BS=torch.full((1, len(text)), 7)) for text in texts()]
    assert float(out.loss_sum) == pytest.approx(sum(float(one.loss_sum) for one in alone), rel=1e-5)
    assert float(out.z_sum) == pytest.approx(sum(float(one.z_sum) for one in alone), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.uint8])
def test_masks_that_are_not_boolean_are_refused(dtype):
    """Fault of the first prototype: an integer mask was added to scores instead of hiding tokens."""
    input_ids_BS, mask_BS = pad("left")
    with pytest.raises(TypeError, match=rf"{dtype}.*mask\.bool\(\)"):
        tiny_model()(input_ids_BS, padding_mask_BS=mask_BS.to(dtype))


def test_masks_with_holes_or_without_tokens_are_refused():
    mask_BS = torch.tensor([[True, True, True, False], [True, False, True, True]])
    with pytest.raises(ValueError, match=r"row 1 .* pads between real tokens"):
        documents_of_padding(mask_BS)
    with pytest.raises(ValueError, match=r"row 0 .* no real token"):
        documents_of_padding(torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and the tokens \(2, 4\)"):
        tiny_model()(torch.zeros(2, 4, dtype=torch.int64), padding_mask_BS=mask_BS[:, :3])


def test_a_mask_and_documents_together_are_refused():
    input_ids_BS, mask_BS = pad("left")
    with pytest.raises(ValueError, match="give one of them"):
        tiny_model()(input_ids_BS, padding_mask_BS=mask_BS, documents=Documents.whole(4, 19))


def test_pads_become_documents_of_their_own():
    mask_BS = torch.tensor(
        [[False, False, True, True, True], [True, True, True, False, False], [False, True] + [False] * 3]
    )
    documents, first, counts = documents_of_padding(mask_BS)
    assert documents.positions_BS.tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 1], [0, 0, 0, 1, 2]]
    assert (first, counts) == ([2, 0, 1], [3, 3, 1])
