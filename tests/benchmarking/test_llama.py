"""The peer Llama: its size, its loss against plain PyTorch, its documents, and its training by our trainer.

Shape legend: B rows, S tokens, H heads, K key/value heads, D channels of a head, C channels.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.benchmarking.llama import llama_config
from fusiontree.benchmarking.peers import choose_peers
from fusiontree.config.load import load_config
from fusiontree.config.packaged import packaged_names
from fusiontree.models.config import ModelConfig
from fusiontree.models.flops import training_flops_per_token
from fusiontree.models.initialization import initialize_model
from fusiontree.models.model import FusionTreeModel
from fusiontree.ops.documents import Documents
from fusiontree.utils.errors import UserError
from tests.helpers import tiny_config

BENCH = [name for name in packaged_names() if name.startswith("bench/")]
STARTS = (0, 5, 6, 14)
"""Starts of the documents in a row of 20 tokens."""


def parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in FusionTreeModel(config).parameters())


@pytest.fixture
def llama() -> FusionTreeModel:
    sizes = {"F": {"mlp_size": 24}, "A": {"mlp_size": 8}}  # of our layers, not of the peer's
    heads = {"num_heads": 4, "num_kv_heads": 2, "global_heads": 2}
    ours = tiny_config(hidden_size=64, **heads, letter_sizes=sizes, z_loss_coeff=0.1)
    model = FusionTreeModel(llama_config(ours, 150_000))
    initialize_model(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    return model


def plain_loss(model: FusionTreeModel, ids_BS: Tensor, labels_BS: Tensor, starts: tuple[int, ...]) -> Tensor:
    """Summed cross entropy by torch's own operations, one document after the other."""
    config, total = model.config, torch.zeros(())
    width = config.attention_head_dim

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, config.norm_eps)

    def rotate(x_BSHD: Tensor) -> Tensor:
        angle_SD = torch.outer(
            torch.arange(x_BSHD.shape[1]), config.rope_theta ** (-torch.arange(0, width, 2) / width)
        ).double()
        a, b = x_BSHD.chunk(2, dim=-1)
        cos, sin = (t.float()[:, None] for t in (angle_SD.cos(), angle_SD.sin()))
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    for begin, end in zip(starts, [*starts[1:], ids_BS.shape[1]], strict=True):
        x_BSC = F.embedding(ids_BS[:, begin:end], model.embed.weight)
        for block in model.layers:
            u, mixer = norm(x_BSC, block.norm.weight), block.attention
            q, k, v = (p(u).unflatten(-1, (-1, width)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
            q, k, v = (t.transpose(1, 2) for t in (rotate(q), rotate(k), v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x_BSC = x_BSC + mixer.o_proj(mixed.transpose(1, 2).flatten(2))
            z, mlp = norm(x_BSC, block.mlp.norm.weight), block.mlp
            x_BSC = x_BSC + mlp.down(F.silu(mlp.gate(z)) * mlp.up(z))
        logits = norm(x_BSC, model.norm.weight) @ model.head.weight.T
        total = total + F.cross_entropy(logits.flatten(0, 1), labels_BS[:, begin:end].flatten(), reduction="sum")
    return total


def batch() -> tuple[Tensor, Tensor, Documents]:
    generator = torch.Generator().manual_seed(0)
    ids_BS, labels_BS = (torch.randint(0, 64, (2, 20), generator=generator) for _ in range(2))
    labels_BS[:, [4, 5, 13]] = -100
    positions_S = torch.cat([torch.arange(n) for n in (5, 1, 8, 6)])
    return ids_BS, labels_BS, Documents.from_positions(positions_S.expand(2, 20).contiguous())


@pytest.mark.parametrize("name", BENCH)
def test_it_has_as_many_parameters(name: str) -> None:
    config = load_config(name)
    ours = parameters(config.model)
    llama = llama_config(config.model, ours)
    assert parameters(llama) == pytest.approx(ours, rel=0.02)
    assert 2 * llama.hidden_size < llama.mlp_size < 3.5 * llama.hidden_size
    assert (llama.hidden_size, llama.kv_heads, llama.global_heads) == (
        config.model.hidden_size,
        config.model.kv_heads,
        config.model.num_heads,
    )


def test_a_size_that_no_llama_has_is_refused() -> None:
    with pytest.raises(UserError, match="more than 2% apart"):
        llama_config(tiny_config(), 5_000)


def test_loss_and_gradient_are_those_of_plain_torch(llama: FusionTreeModel) -> None:
    ids_BS, labels_BS, documents = batch()
    loss = llama(ids_BS, labels_BS=labels_BS, documents=documents).loss_sum
    found = torch.autograd.grad(loss, list(llama.parameters()))
    expected_loss = plain_loss(llama, ids_BS, labels_BS, STARTS)
    expected = torch.autograd.grad(expected_loss, list(llama.parameters()))
    torch.testing.assert_close(loss, expected_loss)
    for (name, _), one, other in zip(llama.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)
    whole = llama(ids_BS, labels_BS=labels_BS).loss_sum
    torch.testing.assert_close(whole, plain_loss(llama, ids_BS, labels_BS, (0,)))
    assert abs(float((whole / loss).detach()) - 1) > 1e-3


def test_documents_of_a_row_do_not_see_each_other(llama: FusionTreeModel) -> None:
    ids_BS, labels_BS, documents = batch()
    labels_BS[:, :6] = labels_BS[:, 14:] = -100  # of the third document alone
    loss = llama(ids_BS, labels_BS=labels_BS, documents=documents).loss_sum
    changed_BS = ids_BS.clone()
    changed_BS[:, :6] += 1
    changed_BS[:, 14:] += 1
    assert torch.equal(loss, llama(changed_BS % 64, labels_BS=labels_BS, documents=documents).loss_sum)
    changed_BS[:, 6] += 1
    assert not torch.equal(loss, llama(changed_BS % 64, labels_BS=labels_BS, documents=documents).loss_sum)


def test_flops_by_hand(llama: FusionTreeModel) -> None:
    config = llama.config
    weights = sum(p.numel() for name, p in llama.named_parameters() if p.ndim == 2 and name != "embed.weight")
    keys = (4 * 5 // 2 + 10 * 11 // 2) / 14
    attention = config.num_layers * 4 * config.num_heads * config.attention_head_dim * keys
    assert training_flops_per_token(config, [4, 10]) == pytest.approx(3 * (2 * weights + attention))


def test_the_choice_of_peers(caplog: pytest.LogCaptureFixture) -> None:
    obstacles = {"llama": "", "falcon": "it needs a package"}
    assert choose_peers(None, obstacles) == []
    assert choose_peers(["llama", "llama"], obstacles) == ["llama"]
    with caplog.at_level("INFO"):
        assert choose_peers([], obstacles) == ["llama"]
    assert "falcon is left out: it needs a package" in caplog.text
    with pytest.raises(UserError, match="--peers falcon: it needs a package"):
        choose_peers(["llama", "falcon"], obstacles)
    with pytest.raises(UserError, match="did you mean 'llama'"):
        choose_peers(["lama"], obstacles)
