"""The protocol of an experiment tracker and the registry of all trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fusiontree.tracking.config import LoggingConfig
from fusiontree.utils.errors import UserError
from fusiontree.utils.registry import Registry


class TrackerStart(NamedTuple):
    """How a tracker is to start."""

    options: dict[str, Any]
    """JSON values that its constructor receives."""
    note: str | None = None
    """Message for the user, recorded as event ``NAME_offline``: the tracker sends its data nowhere for now."""


class Tracker(Protocol):
    """Sends metrics to one program. An instance lives in a process of its own: see tracker_process.py."""

    def __init__(self, options: dict[str, Any], after_step: int) -> None:
        """Open the tracker in its process.

        Args:
            options: from :meth:`prepare`.
            after_step: step of the checkpoint that training starts from; steps logged after it before are void.
        """
        ...

    @classmethod
    def prepare(cls, config: LoggingConfig, run_dir: Path, values: dict[str, Any]) -> TrackerStart:
        """Check in the training process that the tracker can start.

        Args:
            config: the ``logging`` section.
            run_dir: the run folder.
            values: the whole configuration as plain values.

        Raises:
            UserError: the tracker's package is not installed.
        """
        ...

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send the metrics of one step; nested metrics have names joined by slashes."""
        ...

    def close(self) -> None:
        """Send values still in memory."""
        ...


TRACKERS: Registry[type[Tracker]] = Registry("tracker")


def require_package(name: str) -> None:
    """Check that the package of the tracker ``name``, of the same name as its extra, is installed.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"logging.trackers lists {name}, but {name} is not installed; pip install 'fusiontree[{name}]' or remove "
            f"{name} from logging.trackers"
        )
