"""Reading other libraries' torch.save files without running anything that they name.

``torch.load(weights_only=True)`` refuses a file with any foreign object in it, and every DeepSpeed checkpoint holds
some. Here tensors and plain containers are made, and everything else becomes an :class:`Inert` that only remembers
its arguments: no foreign module is imported, no foreign function called.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fusiontree.utils.errors import UserError


class Inert:
    """Stands where a foreign object was."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Stand for what calling a foreign object would have given."""
        return Inert(*args)

    def __setstate__(self, state: Any) -> None:
        self.args = (state,)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take an entry of a foreign mapping; nothing reads it."""

    def append(self, value: Any) -> None:
        """Take an item of a foreign list; nothing reads it."""

    def extend(self, values: Any) -> None:
        """Take items of a foreign list; nothing reads them."""


def _without_attributes(make: Any, kind: Any, args: tuple, state: Any) -> Any:
    """Make a tensor that had attributes of its own, without them."""
    return make(*args)


def _parameter(data: Any, *rest: Any) -> Any:
    """Make a plain tensor where a parameter was."""
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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _MADE:
            return _MADE[module, name]
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        return Inert


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise pickle.UnpicklingError("it is of torch's old format")


def load_inert(path: Path) -> Any:
    """Return what a torch.save file holds; its tensors are mapped into memory, not read.

    Raises:
        UserError: it is no such file, or a damaged one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("constants.pkl") for name in archive.namelist()):
                raise pickle.UnpicklingError("it is TorchScript, which is code")
        pickles = SimpleNamespace(Unpickler=_Unpickler, load=_refuse, __name__="inert")
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=pickles)
    except Exception as error:  # a pickle can fail in any way
        raise UserError(f"{path} cannot be read as a file of torch.save: {error}; copy it again") from error
