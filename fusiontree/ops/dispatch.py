"""Choosing the implementation of an operation.

Each operation lists its backends, fastest first. ``auto`` takes the first that can run on the tensor's device and
says so once; a backend asked for by name that cannot run is an error, never replaced by another.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from fusiontree.utils.errors import UserError, nearest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One implementation of an operation."""

    name: str
    load: Callable[[], Callable]
    """Imports and returns the implementation."""
    unavailable: Callable[[torch.device], str | None]
    """Returns why it cannot run on a device, or None where it can."""


def anywhere(device: torch.device) -> str | None:
    """No reason not to run: plain PyTorch."""
    return None


def triton_unavailable(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on ``device``, or None."""
    if device.type != "cuda":
        return "its kernels need a GPU"
    return None if find_spec("triton") is not None else "triton is not installed"


class Operation:
    """The backends of one operation, fastest first."""

    def __init__(self, name: str, backends: list[Backend], shown: str | None = None) -> None:
        """Register; nothing is imported before the first use.

        Args:
            name: the setting under ``model.kernels`` that chooses.
            backends: fastest first.
            shown: what the operation is called where a choice is logged, if several share the setting.
        """
        self.name, self.shown = name, shown or name
        self.backends = {backend.name: backend for backend in backends}
        # One choice for each (asked name, device type): this is in every layer of every step.
        self.choose = functools.lru_cache(maxsize=None)(self._choose)

    def _choose(self, wanted: str, device_type: str) -> Callable:
        device = torch.device(device_type)
        if wanted == "auto":
            for backend in self.backends.values():
                if backend.unavailable(device) is None:
                    log.info("%s on %s: %s", self.shown, device_type, backend.name)
                    return backend.load()
            raise UserError(f"no backend of {self.name} runs on {device_type}: {self.reasons(device)}")
        if wanted not in self.backends:
            raise UserError(f"kernels.{self.name}={wanted} is not a backend{nearest(wanted, self.backends)}")
        why = self.backends[wanted].unavailable(device)
        if why is not None:
            usable = [b.name for b in self.backends.values() if b.unavailable(device) is None]
            raise UserError(f"kernels.{self.name}={wanted} cannot run on {device_type}: {why}; here run {usable}")
        return self.backends[wanted].load()

    def reasons(self, device: torch.device) -> str:
        """Why each backend cannot run on ``device``."""
        return "; ".join(f"{b.name}: {b.unavailable(device)}" for b in self.backends.values())
