"""Common interface to all formats: tensors under FusionTree's names (read one at a time), configuration, state."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusiontree.checkpoint.load import stored_model
from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers.base import Fp32Parameters
from fusiontree.models.model import FusionTreeModel
from fusiontree.optim.config import stored_spec
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import write_json

MODEL = "model."
"""Prefix of the parameters' names in a training checkpoint; states of the optimizer are ``optimizer.STATE.NAME``."""

COMPANION = "fusiontree.json"
"""File with configuration and small values that is added to the files of another library, which ignores it."""

TOKENIZER_FILES = ("tokenizer_info.json", "tokenizer.json")
"""A training checkpoint's tokenizer files."""


class Entry(NamedTuple):
    """Shape and type of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class Original(NamedTuple):
    """The model of another library that a checkpoint was filled from."""

    folder: Path | None
    """The folder that transformers loads; None if there is no configuration."""
    vocab_size: int
    longest: int | None
    """Tokens of the longest text that it was made for; None if unknown."""
    differences: list[str]
    """Reasons why the filled model does not compute what the original does."""
    exact: bool
    """True if the filled model must compute what the original does, unless there are ``differences``."""


class CheckpointSource(ABC):
    """A checkpoint that is open for reading."""

    config: dict[str, Any]
    """Resolved configuration of the run; at least its ``model`` section."""
    state: dict[str, Any] | None = None
    """Step, data position and so on of a training checkpoint; None where the format has none."""
    files: list[Path]
    """The tokenizer's files."""
    original: Original | None = None
    """Set if the weights come from another library's model."""
    entries: dict[str, Entry]
    """Every tensor by its name in a training checkpoint, ``model.…`` or ``optimizer.…``; a tied head occurs once."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return one tensor, contiguous on the CPU, in its own type."""

    @property
    def model_config(self) -> ModelConfig:
        """The model section, validated.

        Raises:
            UserError: it describes no model.
        """
        return stored_model(self.config, "the source's configuration")

    @property
    def has_optimizer(self) -> bool:
        """True if the checkpoint has the optimizer's states."""
        return any(not name.startswith(MODEL) for name in self.entries)

    @property
    def state_dtypes(self) -> dict[str, torch.dtype]:
        """Name and dtype of each state of the configured optimizer.

        Raises:
            UserError: the optimizer is not registered; its plugin is missing.
        """
        return {name: getattr(torch, dtype) for name, dtype in stored_spec(self.config).states.items()}


class Stream:
    """Reads the tensors of a source for a target: casts, hashes and counts them."""

    def __init__(self, source: CheckpointSource, dtype: torch.dtype | None, report: Callable[[int, int], None]) -> None:
        """Prepare.

        Args:
            source: of the tensors.
            dtype: of the target's parameters; None keeps them. Mixers' :class:`Fp32Parameters` stay fp32, and the
                optimizer's states keep their type.
            report: called with the bytes done and the total bytes.
        """
        self.source = source
        self.hashes: dict[str, str] = {}
        """SHA-256 of every tensor that was read, after the cast."""
        self._dtype = dtype
        self._stays_fp32 = {MODEL + name for name in fp32_parameters(source.model_config)} if dtype else set()
        self._report = report
        self._done = 0

    def entry(self, name: str) -> Entry:
        """Return shape and type of a tensor as it will be written."""
        entry = self.source.entries[name]
        keep = self._dtype is None or not name.startswith(MODEL) or name in self._stays_fp32
        return entry if keep or self._dtype is None else Entry(entry.shape, self._dtype)

    def read(self, name: str) -> Tensor:
        """Return a tensor as it will be written."""
        tensor = self.source.read(name).to(self.entry(name).dtype)
        self.hashes[name] = tensor_hash(tensor)
        self._done += tensor.nbytes
        self._report(self._done, self.total)
        return tensor

    def check(self, written: CheckpointSource) -> None:
        """Read the written target back and compare each tensor's hash with that of the tensor that was written.

        Raises:
            UserError: tensors differ; the message names them.
        """
        different = [
            name
            for name, digest in self.hashes.items()
            if name not in written.entries or tensor_hash(written.read(name)) != digest
        ]
        different += [name for name in written.entries if name.startswith(MODEL) and name not in self.hashes]
        if different:
            raise UserError(
                f"{len(different)} tensors read back different from what was written ({', '.join(different[:6])}); "
                f"nothing was kept"
            )

    @cached_property
    def total(self) -> int:
        """Bytes of all tensors as they will be written."""
        return sum(self.entry(name).nbytes for name in self.source.entries)


def state_prefix(state: str) -> str:
    """Return the prefix of an optimizer state's tensors in a training checkpoint."""
    return f"optimizer.{state}."


def tensor_hash(tensor: Tensor) -> str:
    """Return the SHA-256 of type, shape and bytes of a contiguous CPU tensor."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's parameters, without the prefix ``model.``; a tied head is not among them."""
    with torch.device("meta"):
        model = FusionTreeModel(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def fp32_parameters(config: ModelConfig) -> set[str]:
    """Return the names of the parameters that stay fp32 in models of lower precision."""
    with torch.device("meta"):
        modules = list(FusionTreeModel(config).named_modules())
    kept = [(prefix, module) for prefix, module in modules if isinstance(module, Fp32Parameters)]
    return {name for prefix, module in kept for name, _ in module.named_parameters(prefix)}


def checked(entries: dict[str, Entry], config: ModelConfig, place: str) -> dict[str, Entry]:
    """Check that the entries match the configuration exactly, and return them in the model's order.

    Raises:
        UserError: tensors are missing, unexpected or of another shape; the message names them.
    """
    wanted = {MODEL + name: shape for name, shape in parameter_shapes(config).items()}
    held = {name: entry.shape for name, entry in entries.items() if name.startswith(MODEL)}
    problems = [f"'{name}' is missing" for name in wanted.keys() - held.keys()]
    problems += [f"'{name}' is no parameter of the model" for name in held.keys() - wanted.keys()]
    problems += [
        f"'{name}' has shape {held[name]}, the model wants {shape}"
        for name, shape in wanted.items()
        if name in held and held[name] != shape
    ]
    if problems:
        shown = "\n".join(f"  {problem}" for problem in sorted(problems)[:8])
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(
            f"{place}: weights and configuration do not belong together:\n{shown}{more}\n"
            f"use the configuration that these weights were saved with"
        )
    rest = {name: entry for name, entry in entries.items() if name not in wanted}
    return {name: entries[name] for name in wanted} | rest


def stored_values(path: Path, config: dict[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the configuration and small values of a folder of another library's format.

    Args:
        path: of the folder, to which :func:`write_companions` may have added them.
        config: given by the user; takes precedence.

    Raises:
        UserError: neither exists, or what the folder has is damaged.
    """
    stored: dict[str, Any] | None = None
    state: dict[str, Any] | None = None
    if (path / COMPANION).is_file():
        try:
            values = json.loads((path / COMPANION).read_text(encoding="utf-8"))
            stored, state = values["config"], values["state"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path / COMPANION} cannot be read ({error!r}); copy it again") from error
    found = config or stored
    if found is None:
        raise UserError(f"{path} does not say which model it holds; give --config FILE with the run's configuration")
    return found, state


def write_companions(folder: Path, source: CheckpointSource) -> None:
    """Write configuration, small values and tokenizer as additional files, for formats that cannot store them."""
    for file in source.files:
        shutil.copyfile(file, folder / file.name)
    write_json(folder / COMPANION, {"config": source.config, "state": source.state})
