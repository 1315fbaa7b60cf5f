"""Which rows of which source tensors fill each parameter: the rules of a map, applied to names and shapes."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fusiontree.convert.name_map import NameMap, TensorRule
from fusiontree.convert.reader import Entry
from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers import distinct_mixers
from fusiontree.utils.errors import UserError, nearest


class Piece(NamedTuple):
    """Rows of a source tensor, after its rule's reshaping."""

    theirs: str
    rule: TensorRule
    start: int
    stop: int | None
    """None means to the end."""
    heads: int = 1
    """The rows, divided into this many equal ranges: one from each of as many equal ranges of the source."""


def rows_of(tensor: Tensor, piece: Piece) -> Tensor:
    """Return the rows of a source tensor that a piece takes, in fp32.

    Raises:
        UserError: the rule does not fit its shape.
    """
    start, stop = piece.start // piece.heads, None if piece.stop is None else piece.stop // piece.heads
    of_heads = reshaped(tensor, piece).unflatten(0, (piece.heads, -1))
    return of_heads[:, start:stop].flatten(0, 1).float() + piece.rule.add


def reshaped(tensor: Tensor, piece: Piece) -> Tensor:
    """Return a source tensor with the axes of the target.

    Raises:
        UserError: the rule does not fit its shape.
    """
    shape = tuple(tensor.shape)
    if piece.rule.squeeze is not None:
        if piece.rule.squeeze >= tensor.ndim or shape[piece.rule.squeeze] != 1:
            raise UserError(f"'{piece.theirs}' is {shape}; its axis {piece.rule.squeeze} cannot be dropped")
        tensor = tensor.squeeze(piece.rule.squeeze)
    if piece.rule.transpose:
        if tensor.ndim != 2:
            raise UserError(f"'{piece.theirs}' is {shape}; only matrices can be transposed")
        tensor = tensor.t()
    return tensor


def plan(
    name_map: NameMap, theirs: dict[str, Entry], shapes: dict[str, tuple[int, ...]], config: ModelConfig
) -> dict[str, list[Piece]]:
    """Return the pieces of every parameter that the map fills.

    Raises:
        UserError: the map does not match the weights or the model; the message names the first mismatch.
    """
    filled: dict[str, list[Piece]] = {}
    used = {name for name in theirs if any(fnmatch.fnmatchcase(name, pattern) for pattern in name_map.ignore)}
    used |= {name for name, entry in theirs.items() if entry.dtype is torch.bool}  # masks, no weights
    sizes, heads = block_sizes(config) | name_map.sizes, block_heads(config)
    for rule in name_map.tensors:
        matches = list(_matches(rule.theirs, theirs))
        if not matches and not rule.optional:
            near = nearest(rule.theirs.replace("{layer}", "0"), theirs)
            raise UserError(f"map: '{rule.theirs}' matches no tensor of the source; remove it or set optional{near}")
        for name, layer in matches:
            used.add(name)
            if layer is not None and name_map.layers is not None and layer not in name_map.layers:
                continue
            target = layer if name_map.layers is None or layer is None else name_map.layers[layer]
            targets = {ours: ours.replace("{layer}", str(target)) for ours in rule.targets}
            for ours in targets.values():
                if ours not in shapes and ours != "head.weight":  # a tied head is no parameter
                    raise UserError(
                        f"map: '{name}' goes to '{ours}', which is no parameter of the model"
                        f"{nearest(ours, shapes)}; change the map, its 'layers', or the configuration"
                    )
            for key, pieces in _pieces(rule, name, sizes, heads, theirs[name]).items():
                ours = targets[key]
                if ours not in shapes:
                    continue
                if rule.append:
                    pieces = [*filled.get(ours, []), *pieces]
                elif ours in filled:
                    raise UserError(f"map: '{ours}' is filled twice, from '{filled[ours][0].theirs}' and '{name}'")
                filled[ours] = pieces
    forgotten = sorted(theirs.keys() - used)
    if forgotten:
        more = f" and {len(forgotten) - 4} more" if len(forgotten) > 4 else ""
        raise UserError(
            f"the map says nothing of {', '.join(forgotten[:4])}{more}; name them under tensors, or under ignore"
        )
    return filled


