"""Settings that only change numbers reach the places that use them."""

from __future__ import annotations

import pytest
import torch

from fusiontree.models.norm import GatedRMSNorm, RMSNorm
from tests.helpers import tiny_model

IDS_BS = torch.arange(24).remainder(64)[None]


def test_every_norm_has_the_configured_epsilon() -> None:
    model = tiny_model(norm_eps=3.0)
    norms = [module for module in model.modules() if isinstance(module, RMSNorm | GatedRMSNorm)]
    assert len(norms) == 1 + 2 * len(model.layers)  # the last one; of each block, and of its Mamba-2 mixer
    assert {norm.eps for norm in norms} == {3.0}
    x = torch.full((1, 1, 32), 2.0)
    torch.testing.assert_close(model.norm(x), x / (4.0 + 3.0) ** 0.5)


@pytest.mark.parametrize("setting", ["rope_theta", "norm_eps"])
def test_logits_depend_on_it(setting: str) -> None:
    with torch.no_grad():
        ours, theirs = (tiny_model(**{setting: value})(IDS_BS).logits_BSV for value in (0.5, 20.0))
    assert float((ours - theirs).abs().max()) > 1e-3
