"""The gate, its statistics and the alignment. Shape legend: L layers, B rows, S tokens, C channels."""

from __future__ import annotations

import pytest
import torch

from fusiontree.models.initialization import initialize_model
from fusiontree.models.model import FusionTreeModel
from tests.helpers import tiny_config, tiny_model


def definition(logits_BSC, counted_BS):
    gate = torch.sigmoid(logits_BSC)
    entropy = -(gate * gate.log() + (1 - gate) * (1 - gate).log())
    weight = counted_BS[..., None].to(gate.dtype)
    return [(value * weight).sum((1, 2)) for value in (gate, entropy, gate.square())]


@torch.no_grad()
def test_every_gate_starts_at_one_half():
    model = FusionTreeModel(tiny_config(layer_pattern="FMA"))
    initialize_model(model, seed=0)
    gates = model(torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])).layer_sums
    assert gates.count_B.tolist() == [160, 160]
    gates = gates.sums_LB
    assert torch.equal(gates["gate"], torch.full((3, 2), 80.0))
    assert torch.equal(gates["square"], torch.full((3, 2), 40.0))
    torch.testing.assert_close(gates["entropy"], torch.full((3, 2), 160 * 0.6931472))


@torch.no_grad()
def test_sums_of_a_model_are_over_tokens_and_channels_without_pads():
    model = tiny_model(num_layers=2)
    logits = []
    for layer in model.layers:
        layer.gate.up.register_forward_hook(lambda module, args, out: logits.append(out))
    ids = torch.randint(0, 64, (3, 6), generator=torch.Generator().manual_seed(1))
    mask_BS = torch.tensor([[True] * 6, [False] * 2 + [True] * 4, [True] + [False] * 5])
    weight_B = torch.tensor([1.0, 1.0, 0.0])
    gates, count_B = model(ids, padding_mask_BS=mask_BS).layer_sums
    for layer in range(2):
        expected = definition(logits[layer], mask_BS)
        for value, wanted in zip((gates["gate"], gates["entropy"], gates["square"]), expected, strict=True):
            torch.testing.assert_close(value[layer], wanted, atol=1e-3, rtol=1e-5)
    assert count_B.tolist() == [6 * 32, 4 * 32, 32]
    weighted, weighted_count_B = model(ids, padding_mask_BS=mask_BS, row_weight_B=weight_B).layer_sums
    assert weighted.keys() == gates.keys()
    for name, value in weighted.items():
        assert torch.equal(value, gates[name] * weight_B)
    assert torch.equal(weighted_count_B, count_B * weight_B)


@torch.no_grad()
def test_the_gate_mixes_the_branches_as_designed():
    """One block, recomputed from its parts."""
    for use_alignment, activation in ((True, "gelu"), (False, "swiglu")):
        model = tiny_model(num_layers=1, use_alignment=use_alignment, mlp_activation=activation)
        block = model.layers[0]
        got = []
        for module in (block.mamba, block.attention):
            module.register_forward_hook(lambda module, args, out, got=got: got.append(out))
        block.register_forward_hook(lambda module, args, out, got=got: got.extend([args[0], out[0]]))
        model(torch.tensor([[3, 1, 4, 1, 5]]))
        m, a, x, after = got
        gelu, silu = torch.nn.functional.gelu, torch.nn.functional.silu
        if use_alignment:
            ma, align = torch.cat([m, a], -1), block.align
            z = gelu(ma @ align.up.weight.T) @ align.down.weight.T + ma @ align.skip.weight.T
        else:
            z = (m + a) / 2
        g = torch.sigmoid(torch.tanh(z @ block.gate.down.weight.T) @ block.gate.up.weight.T)
        mlp = block.mlp
        inner = z @ mlp.up.weight.T
        inner = gelu(inner) if activation == "gelu" else silu(z @ mlp.gate.weight.T) * inner
        expected = x + (g * m + (1 - g) * a) @ block.out_proj.weight.T + inner @ mlp.down.weight.T
        assert (g - 0.5).abs().max() > 0.05
        torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("letter", "dropped"), [("M", 1), ("A", 0)])
@pytest.mark.parametrize("use_alignment", [True, False])
@torch.no_grad()
def test_a_branch_that_does_not_exist_counts_as_zeros(letter, dropped, use_alignment):
    """A one-branch layer equals a fused layer whose other branch is dropped."""
    fused = tiny_model(layer_pattern="F", use_alignment=use_alignment)
    single = tiny_model(layer_pattern=letter, use_alignment=use_alignment)
    state = dict(fused.named_parameters())
    for name, parameter in single.named_parameters():
        values = state[name]
        if ".align." in name and values.shape[1] == 64:
            values = values[:, 32:] if letter == "A" else values[:, :32]
        parameter.copy_(values)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    scale_LB2 = torch.ones(1, 1, 2)
    scale_LB2[..., dropped] = 0
    expected = fused(ids, branch_scale_LB2=scale_LB2).logits_BSV
    torch.testing.assert_close(single(ids).logits_BSV, expected, atol=1e-5, rtol=1e-5)
    names = {name.split(".")[2] for name, _ in single.named_parameters() if name.startswith("layers")}
    assert ({"mamba", "attention"} & names) == {"mamba" if letter == "M" else "attention"}
