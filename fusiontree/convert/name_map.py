"""Warm start: loads weights of other models by a map from source tensors to FusionTree's parameters.

A map is a YAML file::

    layers: {0: 0, 1: 2}            # source layer: target layer; absent means all, each to the same number
    sizes: {extra: 128}             # blocks that the model's configuration does not know
    ignore: ["*.rotary_emb.inv_freq"]
    tensors:
      - theirs: backbone.layers.{layer}.mixer.in_proj.weight
        split: [z, x, B, C, dt]     # blocks along the first axis
        ours:
          layers.{layer}.mamba.in_proj.weight: [z, x, dt]
          layers.{layer}.mamba.bc_proj.weight: [B, C]
      - {theirs: backbone.embeddings.weight, ours: embed.weight, grow: true}
      - theirs: model.layers.{layer}.linear_attn.in_proj_ba.weight
        split: [b, a]
        per: query                  # b and a of the first query head, b and a of the second, …
        append: true                # after z and value, which an earlier rule gives in_proj
        ours: {layers.{layer}.delta.in_proj.weight: [a, b]}
    identity: {"layers.{layer}.out_proj.weight": 2.0}    # in every layer that the map fills
    zero: ["layers.{layer}.mlp.down.weight"]
    accept: [window_size]           # settings of the source's config.json that may differ
    exact: true                     # the new model computes what the source does

Every source tensor must be named or ignored, and every named tensor must exist. Parameters that no source tensor fills
keep their initial values. The source's config.json is read by :mod:`fusiontree.convert.foreign`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import yaml
from pydantic import ValidationError

from fusiontree.utils.errors import UserError, nearest
from fusiontree.utils.settings import Section, setting


class TensorRule(Section):
    """Targets of a source tensor, or of one source tensor per layer."""

    theirs: str = setting(..., "Name of a tensor; {layer} stands for a number.")
    ours: str | dict[str, list[str]] = setting(..., "Name of a parameter, or for each the blocks it is made of.")
    split: list[str] | None = setting(None, "Names of the blocks along the first axis, in order.")
    per: str | None = setting(
        None, "A block with heads: the source has the rows of all blocks for its first head, then for the next."
    )
    transpose: bool = setting(False, "Swap the two axes first.")
    squeeze: int | None = setting(None, "Drop this axis, of size one, first.")
    add: float = setting(0.0, "Added to every number; 1 for norms that multiply by 1 + weight.")
    repeat: bool = setting(False, "Theirs is repeated along the first axis until it fills the parameter.")
    append: bool = setting(False, "Its rows follow those that the rules before it give the same parameters.")
    grow: bool = setting(False, "Theirs may have fewer rows; the rest keeps its initial values.")
    optional: bool = setting(False, "It may be absent.")

    @property
    def targets(self) -> list[str]:
        """Names of the parameters that it goes to, with {layer}."""
        return [self.ours] if isinstance(self.ours, str) else list(self.ours)


class NameMap(Section):
    """The content of a map file."""

    tensors: list[TensorRule] = setting(..., "What goes where.", min_length=1)
    layers: dict[int, int] | None = setting(None, "Their layer: ours; others are left out. Absent means all.")
    sizes: dict[str, int] = setting({}, "Sizes of blocks that the configuration does not know.")
    ignore: list[str] = setting([], "Patterns of tensors to leave out, with * and ?.")
    zero: list[str] = setting([], "Parameters to fill with zeros; {layer} stands for every layer that the map fills.")
    identity: dict[str, float] = setting({}, "Square parameters: factor of the identity that fills them.")
    initial: list[str] = setting([], "Parameters that may keep initial values: head.weight.")
    accept: list[str] = setting([], "Settings and keys of the source's config.json that may differ.")
    exact: bool = setting(False, "The filled model computes what the source does; the conversion compares logits.")

    @property
    def targets(self) -> list[str]:
        """Names of the parameters that tensors go to, with {layer}."""
        return [name for rule in self.tensors for name in rule.targets]


def in_layers(names: Iterable[str]) -> list[str]:
    """Return names of parameters with those of equal parameters of layers as one: ``layers.0-2,5.norm.weight``."""
    layers: dict[str, list[int]] = {}
    for name in names:
        match = re.match(r"layers\.(\d+)\.", name)
        pattern = name if match is None else f"layers.{{}}.{name[match.end() :]}"
        layers.setdefault(pattern, []).extend([] if match is None else [int(match[1])])
    found = []
    for pattern, numbers in layers.items():
        ranges: list[list[int]] = []
        for number in sorted(numbers):
            if ranges and number == ranges[-1][-1] + 1:
                ranges[-1][1:] = [number]
            else:
                ranges.append([number])
        found.append(pattern.format(",".join("-".join(map(str, each)) for each in ranges)) if ranges else pattern)
    return found


def read_map(path: Path) -> NameMap:
    """Return the map in a file.

    Raises:
        UserError: it is missing, no YAML, or has a key that maps do not have.
    """
    try:
        return NameMap.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        near = nearest(path.name, (p.name for p in path.parent.glob("*.yaml"))) if path.parent.is_dir() else ""
        raise UserError(f"map '{path}' cannot be read: {error.strerror}{near}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"map '{path}' is not valid YAML: {error}") from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
        raise UserError(f"map '{path}':\n  " + "\n  ".join(lines)) from None
