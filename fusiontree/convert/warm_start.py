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

Every source tensor must be named or ignored, and every named tensor must exist. Parameters that no source tensor fills
keep their initial values.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import yaml
from pydantic import ValidationError
from torch import Tensor

from fusiontree.convert.hf import SafetensorsFolder
from fusiontree.convert.reader import MODEL, CheckpointSource, Entry, parameter_shapes
from fusiontree.convert.safetensors_file import SafetensorsFile
from fusiontree.models.config import ModelConfig
from fusiontree.models.initialization import initialize_parameter
from fusiontree.models.mixers import distinct_mixers
from fusiontree.utils.errors import UserError, nearest
from fusiontree.utils.settings import Section, setting


class TensorRule(Section):
    """Targets of a source tensor, or of one source tensor per layer."""

    theirs: str = setting(..., "Name of a tensor; {layer} stands for a number.")
    ours: str | dict[str, list[str]] = setting(..., "Name of a parameter, or for each the blocks it is made of.")
    split: list[str] | None = setting(None, "Names of the blocks along the first axis, in order.")
    transpose: bool = setting(False, "Swap the two axes first.")
    squeeze: int | None = setting(None, "Drop this axis, of size one, first.")
    grow: bool = setting(False, "Theirs may have fewer rows; the rest keeps its initial values.")
    optional: bool = setting(False, "It may be absent.")


class NameMap(Section):
    """The content of a map file."""

    tensors: list[TensorRule] = setting(..., "What goes where.", min_length=1)
    layers: dict[int, int] | None = setting(None, "Their layer: ours; others are left out. Absent means all.")
    sizes: dict[str, int] = setting({}, "Sizes of blocks that the configuration does not know.")
    ignore: list[str] = setting([], "Patterns of tensors to leave out, with * and ?.")


class Piece(NamedTuple):
    """Rows of a source tensor, after its rule's reshaping."""

    theirs: str
    rule: TensorRule
    start: int
    stop: int | None
    """None means to the end."""


class Weights(Protocol):
    """Files of tensors."""

    entries: dict[str, Entry]

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        ...


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
    except yaml.YAMLError as error:
        raise UserError(f"map '{path}' is not valid YAML: {error}") from error
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()]
        raise UserError(f"map '{path}':\n  " + "\n  ".join(lines)) from None


class MappedWeights(CheckpointSource):
    """A new FusionTree model, partly filled from other weights."""

    def __init__(self, path: Path, name_map: NameMap, config: dict[str, Any], seed: int) -> None:
        """Open the weights and find the source of every parameter.

        Args:
            path: a safetensors or PyTorch file, or a folder of them.
            name_map: targets of the source tensors.
            config: full configuration of the new run.
            seed: of the initial values.

        Raises:
            UserError: the map does not match the weights or the model.
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

    @property
    def initial(self) -> list[str]:
        """Parameters that keep their initial values."""
        return [name for name in self._shapes if name not in self.filled]

    def read(self, name: str) -> Tensor:
        """Return one parameter in fp32."""
        name = name.removeprefix(MODEL)
        shape = self._shapes[name]
        if name not in self.filled:
            return initialize_parameter(name, shape, self._model, self._seed)
        parts = [reshaped(self._weights.read(p.theirs), p)[p.start : p.stop].float() for p in self.filled[name]]
        values = torch.cat(parts) if len(parts) > 1 else parts[0]
        if len(values) < shape[0] and self.filled[name][0].rule.grow:
            rest = initialize_parameter(name, shape, self._model, self._seed, rows=slice(len(values), shape[0]))
            values = torch.cat([values, rest])
        if tuple(values.shape) != shape:
            theirs = ", ".join(f"'{p.theirs}' {self._weights.entries[p.theirs].shape}" for p in self.filled[name])
            raise UserError(f"{theirs} make {tuple(values.shape)}, and our '{name}' is {shape}; change map or model")
        return values.contiguous()


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
    sizes = block_sizes(config) | name_map.sizes
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
            for ours, pieces in _pieces(rule, name, sizes, theirs[name]).items():
                ours = ours.replace("{layer}", str(target))
                if ours not in shapes:
                    raise UserError(
                        f"map: '{name}' goes to '{ours}', which is no parameter of the model"
                        f"{nearest(ours, shapes)}; change the map, its 'layers', or the configuration"
                    )
                if ours in filled:
                    raise UserError(f"map: '{ours}' is filled twice, from '{filled[ours][0].theirs}' and '{name}'")
                filled[ours] = pieces
    forgotten = sorted(theirs.keys() - used)
    if forgotten:
        more = f" and {len(forgotten) - 4} more" if len(forgotten) > 4 else ""
        raise UserError(
            f"the map says nothing of {', '.join(forgotten[:4])}{more}; name them under tensors, or under ignore"
        )
    return filled


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


def _matches(pattern: str, names: dict[str, Entry]) -> Iterator[tuple[str, int | None]]:
    expression = re.compile(re.escape(pattern).replace(r"\{layer\}", r"(?P<layer>\d+)", 1))
    for name in names:
        if match := expression.fullmatch(name):
            layer = match.groupdict().get("layer")
            yield name, None if layer is None else int(layer)


def _pieces(rule: TensorRule, name: str, sizes: dict[str, int], entry: Entry) -> dict[str, list[Piece]]:
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
    rows = entry.shape[1 if rule.transpose else 0]
    if start != rows:
        parts = " + ".join(f"{block} {sizes[block]}" for block in rule.split)
        raise UserError(f"'{name}' has {rows} rows, and {parts} make {start}: the configuration is of another shape")
    wanted = [block for blocks in rule.ours.values() for block in blocks]
    if sorted(wanted) != sorted(rule.split):
        raise UserError(f"map: '{rule.theirs}' is split into {rule.split} and 'ours' takes {wanted}; take each once")
    return {ours: [Piece(name, rule, *places[block]) for block in blocks] for ours, blocks in rule.ours.items()}


def open_weights(path: Path) -> Weights:
    """Open a file of weights or a folder of them; nothing in them is executed.

    Raises:
        UserError: there are none.
    """
    if not path.exists():
        raise UserError(f"source '{path}' does not exist")
    if path.is_file():
        return SafetensorsFile(path) if path.suffix == ".safetensors" else _TorchFiles([path])
    if any(path.glob("*.safetensors")):
        return SafetensorsFolder(path)
    files = sorted(path.glob("*.bin")) or sorted(path.glob("*.pt"))
    if not files:
        raise UserError(f"source '{path}' holds no .safetensors, .bin or .pt file; give the folder with the weights")
    return _TorchFiles(files)


class _TorchFiles:
    """Files of torch.save, mapped into memory and read by torch's unpickler that creates only tensors."""

    def __init__(self, files: list[Path]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for file in files:
            try:
                values = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            except Exception as error:  # the pickle module raises many kinds
                raise UserError(
                    f"{file} cannot be read as tensors alone ({str(error).splitlines()[0]}); save its state dict as "
                    f"safetensors and give that"
                ) from error
            self._tensors |= {name: value for name, value in values.items() if isinstance(value, Tensor)}
        self.entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].clone()