def plan_of_head(name_map: NameMap, theirs: dict[str, Entry]) -> list[Piece]:
    """Return the source's tensor that the map sends to the head, if there is one."""
    rules = [rule for rule in name_map.tensors if rule.ours == "head.weight"]
    return [Piece(name, rule, 0, None) for rule in rules for name, _ in _matches(rule.theirs, theirs)]


def matched_layers(name_map: NameMap, theirs: dict[str, Entry]) -> set[int]:
    """Return the source's layers that a rule of the map matches."""
    found = (_matches(rule.theirs, theirs) for rule in name_map.tensors)
    return {layer for matches in found for _, layer in matches if layer is not None}


def block_sizes(config: ModelConfig) -> dict[str, int]:
    """Return the sizes of the blocks that packed projections are known to have."""
    sizes = {"gate": config.mlp_size, "up": config.mlp_size}
    plans = [plan for mixer in distinct_mixers(config) for plan in mixer.tp_plan(config).items()]
    blocks = {block for _, split in plans for block in split.blocks}
    names = [block.name for block in blocks]
    sizes |= {block.name: block.size for block in blocks if names.count(block.name) == 1}  # the same in every parameter
    for name, split in plans:
        if name in ("q_proj.weight", "k_proj.weight", "v_proj.weight"):
            sizes[name[0]] = sum(block.size for block in split.blocks)
    return sizes


def block_heads(config: ModelConfig) -> dict[str, int]:
    """Return the number of heads or groups in each block."""
    plans = [plan for mixer in distinct_mixers(config) for plan in mixer.tp_plan(config).values()]
    return {block.name: block.units for split in plans for block in split.blocks}


def _matches(pattern: str, names: dict[str, Entry]) -> Iterator[tuple[str, int | None]]:
    expression = re.compile(re.escape(pattern).replace(r"\{layer\}", r"(?P<layer>\d+)", 1))
    for name in names:
        if match := expression.fullmatch(name):
            layer = match.groupdict().get("layer")
            yield name, None if layer is None else int(layer)


def _pieces(
    rule: TensorRule, name: str, sizes: dict[str, int], heads: dict[str, int], entry: Entry
) -> dict[str, list[Piece]]:
    """Return the pieces of each target of a rule."""
    if rule.split is None:
        if not isinstance(rule.ours, str):
            raise UserError(f"map: '{rule.theirs}' has blocks under 'ours' and no 'split' that names them in order")
        return {rule.ours: [Piece(name, rule, 0, None)]}
    if isinstance(rule.ours, str):
        raise UserError(f"map: '{rule.theirs}' is split; say under 'ours' which blocks each parameter is made of")
    unknown = [block for block in rule.split if block not in sizes]
    if unknown:
        raise UserError(f"map: size of block '{unknown[0]}' is not known{nearest(unknown[0], sizes)}; give it in sizes")
    places, start = {}, 0
    for block in rule.split:
        places[block] = (start, start + sizes[block])
        start += sizes[block]
    if len(entry.shape) < 1 + rule.transpose:
        raise UserError(f"map: '{name}' has shape {entry.shape} and cannot be split into rows")
    rows = entry.shape[1 if rule.transpose else 0]
    if start != rows:
        parts = " + ".join(f"{block} {sizes[block]}" for block in rule.split)
        raise UserError(f"'{name}' has {rows} rows, and {parts} make {start}: the configuration is of another shape")
    wanted = [block for blocks in rule.ours.values() for block in blocks]
    if sorted(wanted) != sorted(rule.split):
        raise UserError(f"map: '{rule.theirs}' is split into {rule.split} and 'ours' takes {wanted}; take each once")
    count = 1 if rule.per is None else heads.get(rule.per, 0)
    if not count or any(sizes[block] % count for block in rule.split):
        raise UserError(f"map: '{rule.theirs}': the heads of block '{rule.per}' do not divide {', '.join(rule.split)}")
    return {ours: [Piece(name, rule, *places[block], count) for block in blocks] for ours, blocks in rule.ours.items()}
