"""Reads other libraries' torch.save files without running anything that they name.

``torch.load(weights_only=True)`` refuses files with foreign objects, which every DeepSpeed checkpoint has. This module
creates tensors and plain containers and replaces every other object by an :class:`Inert`, which only stores its
arguments: no foreign module is imported, no foreign function called.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fusiontree.checkpoint.metadata import RestrictedUnpickler
from fusiontree.utils.errors import UserError


class Inert:
    """Replaces a foreign object."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Return a replacement for the result of calling the foreign object."""
        return Inert(*args)

    def __setstate__(self, state: Any) -> None:
        self.args = (state,)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore an entry of a foreign mapping."""

    def append(self, value: Any) -> None:
        """Ignore an item of a foreign list."""

    def extend(self, values: Any) -> None:
        """Ignore items of a foreign list."""


def _without_attributes(make: Any, kind: Any, args: tuple, state: Any) -> Any:
    """Create a tensor without its additional attributes."""
    return make(*args)


def _parameter(data: Any, *rest: Any) -> Any:
    """Return the parameter's data as a plain tensor."""
    return data


_MADE: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _without_attributes,
}


class _Unpickler(RestrictedUnpickler):
    allowed = _MADE

    def other(self, module: str, name: str) -> Any:
        return Inert


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise pickle.UnpicklingError("it is of torch's old format")


def check_sums(path: Path) -> None:
    """Read a file of torch.save and compare its content with the checksums in it, which torch itself ignores.

    Files of torch's former format have none, nor have files that were saved without.

    Raises:
        UserError: the file is damaged.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if any(record.CRC for record in archive.infolist()) else None
    except Exception as error:  # damaged archives fail in many ways
        raise UserError(f"{path} is a damaged file of torch.save ({error!r}); copy it again") from error
    if damaged is not None:
        raise UserError(f"{path} is damaged: '{damaged}' in it has another checksum; copy it again")


def load_inert(path: Path) -> Any:
    """Return the object in a torch.save file; its tensors are mapped into memory, not read.

    Raises:
        UserError: the file is damaged, or is not of torch.save's present format.
    """
    try:
        check_sums(path)
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("constants.pkl") for name in archive.namelist()):
                raise pickle.UnpicklingError("it is TorchScript, which is code")
        pickles = SimpleNamespace(Unpickler=_Unpickler, load=_refuse, __name__="inert")
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=pickles)
    except Exception as error:  # a pickle can fail in any way
        raise UserError(f"{path} cannot be read as a file of torch.save: {error}; copy it again") from error
