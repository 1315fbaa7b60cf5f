"""Selects the backend of an operation.

Each operation lists its backends, fastest first. ``auto`` takes the first backend that can run on the tensor's device
and logs the choice once. A backend requested by name that cannot run raises an error; it is never replaced.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from fusiontree.utils.errors import UserError, nearest

log = logging.getLogger(__name__)

_chosen: dict[str, str] = {}
"""Operation -> its backend, of all operations that were used in this process."""


def chosen_backends() -> str:
    """Return the backends in use, the most frequent one summed up: ``triton for 9 operations, attention: flash4``."""
    counts = Counter(_chosen.values())
    if not counts:
        return "none yet"
    (common, count), *_ = counts.most_common(1)
    others = [f"{name}: {backend}" for name, backend in sorted(_chosen.items()) if backend != common]
    return ", ".join([f"{common} for {count} operation{'s' if count > 1 else ''}", *others])


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation."""

    name: str
    load: Callable[[], Callable]
    """Imports and returns the implementation."""
    unavailable: Callable[[torch.device], str | None]
    """Returns the reason why the backend cannot run on a device, or None if it can."""


def anywhere(device: torch.device) -> str | None:
    """Return None: plain PyTorch runs on every device."""
    return None


def triton_unavailable(device: torch.device) -> str | None:
    """Return the reason why Triton kernels cannot run on ``device``, or None."""
    if device.type != "cuda":
        return "its kernels need a GPU"
    return None if find_spec("triton") is not None else "triton is not installed"


def loader(path: str) -> Callable[[], Callable]:
    """Return a function that imports and returns ``module:function``, so that unused backends are not imported."""

    def load() -> Callable:
        module, _, name = path.partition(":")
        return getattr(importlib.import_module(module), name)

    return load


class Operation:
    """The backends of one operation, fastest first."""

    def __init__(self, name: str, backends: list[Backend], shown: str | None = None) -> None:
        """Register the backends; each is imported at first use.

        Args:
            name: the setting under ``model.kernels`` that selects the backend.
            backends: fastest first.
            shown: name of the operation in the log, if several operations share the setting.
        """
        self.name, self.shown = name, shown or name
        self.backends = {backend.name: backend for backend in backends}
        # Cached per (requested name, device type), as every layer of every step calls it.
        self.choose = functools.lru_cache(maxsize=None)(self._choose)

    def _choose(self, wanted: str, device_type: str) -> Callable:
        device = torch.device(device_type)
        if wanted == "auto":
            for backend in self.backends.values():
                if backend.unavailable(device) is None:
                    log.info("%s on %s: %s", self.shown, device_type, backend.name)
                    _chosen[self.shown] = backend.name
                    return backend.load()
            reasons = "; ".join(f"{b.name}: {b.unavailable(device)}" for b in self.backends.values())
            raise UserError(f"no backend of {self.name} runs on {device_type}: {reasons}")
        if wanted not in self.backends:
            raise UserError(f"model.kernels.{self.name}={wanted} is not a backend{nearest(wanted, self.backends)}")
        why = self.backends[wanted].unavailable(device)
        if why is not None:
            usable = [b.name for b in self.backends.values() if b.unavailable(device) is None]
            raise UserError(
                f"model.kernels.{self.name}={wanted} cannot run on {device_type}: {why}; use auto or one of {usable}"
            )
        _chosen[self.shown] = wanted
        return self.backends[wanted].load()
