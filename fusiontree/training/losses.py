"""The training loss: tokens, gates and their weights.

Shape legend: L layers, B rows of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fusiontree.engines.base import ModelOutput


@dataclass(frozen=True)
class LossWeights:
    """Coefficients of the loss terms and the interval that costs the gates nothing."""

    load_balance: float
    entropy: float
    z_loss: float
    gate_target: float
    gate_margin: float
    distillation: float = 0.0
    """Weight of the divergence from the teacher; the cross entropy has 1 minus this."""


@dataclass(frozen=True)
class GlobalCounts:
    """Denominators of the sums of one optimizer step, over all ranks and micro-batches; each at least 1."""

    tokens: Tensor | float
    """Labels that count; on the device (scalar, fp32), so that the host does not wait for other ranks' counts."""
    rows: Tensor | float
    """Rows that count, fillers excluded; on the device (scalar, fp32) for the same reason."""


@dataclass(frozen=True)
class LossTerms:
    """A micro-batch's addend to each term; the sum over all micro-batches and ranks is the term."""

    total: Tensor
    lm: Tensor
    z: Tensor
    load_balance: Tensor
    entropy: Tensor
    divergence: Tensor
    """From the teacher; 0 without a teacher."""


def loss_terms(output: ModelOutput, row_weight_B: Tensor, weights: LossWeights, counts: GlobalCounts) -> LossTerms:
    """Combine a micro-batch's sums into its addend to the loss.

    The load balance term is a hinge on each row's mean gate (all its tokens and channels) in each layer: zero within
    ``gate_target ± gate_margin``, linear outside. The entropy term is the gates' mean binary entropy in nats. Both
    are averaged over layers and the global batch's rows.

    Args:
        output: the model's output, given labels.
        row_weight_B: 0 for filler rows, else 1.
        weights: coefficients.
        counts: global denominators.
    """
    assert output.loss_sum is not None and output.z_sum is not None, "a micro-batch has labels"
    sums_LB, count_B = output.layer_sums
    gate_sum_LB, entropy_sum_LB = sums_LB["gate"], sums_LB["entropy"]
    layers = gate_sum_LB.shape[0]
    per_row = 1.0 / count_B.clamp(min=1)
    share_B = row_weight_B / (layers * counts.rows)
    distance_LB = (gate_sum_LB * per_row - weights.gate_target).abs() - weights.gate_margin
    load_balance = (distance_LB.clamp(min=0) * share_B).sum()
    entropy = (entropy_sum_LB * per_row * share_B).sum()
    lm = output.loss_sum / counts.tokens
    z = output.z_sum / counts.tokens
    assert (output.divergence_sum is None) == (weights.distillation == 0), "a teacher has a weight in the loss"
    total, divergence = lm, lm.new_zeros(())
    if output.divergence_sum is not None:
        divergence = output.divergence_sum / counts.tokens
        total = (1.0 - weights.distillation) * lm + weights.distillation * divergence
    total = total + weights.z_loss * z + weights.load_balance * load_balance + weights.entropy * entropy
    return LossTerms(total, lm, z, load_balance, entropy, divergence)
