"""Opens files of another library's weights: safetensors, or files of torch.save, without executing anything in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fusiontree.convert.hf import SafetensorsFolder, index_of
from fusiontree.convert.reader import Entry
from fusiontree.convert.safe_unpickle import check_sums
from fusiontree.convert.safetensors_file import SafetensorsFile
from fusiontree.utils.errors import UserError

TORCH_INDEX = "pytorch_model.bin.index.json"
_BESIDE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|trainer_state)([_-].*)?\.(bin|pt|pth)")
"""Files that training programs save beside the weights."""


class Weights(Protocol):
    """Files of tensors."""

    entries: dict[str, Entry]

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        ...


def open_weights(path: Path) -> Weights:
    """Open a file of weights or a folder of them; nothing in them is executed.

    Raises:
        UserError: there are none, some are missing, or a file is damaged or of another kind.
    """
    if not path.exists():
        raise UserError(f"source '{path}' does not exist")
    if path.is_file():
        with path.open("rb") as file:
            is_torch = file.read(2) in (b"PK", b"\x80\x02")  # a zip archive, or a pickle of torch's former format
        return _TorchFiles([path]) if is_torch else SafetensorsFile(path)
    if any(path.glob("*.safetensors")):
        return SafetensorsFolder(path)
    return _TorchFiles(torch_files(path))


def torch_files(path: Path) -> list[Path]:
    """Return the files of a folder that hold weights: those that its index names, else pytorch_model.bin, else all.

    Raises:
        UserError: there are none, or the index names a file that is missing.
    """
    if (path / TORCH_INDEX).is_file():
        return [path / name for name in sorted(set(index_of(path, TORCH_INDEX).values()))]
    if (path / "pytorch_model.bin").is_file():
        return [path / "pytorch_model.bin"]
    for suffix in ("bin", "pt", "pth"):
        found = sorted(file for file in path.glob(f"*.{suffix}") if not _BESIDE.fullmatch(file.name))
        if found:
            return found
    raise UserError(
        f"source '{path}' holds no weights in .safetensors, .bin or .pt files; give the folder that has them"
    )


class _TorchFiles:
    """Files of torch.save, mapped into memory and read by torch's unpickler that creates only tensors."""

    def __init__(self, files: list[Path]) -> None:
        self._tensors: dict[str, Tensor] = {}
        places: dict[str, Path] = {}
        for file in files:
            for name, value in _tensors_in(file).items():
                if name in places:
                    raise UserError(f"'{name}' is in {places[name]} and in {file}; give the file of the weights")
                self._tensors[name], places[name] = value, file
        self.entries = {name: Entry(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].clone()


def _tensors_in(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict, which may be the only mapping in a file of a training program.

    Raises:
        UserError: the file names functions to run, is damaged, or holds tensors in another way.
    """
    check_sums(file)
    try:
        values: Any = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # the pickle module raises many kinds
        raise UserError(
            f"{file} cannot be read as tensors alone ({(str(error).splitlines() or [repr(error)])[0]}); save its state "
            f"dict as safetensors and give that"
        ) from error
    inner = [v for v in values.values() if _holds_tensors(v)] if isinstance(values, dict) else []
    if len(inner) == 1 and not any(isinstance(value, Tensor) for value in values.values()):
        values, inner = inner[0], []
    if not isinstance(values, dict) or inner or not all(isinstance(name, str) for name in values):
        raise UserError(f"{file} holds tensors in another way than one mapping of names; save the state dict alone")
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        inner = value.values() if isinstance(value, dict) else value
        return any(isinstance(part, Tensor) or _holds_tensors(part) for part in inner)
    return False
