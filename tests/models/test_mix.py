"""Mixes of the branches without a gate, norms of branches, the MLP in turn, and global heads without rotation.

Shape legend: B rows, S tokens, C channels.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.models.initialization import initialize_model, no_weight_decay
from fusiontree.models.model import FusionTreeModel
from fusiontree.planning.activation_memory import kept_elements
from tests.helpers import tiny_config, tiny_model

IDS_BS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


def traced(model: FusionTreeModel) -> dict[str, Tensor]:
    """Return input and output of the first block, and its branches' outputs."""
    block, seen = model.layers[0], {}
    for name, mixer in block.mixers().items():
        mixer.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    block.register_forward_hook(lambda module, args, out: seen.update(x=args[0], after=out[0]))
    model(IDS_BS)
    return seen


@pytest.mark.parametrize("letter", ["F", "A"])
@pytest.mark.parametrize("branch_norm", [False, True])
@pytest.mark.parametrize("mlp_input", ["branches", "residual"])
@pytest.mark.parametrize("branch_mix", ["gated_sum", "mean", "concat", "sum"])
@torch.no_grad()
def test_the_block_is_its_formula(letter: str, branch_norm: bool, mlp_input: str, branch_mix: str) -> None:
    model = tiny_model(
        layer_pattern=letter, branch_norm=branch_norm, mlp_input=mlp_input, branch_mix=branch_mix, use_alignment=False
    )
    for name, parameter in model.named_parameters():
        if "norm" in name or "gate" in name:
            parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    seen, block = traced(model), model.layers[0]
    outputs = [seen[name] for name in block.mixers()]
    if branch_norm:
        weights = block.branch_norm.weight.chunk(len(outputs))
        outputs = [F.rms_norm(out, (32,), weight, 1e-5) for out, weight in zip(outputs, weights, strict=True)]
    z = sum(outputs) / 2
    if branch_mix == "concat":
        mixed = torch.cat(outputs, -1) @ block.out_proj.weight.T
    elif branch_mix == "mean":
        mixed = sum(outputs) / len(outputs) @ block.out_proj.weight.T
    elif branch_mix == "gated_sum":
        gate = torch.sigmoid(torch.tanh(z @ block.gate.down.weight.T) @ block.gate.up.weight.T)
        weights = (gate, 1 - gate) if letter == "F" else (1 - gate,)
        mixed = sum(weight * out for weight, out in zip(weights, outputs, strict=True))
    else:
        mixed = sum(outputs)
    x = seen["x"] + mixed
    if mlp_input == "residual":
        z = F.rms_norm(x, (32,), block.mlp.norm.weight, 1e-5)
    expected = x + F.gelu(z @ block.mlp.up.weight.T) @ block.mlp.down.weight.T
    torch.testing.assert_close(seen["after"], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_normalized_branches_reach_gate_and_alignment() -> None:
    """A branch's scale does not matter behind its norm."""
    model = tiny_model(num_layers=1, branch_norm=True, norm_eps=1e-12)
    before = model(IDS_BS).logits_BSV
    model.layers[0].attention.o_proj.weight.mul_(7.0)
    torch.testing.assert_close(model(IDS_BS).logits_BSV, before, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_statistics_without_a_gate_are_those_of_even_gates() -> None:
    mask_BS = torch.ones(2, 8, dtype=torch.bool)
    mask_BS[1, 5:] = False
    for mask in (None, mask_BS):
        sums_LB, count_B = tiny_model(branch_mix="mean")(IDS_BS, padding_mask_BS=mask).layer_sums
        for name, value in (("gate", 0.5), ("entropy", math.log(2.0)), ("square", 0.25)):
            torch.testing.assert_close(sums_LB[name], value * count_B.expand(2, 2))


@torch.no_grad()
def test_without_global_rotation_only_order_and_window_show_the_position() -> None:
    """One layer of global heads alone sees a set of earlier tokens; with local heads it sees their places."""

    def last_logits(global_heads: int, global_rope: bool, ids_BS: Tensor) -> Tensor:
        shape = {"layer_pattern": "A", "global_heads": global_heads, "srte_encoding": "none", "window_size": 8}
        return tiny_model(**shape, global_rope=global_rope)(ids_BS).logits_BSV[:, -1]

    swapped_BS = IDS_BS[:, [3, 2, 1, 0, 5, 4, 6, 7]]
    torch.testing.assert_close(last_logits(4, False, IDS_BS), last_logits(4, False, swapped_BS), atol=1e-5, rtol=1e-4)
    for heads, rope in ((4, True), (2, False)):
        difference = last_logits(heads, rope, IDS_BS) - last_logits(heads, rope, swapped_BS)
        assert float(difference.abs().max()) > 1e-3


@torch.no_grad()
def test_local_heads_are_rotated_as_before() -> None:
    """With the values of the global heads zero, their rotation does not show."""
    with_rope, without = (tiny_model(layer_pattern="A", global_rope=rope) for rope in (True, False))
    for model in (with_rope, without):
        model.layers[0].attention.v_proj.weight[8:] = 0.0  # one local and one global key/value head of 8 channels
    torch.testing.assert_close(with_rope(IDS_BS).logits_BSV, without(IDS_BS).logits_BSV)


@pytest.mark.parametrize("mix", ["gated_sum", "sum"])
def test_initial_values(mix: str) -> None:
    model = FusionTreeModel(tiny_config(hidden_size=128, branch_mix=mix, branch_norm=True, num_layers=8))
    initialize_model(model, 0)
    values = dict(model.named_parameters())
    assert torch.equal(values["layers.0.branch_norm.weight"], torch.ones(256))
    for name in ("mamba.out_proj", "attention.o_proj", "mlp.down"):
        assert float(values[f"layers.0.{name}.weight"].detach().std()) == pytest.approx(0.06 / 4, rel=0.05)
    assert float(values["layers.0.attention.q_proj.weight"].detach().std()) == pytest.approx(0.06, rel=0.05)
    assert no_weight_decay("layers.0.branch_norm.weight", model.config)
    assert not no_weight_decay("layers.0.attention.o_proj.weight", model.config)


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"branch_norm": True}, {"none": 64, "selective": 0}),
        ({"branch_mix": "gated_sum"}, {"none": -32, "selective": 0}),
        ({"branch_mix": "mean"}, {"none": -(8 + 32), "selective": -(8 + 32)}),
        ({"branch_mix": "concat"}, {"none": -(8 + 32) - 32, "selective": -(8 + 32)}),
        ({"mlp_input": "residual"}, {"none": 64, "selective": 32}),
    ],
)
def test_kept_elements_of_a_fused_layer(changes: dict, more: dict[str, int]) -> None:
    for mode, expected in more.items():
        difference = kept_elements(tiny_config(**changes), 0, mode, 1) - kept_elements(tiny_config(), 0, mode, 1)
        assert difference == expected, mode


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch_mix": "mean", "mlp_input": "residual"}, "does not read the alignment"),
        ({"branch_mix": "concat", "load_balance_coeff": 0.1}, "load_balance_coeff 0.1 needs a gate"),
        ({"branch_mix": "sum", "entropy_reg_coeff": -0.1}, "entropy_reg_coeff -0.1 needs a gate"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
