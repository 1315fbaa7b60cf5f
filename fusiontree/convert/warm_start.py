"""Warm start: a new model, filled from other weights by the map of :mod:`fusiontree.convert.name_map`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusiontree.convert.fill_plan import Piece, matched_layers, plan, plan_of_head, rows_of
from fusiontree.convert.foreign import Agreement, Foreign
from fusiontree.convert.name_map import NameMap
from fusiontree.convert.reader import MODEL, CheckpointSource, Entry, Original, parameter_shapes
from fusiontree.convert.weights import open_weights
from fusiontree.models.initialization import initialize_parameter
from fusiontree.utils.errors import UserError

_LAYER = re.compile(r"layers\.(\d+)\.")


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
        self._model = self.model_config
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
        theirs = matched_layers(name_map, self._weights.entries)
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
