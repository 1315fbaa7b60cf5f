from __future__ import annotations

import math

import torch

from fusiontree.models.model import LayerSums, ModelOutput
from fusiontree.training.losses import GlobalCounts, LossWeights, loss_terms

WEIGHTS = LossWeights(load_balance=0.5, entropy=0.25, z_loss=0.125, gate_target=0.5, gate_margin=0.1)


def terms_of(gate_LBT: torch.Tensor, weight_B: torch.Tensor, counts: GlobalCounts):
    entropy = -(gate_LBT * gate_LBT.log() + (1 - gate_LBT) * (1 - gate_LBT).log())
    count_B = torch.full((gate_LBT.shape[1],), float(gate_LBT.shape[2]))
    sums = LayerSums({"gate": gate_LBT.sum(-1), "entropy": entropy.sum(-1)}, count_B)
    output = ModelOutput(torch.tensor(12.0), torch.tensor(8.0), None, sums, None)
    return loss_terms(output, weight_B, WEIGHTS, counts)


def test_hand_computed_value() -> None:
    gate = torch.tensor([[[0.9, 0.9], [0.5, 0.5]], [[0.2, 0.2], [0.45, 0.45]]])  # two layers, two rows
    terms = terms_of(gate, torch.ones(2), GlobalCounts(tokens=4, rows=2))
    assert math.isclose(float(terms.lm), 3.0)
    assert math.isclose(float(terms.z), 2.0)
    # hinges: |0.9-0.5|-0.1 = 0.3, 0, |0.2-0.5|-0.1 = 0.2, 0; mean over 2 layers and 2 rows
    assert math.isclose(float(terms.load_balance), 0.5 / 4, rel_tol=1e-6)
    total = 3.0 + 0.125 * 2.0 + 0.5 * 0.125 + 0.25 * float(terms.entropy)
    assert math.isclose(float(terms.total), total, rel_tol=1e-6)


def test_a_teacher_takes_its_share_of_the_cross_entropy() -> None:
    sums = LayerSums({"gate": torch.full((1, 1), 2.0), "entropy": torch.zeros(1, 1)}, torch.tensor([4.0]))
    output = ModelOutput(torch.tensor(12.0), torch.tensor(8.0), None, sums, None, divergence_sum=torch.tensor(6.0))
    weights = LossWeights(0.5, 0.25, 0.125, 0.5, 0.1, distillation=0.75)
    terms = loss_terms(output, torch.ones(1), weights, GlobalCounts(tokens=4, rows=1))
    assert (float(terms.lm), float(terms.divergence)) == (3.0, 1.5)
    assert float(terms.total) == 0.25 * 3.0 + 0.75 * 1.5 + 0.125 * 2.0


def test_shares_of_micro_batches_add_up_and_fillers_count_nothing() -> None:
    torch.manual_seed(0)
    gate = torch.rand(3, 4, 5).clamp(0.01, 0.99)
    counts = GlobalCounts(tokens=10, rows=3)
    whole = terms_of(gate, torch.tensor([1.0, 1, 1, 0]), counts)
    parts = [terms_of(gate[:, i : i + 1], torch.tensor([float(i < 3)]), counts) for i in range(4)]
    unfilled = terms_of(gate[:, :3], torch.ones(3), counts)
    for name in ("load_balance", "entropy"):
        assert torch.isclose(getattr(whole, name), sum(getattr(p, name) for p in parts))
        assert torch.isclose(getattr(whole, name), getattr(unfilled, name))


def test_gradient_pushes_towards_the_target() -> None:
    gate = torch.full((1, 1, 4), 0.9, requires_grad=True)
    terms_of(gate, torch.ones(1), GlobalCounts(1, 1)).load_balance.backward()
    assert (gate.grad > 0).all()
    inside = torch.full((1, 1, 4), 0.55, requires_grad=True)
    terms_of(inside, torch.ones(1), GlobalCounts(1, 1)).load_balance.backward()
    assert (inside.grad == 0).all()
