"""The variant of each of fla-core's kernels: one for the sizes it was chosen for, all of them otherwise."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fusiontree.ops.gated_delta import fla_tiles

NAME = "chunk_gated_delta_rule_fwd_kernel_h_blockdim64"


def variant(num_warps: int, num_stages: int, **tile: int) -> SimpleNamespace:
    return SimpleNamespace(kwargs=tile, num_warps=num_warps, num_stages=num_stages)


VARIANTS = [variant(w, s, BV=columns) for w in (2, 4) for s in (2, 3, 4) for columns in (32, 64)]


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the autotuner of the only kernel that the stand-in for fla-core has, within two decorators."""
    tuner = SimpleNamespace(configs=VARIANTS, early_config_prune=None, fn=None)
    for name in fla_tiles._KERNELS:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module: Any = sys.modules["fla.ops.common.chunk_delta_h"]
    setattr(module, NAME, SimpleNamespace(fn=SimpleNamespace(fn=tuner)))
    module.other = lambda: None
    fla_tiles.choose_tiles()
    return tuner


@pytest.mark.parametrize("where", ["arguments", "given"])
def test_one_variant_remains(tuner: SimpleNamespace, where: str) -> None:
    sizes = {"K": 128, "V": 64}
    kept = tuner.early_config_prune(
        VARIANTS, sizes if where == "arguments" else {}, **({} if where == "arguments" else sizes)
    )
    assert kept == [variant(4, 4, BV=32)]


@pytest.mark.parametrize("sizes", [{"K": 256, "V": 128}, {"K": 64, "V": 256}])
def test_wide_heads_are_measured(tuner: SimpleNamespace, sizes: dict[str, int]) -> None:
    assert tuner.early_config_prune(VARIANTS, sizes) == VARIANTS


def test_without_the_variant_all_are_measured(tuner: SimpleNamespace) -> None:
    others = [v for v in VARIANTS if v.num_stages != 4]
    assert tuner.early_config_prune(others, {"K": 64, "V": 64}) == others
