"""Warm start: a new model, filled from other weights by the map of :mod:`fusiontree.convert.name_map`."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusiontree.convert.foreign import Agreement, Foreign
from fusiontree.convert.name_map import NameMap, TensorRule
from fusiontree.convert.reader import MODEL, CheckpointSource, Entry, Original, parameter_shapes
from fusiontree.convert.weights import open_weights
from fusiontree.models.config import ModelConfig
from fusiontree.models.initialization import initialize_parameter
from fusiontree.models.mixers import distinct_mixers
from fusiontree.utils.errors import UserError, nearest

_LAYER = re.compile(r"layers\.(\d+)\.")


class Piece(NamedTuple):
    """Rows of a source tensor, after its rule's reshaping."""

    theirs: str
    rule: TensorRule
    start: int
    stop: int | None
    """None means to the end."""
    heads: int = 1
    """The rows, divided into this many equal ranges: one from each of as many equal ranges of the source."""


class MappedWeights(CheckpointSource):
    """A new FusionTree model, partly filled from other weights."""

    def __init__(
        self,
        path: Path,
        name_map: NameMap,
        config: dict[str, Any],
        seed: int,
        foreign: Foreign | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        """Open the weights and find the source of every parameter.

        Args:
            path: a safetensors or PyTorch file, or a folder of them.
            name_map: targets of the source tensors.
            config: full configuration of the new run, with the settings that are taken from the source.
            seed: of the initial values.
            foreign: the source's configuration, if it has one.
            agreement: how it fits ``config``.

        Raises:
            UserError: the map does not match the weights or the model, or the source's head has no place.
        """
        self.config = config
        self.files = []
        self._weights = open_weights(path)
        self._model = ModelConfig.model_validate(config["model"])
        self._seed = seed
        self._shapes = parameter_shapes(self._model)
        self.entries = {MODEL + name: Entry(shape, torch.float32) for name, shape in self._shapes.items()}
        self.filled = plan(name_map, self._weights.entries, self._shapes, self._model)
        """Pieces of each filled parameter, in order."""
        self._map, self._foreign = name_map, foreign
        self._check_numbers()
        self._place_head()
        layers = {int(match[1]) for name in self.filled if (match := _LAYER.match(name))}
        self._constants = dict(self._find_constants(layers))
        differences = list(agreement.differences) if agreement else []
        unfilled = sorted(set(range(self._model.num_layers)) - layers)
        if unfilled:
            differences.append(f"layers {', '.join(map(str, unfilled))} keep initial values")
        theirs = self._their_layers()
        if left_out := sorted(theirs - set(theirs if name_map.layers is None else name_map.layers)):
            differences.append(f"layers {', '.join(map(str, left_out))} of the source are left out")
        folder = foreign.file.parent if foreign is not None and path.is_dir() else None
        rows = [self._weights.entries[p.theirs].shape[0] for p in self.filled.get("embed.weight", [])]
        longest = foreign.longest if foreign is not None else None
        self.original = Original(folder, sum(rows), longest, differences, name_map.exact)

    @property
    def initial(self) -> list[str]:
        """Parameters that keep their initial values."""
        return [name for name in self._shapes if name not in self.filled and name not in self._constants]

    def _check_numbers(self) -> None:
        """Check that no filled parameter comes from integers.

        Raises:
            UserError: the weights are quantized.
        """
        for pieces in self.filled.values():
            for piece in pieces:
                dtype = self._weights.entries[piece.theirs].dtype
                if not dtype.is_floating_point:
                    raise UserError(
                        f"'{piece.theirs}' holds {str(dtype).removeprefix('torch.')}: the weights are quantized, and "
                        f"this reads numbers as they are; save them in bf16 or fp32 first"
                    )

    def _place_head(self) -> None:
        """Give the head the source's embedding where the source ties both.

        Raises:
            UserError: nothing says what the head is, or the source's head has no place.
        """
        tied = self._foreign is not None and self._foreign.tied
        embedding, head = self.filled.get("embed.weight"), self.filled.get("head.weight")
        if not embedding:
            return
        if self._model.tie_word_embeddings or tied:
            theirs = head or plan_of_head(self._map, self._weights.entries)
            if theirs and "tie_word_embeddings" not in self._map.accept and not self._equal(theirs[0], embedding[0]):
                raise UserError(
                    f"'{theirs[0].theirs}' differs from '{embedding[0].theirs}', and "
                    f"{'config.json of the source' if tied else 'model.tie_word_embeddings'} says that both are one; "
                    f"set tie_word_embeddings false in {'config.json' if tied else 'the configuration'}"
                )
        if self._model.tie_word_embeddings or head or "head.weight" in self._map.initial:
            return
        if not tied:
            raise UserError(
                "no tensor of the source goes to 'head.weight', and no config.json beside the weights says that the "
                "embedding is the head too; set model.tie_word_embeddings true, name the head's tensor in the map, or "
                "list head.weight under the map's 'initial' to start from random values"
            )
        self.filled["head.weight"] = embedding

    def _equal(self, left: Piece, right: Piece) -> bool:
        return torch.equal(self._weights.read(left.theirs).float(), self._weights.read(right.theirs).float())

    def _their_layers(self) -> set[int]:
        """Return the source's layers that a rule of the map matches."""
        found = (_matches(rule.theirs, self._weights.entries) for rule in self._map.tensors)
        return {layer for matches in found for _, layer in matches if layer is not None}

    def _find_constants(self, layers: set[int]) -> Iterator[tuple[str, float | None]]:
        """Yield parameters that the map fills with the identity, with its factor, or with zeros, with None."""
        given: list[tuple[str, float | None]] = [
            *self._map.identity.items(),
            *((pattern, None) for pattern in self._map.zero),
        ]
        for pattern, factor in given:
            for name in [pattern.replace("{layer}", str(layer)) for layer in sorted(layers)]:
                shape = self._shapes.get(name)
                if name in self.filled or (factor is not None and shape and (len(shape) != 2 or shape[0] != shape[1])):
                    raise UserError(f"map: '{name}' is filled twice, or no square matrix for the identity")
                if shape is not None:
                    yield name, factor

    def read(self, name: str) -> Tensor:
        """Return one parameter in fp32."""
        name = name.removeprefix(MODEL)
        shape = self._shapes[name]
        if name in self._constants:
            factor = self._constants[name]
            return torch.zeros(shape) if factor is None else factor * torch.eye(*shape)
        if name not in self.filled:
            return initialize_parameter(name, shape, self._model, self._seed)
        theirs = ", ".join(f"'{p.theirs}' {self._weights.entries[p.theirs].shape}" for p in self.filled[name])
        try:
            values = torch.cat([rows_of(self._weights.read(p.theirs), p) for p in self.filled[name]])
            if self.filled[name][0].rule.repeat and shape[0] % len(values) == 0:
                values = torch.cat([values] * (shape[0] // len(values)))
            if len(values) < shape[0] and self.filled[name][0].rule.grow:
                rest = initialize_parameter(name, shape, self._model, self._seed, rows=slice(len(values), shape[0]))
                values = torch.cat([values, rest])
        except (RuntimeError, IndexError) as error:  # shapes that torch cannot join
            raise UserError(f"{theirs} do not make our '{name}' {shape}: {error}; change map or model") from error
        if tuple(values.shape) != shape:
            raise UserError(f"{theirs} make {tuple(values.shape)}, and our '{name}' is {shape}; change map or model")
        return values.contiguous()


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
