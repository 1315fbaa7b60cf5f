"""Exports of every block: its mix, norms, MLP and alignment, with all mixers. Shape legend: B rows, S tokens."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.convert.formats import Options, open_source
from fusiontree.generation.decoding import generate
from fusiontree.generation.sampling import SamplingConfig
from fusiontree.models.config import ModelConfig
from fusiontree.models.model import FusionTreeModel
from tests.convert.checkpoints import all_tensors, convert, equal, training_run
from tests.convert.test_hf import their_model
from tests.helpers import tiny_model
from tests.models.test_padding import LENGTHS, pad, texts

LAYERS: dict[str, Any] = {
    "letters": {"G": ["gated_delta_net", "attention"], "D": ["gated_delta_net"], "H": ["attention", "mamba2"]},
    "mixers": {"gated_delta_net": {"key_dim": 4, "value_dim": 8, "chunk_size": 5, "A_init_range": [0.01, 0.02]}},
}
BLOCKS = [
    {"branch_mix": mix, "mlp_input": mlp_input, "branch_norm": norm, "use_alignment": aligned}
    for mix, mlp_input, norm, aligned in product(
        ("gate", "gated_sum", "mean", "concat", "sum"), ("branches", "residual"), (False, True), (False, True)
    )
    if mix in ("gate", "gated_sum") or mlp_input == "branches" or not aligned
]
"""Every combination that a configuration may have."""
REST = [
    {"layer_pattern": "FMA", "mlp_activation": "gelu", "global_rope": False, "gate_rank": 3},
    {"layer_pattern": "GDH", "mlp_activation": "swiglu", "global_rope": True, "gate_rank": 32, **LAYERS},
    {"layer_pattern": "MA", "mlp_activation": "swiglu", "global_rope": False, "srte_encoding": "none"},
]


def drawn(**values: Any) -> FusionTreeModel:
    """A tiny model whose norms have weights of their own."""
    model = tiny_model(**values).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return model


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether logits differ by at most 1e-5 of the largest."""
    return float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("number", range(len(BLOCKS)))
@torch.no_grad()
def test_every_block_computes_the_logits_and_tokens_of_training(number: int) -> None:
    for rest in REST:
        ours = drawn(**BLOCKS[number], **rest)
        theirs = their_model(ours)
        for side in ("left", "right"):
            ids_BS, mask_BS = pad(side)
            want = ours(ids_BS, padding_mask_BS=mask_BS).logits_BSV[mask_BS]
            got = theirs(ids_BS, attention_mask=mask_BS.int(), use_cache=False).logits[mask_BS]
            assert near(got, want), f"{BLOCKS[number]} {rest} {side}"
        whole = ours(ids_BS[2:3]).logits_BSV
        cache, pieces = None, []
        for piece in ids_BS[2:3].split([8, *[1] * 11], dim=1):
            output = theirs(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
        assert near(torch.cat(pieces, dim=1), whole), f"{BLOCKS[number]} {rest}"
        prompts = [text.tolist() for text in texts()]
        rows = generate(ours, prompts, max_new_tokens=6, sampling=SamplingConfig(greedy=True)).rows
        ids_BS, mask_BS = pad("left")
        tokens = theirs.generate(ids_BS, attention_mask=mask_BS.int(), max_new_tokens=6, do_sample=False)
        assert [row.tokens for row in rows] == tokens[:, max(LENGTHS) :].tolist()


@pytest.mark.parametrize("block", [BLOCKS[-1], {"branch_mix": "concat", "branch_norm": True}])
def test_blocks_survive_a_conversion_to_every_format(block: dict[str, Any], tmp_path: Path) -> None:
    training_run(tmp_path / "run", layer_pattern="FMA", global_rope=False, mlp_activation="swiglu", **block)
    before = all_tensors(tmp_path / "run")
    for form, options in {"hf": [], "safetensors": [], "megatron": ["--tp", "2"], "zero": ["--dp", "2"]}.items():
        there = tmp_path / (f"{form}.safetensors" if form == "safetensors" else form)
        convert(tmp_path / "run", there, "--to", form, *options)
        convert(there, tmp_path / f"{form} again", "--to", "dcp")
        after = all_tensors(tmp_path / f"{form} again")
        weights = ({n: t for n, t in tensors.items() if n.startswith("model.")} for tensors in (before, after))
        assert equal(*weights), form
        assert equal(before, after) or form in ("hf", "safetensors"), form


def test_a_config_without_the_settings_of_blocks_means_the_default(tmp_path: Path) -> None:
    from fusiontree.convert.hf_model.configuration_fusiontree import FusionTreeConfig

    training_run(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "hf", "--to", "hf")
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    names = ("branch_norm", "branch_mix", "mlp_input", "global_rope")
    older = {name: value for name, value in values.items() if name not in names}
    assert len(older) == len(values) - len(names)
    (tmp_path / "hf" / "config.json").write_text(json.dumps(older))
    _, source = open_source(tmp_path / "hf", "hf", Options())
    for config in (source.model_config, FusionTreeConfig(**older)):
        assert [getattr(config, name) for name in names] == [ModelConfig.model_fields[name].default for name in names]
