"""A packed row computes what its documents compute alone. Shape legend: B rows, S tokens."""

from __future__ import annotations

import pytest
import torch

from fusiontree.ops.documents import Documents
from fusiontree.parallel.context_parallel import PieceDocuments
from tests.helpers import tiny_model
from tests.models.variants import VARIANTS

# Documents shorter and longer than window, convolution and chunk; one of a single token; a start inside a chunk.
ROWS = [[9, 1, 14, 3], [2, 25], [27]]


def packed(rows):
    positions_BS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    return Documents.from_positions(positions_BS)


def tokens(rows, length, vocab=64):
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("kind", VARIANTS)
@torch.no_grad()
def test_a_packed_row_equals_its_documents_alone(kind):
    model = tiny_model(**VARIANTS[kind])
    input_ids_BS = tokens(3, 27)
    together = model(input_ids_BS, documents=packed(ROWS)).logits_BSV
    assert together.std() > 0.3
    for row, lengths in enumerate(ROWS):
        start = 0
        for length in lengths:
            end = start + length
            alone = model(input_ids_BS[row : row + 1, start:end]).logits_BSV[0]
            torch.testing.assert_close(together[row, start:end], alone, atol=1e-4, rtol=0)
            start = end


def test_losses_and_gradients_of_a_packed_row_are_the_sums_of_its_documents():
    model = tiny_model(layer_pattern="FMA", srte_encoding="learnable")
    input_ids_BS, labels_BS = tokens(3, 27), tokens(3, 27).flip(1)

    def gradients():
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        model.zero_grad()
        return found

    out = model(input_ids_BS, labels_BS=labels_BS, documents=packed(ROWS))
    (out.loss_sum + out.layer_sums.sums_LB["entropy"].sum()).backward()
    together, loss_sum = gradients(), 0.0
    for row, lengths in enumerate(ROWS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            alone = model(input_ids_BS[row : row + 1, part], labels_BS=labels_BS[row : row + 1, part])
            (alone.loss_sum + alone.layer_sums.sums_LB["entropy"].sum()).backward()
            loss_sum += float(alone.loss_sum.detach())
            start += length
    assert float(out.loss_sum.detach()) == pytest.approx(loss_sum, rel=1e-6)
    for name, grad in gradients().items():
        torch.testing.assert_close(together[name], grad, atol=1e-4 * float(grad.abs().max()), rtol=1e-4, msg=name)


@torch.no_grad()
def test_boundaries_matter_to_this_model():
    """The equalities above could hold for a model that forgets at once; this one does not."""
    for kind in ("pattern MM", "pattern AA"):
        model = tiny_model(**VARIANTS[kind], window_size=60, srte_encoding="none")
        input_ids_BS = tokens(1, 27)
        kept = model(input_ids_BS).logits_BSV[0, 26]
        cut = model(input_ids_BS, documents=packed([[9, 1, 14, 3]])).logits_BSV[0, 26]
        other = input_ids_BS.clone()
        other[0, 0] = (other[0, 0] + 1) % 64
        assert (kept - cut).abs().max() > 1e-2
        assert (kept - model(other).logits_BSV[0, 26]).abs().max() > 1e-3


def test_documents_of_another_batch_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 27\) tokens, the input \(1, 26\)"):
        tiny_model()(tokens(1, 26), documents=packed([[27]]))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_chunk_of_one_token_has_no_second_half(rank):
    chunk = PieceDocuments.from_row(torch.tensor([[0, 1], [0, 0]]), rank, 2).padded(3)
    assert chunk.positions_BS.tolist() == [[rank], [0]] == chunk.own_half.positions_BS.tolist()
    assert chunk.mirror_half.positions_BS.shape == (2, 0)
    assert chunk.mirror_half.cu_seqlens.tolist() == [0, 0, 0, 0]
