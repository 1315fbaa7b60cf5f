"""Import of a user's modules, which add mixers, optimizers, metrics, token sources or tasks to the registries."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from fusiontree.utils.environment import expand_path
from fusiontree.utils.errors import UserError


def load_plugins(names: Sequence[str]) -> None:
    """Import each plugin once per process: a module's dotted name, or a path that ends in ``.py``.

    Raises:
        UserError: a plugin does not exist, or its import fails.
    """
    for name in names:
        try:
            _import_file(Path(expand_path(name))) if name.endswith(".py") else _import_module(name)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"plugin '{name}' cannot be imported: {type(error).__name__}: {error}") from error


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a package that the plugin imports is missing
        raise UserError(
            f"plugin '{name}' is no module on the path; give the path of its file (….py), or install its package"
        ) from error


def _import_file(file: Path) -> ModuleType:
    if not file.is_file():
        raise UserError(f"plugin '{file}' does not exist in '{Path.cwd()}'")
    # The resolved path names the module, so that two spellings of one path are one module.
    name = f"fusiontree_plugin_{file.resolve().with_suffix('').as_posix().strip('/').replace('/', '_')}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
