"""Shared relative time encoding. Shape legend: B rows, S tokens, C channels."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fusiontree.models.srte import SharedTimeEncoding
from fusiontree.ops.documents import Documents
from fusiontree.utils.errors import UserError
from tests.helpers import tiny_config, tiny_model


class Recorder(nn.Module):
    """Stands in a branch and keeps what it reads."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def forward(self, u_BSC, *_):
        self.inputs.append(u_BSC)
        return torch.zeros_like(u_BSC)


def test_sines_and_cosines_of_the_position():
    srte = SharedTimeEncoding(tiny_config())
    positions_BS = torch.tensor([[0, 1, 7], [31_000, 2, 0]])
    values = srte(positions_BS, torch.float32)
    for b, s in ((0, 0), (0, 2), (1, 0)):
        position = int(positions_BS[b, s])
        for channel in range(32):
            angle = position / 10000 ** ((channel - channel % 2) / 32)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert float(values[b, s, channel]) == pytest.approx(expected, abs=1e-6)


def test_long_rows_are_encoded_in_blocks():
    srte = SharedTimeEncoding(tiny_config())
    positions_BS = torch.arange(9000)[None]
    assert torch.equal(srte(positions_BS, torch.float32)[:, 8000:8003], srte(positions_BS[:, 8000:8003], torch.float32))


@pytest.mark.parametrize("kind", ["none", "sincos", "learnable"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_it_never_changes_the_dtype(kind, dtype):
    """Fault of the first prototype: fp32 sines turned half precision activations into fp32."""
    model = tiny_model(srte_encoding=kind).to(dtype)
    recorder = Recorder()
    model.layers[0].mamba = recorder
    out = model(torch.tensor([[1, 2, 3]]))
    assert out.logits_BSV.dtype == dtype
    assert recorder.inputs[0].dtype == dtype


@torch.no_grad()
def test_it_reaches_every_mamba_branch_and_no_attention():
    model = tiny_model(num_layers=2)
    ids = torch.tensor([[4, 9, 2]])
    for layer in model.layers:
        layer.mamba, layer.attention = Recorder(), Recorder()
    model(ids)
    encoding = model.srte(torch.arange(3)[None], torch.float32)
    for layer in model.layers:
        torch.testing.assert_close(layer.mamba.inputs[0] - layer.attention.inputs[0], encoding, atol=1e-6, rtol=0)


@torch.no_grad()
def test_positions_restart_at_documents_and_continue_while_decoding():
    model = tiny_model(num_layers=1)
    encoding = model.srte(torch.arange(9)[None], torch.float32)[0]
    seen = []
    model.srte.register_forward_hook(lambda module, args, result: seen.append(result))
    packed = Documents.from_positions(torch.tensor([[0, 1, 2, 0, 1, 0]]))
    model(torch.zeros(1, 6, dtype=torch.int64), documents=packed)
    assert torch.equal(seen[-1][0], encoding[[0, 1, 2, 0, 1, 0]])
    piece = Documents.from_positions(torch.tensor([[5, 6, 0, 1]]))  # continues a document of another rank
    model(torch.zeros(1, 4, dtype=torch.int64), documents=piece)
    assert torch.equal(seen[-1][0], encoding[[5, 6, 0, 1]])
    cache = model.new_cache(2)
    mask_BS = torch.tensor([[True] * 4, [False, False, True, True]])
    model(torch.zeros(2, 4, dtype=torch.int64), padding_mask_BS=mask_BS, cache=cache)
    model(torch.zeros(2, 1, dtype=torch.int64), cache=cache)
    assert torch.equal(seen[-1][:, 0], encoding[[4, 2]])


def test_there_is_one_learned_table_for_all_layers():
    model = tiny_model(srte_encoding="learnable", num_layers=3)
    names = [name for name, _ in model.named_parameters() if "srte" in name]
    assert names == ["srte.weight"]
    assert model.srte.weight.shape == (64, 32)
    model(torch.tensor([[1, 2]]), labels_BS=torch.tensor([[2, 3]])).loss_sum.backward()
    grad = model.srte.weight.grad
    assert bool(grad[:2].abs().sum(1).min() > 0) and not grad[2:].any()


@torch.no_grad()
def test_a_text_longer_than_the_learned_table_is_an_error():
    model = tiny_model(srte_encoding="learnable", max_position_embeddings=8)
    model(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(UserError, match=r"a text of 9 tokens .* max_position_embeddings = 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))
    model(torch.zeros(1, 12, dtype=torch.int64), documents=Documents.from_positions(torch.arange(12)[None] % 6))
    with pytest.raises(UserError, match="a text of 9 tokens"):
        piece = Documents.from_positions(torch.tensor([[7, 8, 0]]))
        model(torch.zeros(1, 3, dtype=torch.int64), documents=piece)
    cache = model.new_cache(1)
    model(torch.zeros(1, 8, dtype=torch.int64), cache=cache)
    with pytest.raises(UserError, match="a text of 9 tokens"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    assert cache.lengths == [8]
    for kind in ("none", "sincos"):
        tiny_model(srte_encoding=kind, max_position_embeddings=8)(torch.zeros(1, 12, dtype=torch.int64))
