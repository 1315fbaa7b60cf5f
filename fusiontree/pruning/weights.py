"""The weights of a pruned model, selected from a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from fusiontree.convert.reader import MODEL, CheckpointSource, Entry, checked, parameter_shapes
from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers import mixer_class, mixer_of
from fusiontree.pruning.shapes import KeptLayer, mamba_heads_of, mamba_units, pruned_config

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_MLP_AXIS = {"mlp.up.weight": 0, "mlp.gate.weight": 0, "mlp.down.weight": 1}
_PER_BRANCH = {"align.up.weight": 1, "align.skip.weight": 1, "branch_norm.weight": 0}
"""Axis along which a parameter has ``hidden_size`` entries for each branch."""


class PrunedWeights(CheckpointSource):
    """The kept parts of a checkpoint, without states of the optimizer, as of a run at step 0."""

    def __init__(
        self, source: CheckpointSource, plan: Sequence[KeptLayer], norm_scale: dict[int, Tensor] | None = None
    ) -> None:
        """Select nothing yet.

        Args:
            source: the checkpoint.
            plan: what is kept, layer by layer.
            norm_scale: by layer of the source: factor of each kept channel of Mamba's gated norm, which makes up for
                the removed channels in the mean square (:func:`fusiontree.pruning.statistics.norm_scale`).
        """
        self.source, self.plan, self.norm_scale = source, list(plan), norm_scale or {}
        self._theirs = source.model_config
        ours = pruned_config(self._theirs, plan)
        self.config = {**source.config, "model": ours.model_dump(mode="json")}
        self.state, self.files = None, source.files
        dtype = {name: entry.dtype for name, entry in source.entries.items()}
        entries = {
            MODEL + name: Entry(shape, dtype[MODEL + self._source_name(name)])
            for name, shape in parameter_shapes(ours).items()
        }
        self.entries = checked(entries, ours, "the pruned model")

    def read(self, name: str) -> Tensor:
        """Return one tensor of the pruned model."""
        short = name.removeprefix(MODEL)
        tensor = self.source.read(MODEL + self._source_name(short))
        match = _LAYER.fullmatch(short)
        if match:
            tensor = self._selected(tensor, self.plan[int(match[1])], match[2])
        return tensor.contiguous()

    def _source_name(self, name: str) -> str:
        match = _LAYER.fullmatch(name)
        return f"layers.{self.plan[int(match[1])].layer}.{match[2]}" if match else name

    def _selected(self, tensor: Tensor, kept: KeptLayer, leaf: str) -> Tensor:
        """Return the kept part of a parameter of a layer, by its name in the layer."""
        config, names = self._theirs, self._theirs.branches[kept.layer]
        if leaf in _MLP_AXIS:
            return tensor.index_select(_MLP_AXIS[leaf], torch.tensor(kept.units["mlp"]))
        lost = len(kept.branches) < len(names)
        if leaf == "out_proj.weight" and lost and config.branch_mix == "mean":
            return tensor / 2  # a lone branch is its own mean; the missing branch counted as zeros
        if leaf in _PER_BRANCH or (leaf == "out_proj.weight" and config.branch_mix == "concat"):
            axis = _PER_BRANCH.get(leaf, 1)
            parts = dict(zip(names, tensor.chunk(len(names), dim=axis), strict=True))
            return torch.cat([parts[name] for name in kept.branches], dim=axis)
        owner = mixer_of(f"layers.{kept.layer}.{leaf}", config)
        if owner is None:
            return tensor
        tensor = _of_mixer(tensor, owner[1], owner[0].name, config.of_layer(kept.layer), kept)
        if (owner[0].name, owner[1]) == ("mamba2", "norm.weight") and kept.layer in self.norm_scale:
            tensor = (tensor * self.norm_scale[kept.layer].to(tensor.device)).to(tensor.dtype)
        return tensor


def _of_mixer(tensor: Tensor, leaf: str, name: str, config: ModelConfig, kept: KeptLayer) -> Tensor:
    """Return the kept units of a mixer's parameter; ``config`` has the sizes of the layer."""
    if name not in ("attention", "mamba2"):
        return tensor  # a plugin's mixer is kept or removed as a whole
    split = mixer_class(name).tp_plan(config).get(leaf)
    if split is None:
        return tensor
    rows: list[int] = []
    start = 0
    for block in split.blocks:
        width = block.size // block.units
        wanted = _units_of(block.name, leaf, config, kept)
        rows += [start + unit * width + offset for unit in wanted for offset in range(width)]
        start += block.size
    return tensor.index_select(split.axis, torch.tensor(rows, dtype=torch.int64))


def _units_of(block: str, leaf: str, config: ModelConfig, kept: KeptLayer) -> list[int]:
    """Return the kept units of a block of a parameter (:class:`fusiontree.models.mixers.split.Block`)."""
    if block in ("local", "global"):
        groups = kept.units[block]
        if leaf.startswith(("k_proj", "v_proj")):
            return list(groups)
        size = config.num_heads // config.kv_heads
        return [group * size + head for group in groups for head in range(size)]
    if block in ("B", "C"):
        by_group = config.mamba.n_groups > 1 and mamba_units(config) > 1
        return list(kept.units["mamba"]) if by_group else list(range(config.mamba.n_groups))
    return mamba_heads_of(config, kept.units["mamba"])
