"""Joint projections change how sums are computed, never what: loss and gradients equal those of separate modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fusiontree.ops.documents import Documents
from fusiontree.parallel.activation_checkpointing import checkpoint_activations, fuse_projections
from tests.helpers import tiny_model
from tests.models.variants import VARIANTS

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "one branch": {"layer_pattern": "MA"},
    "swiglu": {"mlp_activation": "swiglu"},
    "gate and residual MLP": {"mlp_input": "residual"},
    "norms of branches": {"branch_norm": True},
    "mean": {"use_alignment": False},
    "sum": {"branch_mix": "sum", "layer_pattern": "FMA"},
    "gated sum": {"branch_mix": "gated_sum", "layer_pattern": "FMA"},
    "concatenation": {"branch_mix": "concat", "layer_pattern": "FMA"},
    "residual sum": {"branch_mix": "sum", "mlp_input": "residual", "use_alignment": False, "layer_pattern": "FMA"},
    **{name: VARIANTS[name] for name in ("learned time encoding", "Gated DeltaNet")},
}


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients(variant: str, mode: str) -> None:
    separate, joint = (_results(VARIANTS[variant], mode, joint) for joint in (False, True))
    assert separate.keys() == joint.keys()
    for name, value in separate.items():
        torch.testing.assert_close(joint[name], value, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: name + text)


def _results(changes: dict[str, Any], mode: str, joint: bool) -> dict[str, Tensor]:
    model = tiny_model(**changes).double()
    checkpoint_activations(model, mode)
    if joint:
        fuse_projections(model)
    ids_BS = torch.arange(36).reshape(2, 18) % 23
    documents = Documents.from_positions(torch.cat([torch.arange(7), torch.arange(11)]).expand(2, 18).contiguous())
    output = model(ids_BS, labels_BS=ids_BS.roll(-1, 1), documents=documents)
    sums = output.layer_sums.sums_LB
    (output.loss_sum + sums["gate"].sum() + 0.5 * sums["entropy"].sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss_sum.detach(), **gradients}
