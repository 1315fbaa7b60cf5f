"""A run's position in its data (a few numbers, of constant size), and the order that it refers to.

The sequence of rows depends only on the order (datasets, weights, seed, row length, shuffling). A saved state contains
the order's fingerprint, so that it cannot be used with another order, and the values behind the fingerprint, so that
the error can name the changes. Weights may change, and datasets may be added behind the others: the state then contains
the rows at which the mixture changed. World size, workers, batch size, curriculum and dataset paths are not part of the
order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from fusiontree.data.mixture import MixturePart
from fusiontree.utils.errors import UserError

ORDER_VERSION = 1
"""Version of the ordering algorithm; another version gives a different order."""


@dataclass(frozen=True)
class SourceIdentity:
    """Identity of a dataset in the order. The path is only informative, as datasets may move."""

    path: str
    weight: float
    fingerprint: str
    rows: int


@dataclass(frozen=True)
class Order:
    """Everything that determines the order of rows."""

    seed: int
    seq_len: int
    shuffle: bool
    shuffle_shards: int
    sources: tuple[SourceIdentity, ...]
    version: int = ORDER_VERSION

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings that determine the order, besides the datasets."""
        return {key: value for key, value in asdict(self).items() if key != "sources"}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that determines the order."""
        values = asdict(self)
        for source in values["sources"]:
            del source["path"]
        if len(self.sources) == 1:
            del values["sources"][0]["weight"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


@dataclass
class DataState:
    """Position after some number of steps."""

    step: int = 0
    row: int = 0
    """Number of rows of ``seq_len`` taken so far."""
    number: int = 0
    """Number of rows yielded so far, where each shorter curriculum row counts as one; the number of the next row."""
    skipped_rows: int = 0
    """Number of skipped damaged rows so far, over all ranks."""

    def state_dict(self, order: Order, rows_of_sources: list[int], parts: Sequence[MixturePart] = ()) -> dict[str, Any]:
        """Return plain values for a checkpoint.

        Args:
            order: of the rows.
            rows_of_sources: number of rows taken from each source.
            parts: of the mixture; written where its weights have changed.
        """
        sources = [
            {**vars(source), "epoch": count // source.rows, "row": count % source.rows}
            for source, count in zip(order.sources, rows_of_sources, strict=True)
        ]
        changed = {"mixture": [list(part) for part in parts]} if len(parts) > 1 else {}
        place = {"fingerprint": order.fingerprint, "order": dict(order.settings), "sources": sources}
        return {**vars(self), **place, **changed}

    def load_state_dict(self, values: Mapping[str, Any], order: Order) -> None:
        """Take the position that :meth:`state_dict` returned.

        The order may have other weights, and further datasets behind the others: see :func:`mixture_parts`.

        Raises:
            UserError: the values belong to another order; the message names every difference.
        """
        if values.get("fingerprint") != order.fingerprint and not _continues(values, order):
            changes = "; ".join(differences(values, order)) or "it was written by another version of the program"
            raise UserError(
                f"the datasets or their order are not those of the checkpoint: {changes}. A run may change weights and "
                f"add datasets at the end of data.train, nothing else. Set this back to go on, or "
                f"start a new run from its weights: another run_dir and checkpoint.init_from=RUN"
            )
        for key in ("step", "row", "number", "skipped_rows"):
            setattr(self, key, values[key])


def _continues(saved: Mapping[str, Any], order: Order) -> bool:
    """Return whether ``order`` goes on from a saved position: the same rows of the same datasets, in other shares."""
    sources = saved.get("sources", [])
    same = [old.get("fingerprint") == new.fingerprint for old, new in zip(sources, order.sources, strict=False)]
    return bool(sources) and len(sources) <= len(order.sources) and all(same) and saved.get("order") == order.settings


def mixture_parts(saved: Mapping[str, Any] | None, order: Order) -> list[MixturePart]:
    """Return the parts of the mixture of a run that goes on in ``order`` from a saved position, or from the begin."""
    now = [source.weight for source in order.sources]
    if saved is None:
        return [MixturePart(0, now)]
    before = [MixturePart(*part) for part in saved.get("mixture", [])]
    before = before or [MixturePart(0, [source["weight"] for source in saved["sources"]])]
    if saved["fingerprint"] == order.fingerprint:
        return before
    kept = [part for part in before if part.row < saved["row"]]  # the last may have given no row yet
    return kept if kept and kept[-1].weights == now else [*kept, MixturePart(saved["row"], now)]


def differences(saved: Mapping[str, Any], order: Order) -> list[str]:
    """Return the differences between a saved state's order and ``order``, one sentence per difference."""
    names = {"seed": "training.seed", "seq_len": "training.seq_len", "shuffle": "data.shuffle"}
    names |= {"shuffle_shards": "data.shuffle_shards", "version": "the version of the data order"}
    found = []
    before = saved.get("order", {})
    for key, name in names.items():
        if before.get(key) != getattr(order, key):
            found.append(f"{name} was {before.get(key)} and is {getattr(order, key)}")
    sources = saved.get("sources", [])
    if len(sources) > len(order.sources):
        found.append(f"data.train had {len(sources)} datasets and has {len(order.sources)}")
    for index, (old, new) in enumerate(zip(sources, order.sources, strict=False)):
        if old.get("fingerprint") != new.fingerprint:
            place = f"'{new.path}'" if old.get("path") == new.path else f"'{new.path}' (was '{old.get('path')}')"
            found.append(f"dataset {index} {place} is another dataset or was rebuilt")
        if len(order.sources) > 1 and old.get("weight") != new.weight:
            found.append(f"the weight of dataset {index} '{new.path}' was {old.get('weight')} and is {new.weight}")
    for index, new in enumerate(order.sources[len(sources) :], len(sources)):
        found.append(f"dataset {index} '{new.path}' with weight {new.weight} is new")
    return found
