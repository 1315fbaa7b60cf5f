"""The ``data`` section: datasets to read, and how to read them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Tag, field_validator, model_validator

from fusiontree.utils.environment import expand_path
from fusiontree.utils.settings import PathText, Section, setting

LONGEST_WAIT_S = 60.0
"""Longest wait between two attempts to read."""


class DatasetConfig(Section):
    """A dataset of any type."""

    path: PathText = setting(..., "Folder or URL of the dataset; other types than shards say what it is.")
    type: str = setting("shards", "Type of token source: shards, megatron, synthetic, tasks, or a plugin's type.")
    options: dict[str, Any] = setting({}, "Options of this type.")


class SourceConfig(DatasetConfig):
    """One of several datasets that are mixed."""

    weight: float = setting(
        ..., "Fraction of the rows, relative to the sum of all sources' weights.", gt=0, allow_inf_nan=False
    )


def is_remote(path: str) -> bool:
    """Return True if a dataset's path is a URL or a command, False if it is a folder."""
    return path.startswith("pipe:") or (
        re.match(r"[a-zA-Z][\w+.-]*://", path) is not None and not path.startswith("file://")
    )


def _place(path: str) -> str:
    """Return a path by which two spellings of one folder, such as a link or a relative path, are equal."""
    return path.rstrip("/") if is_remote(path) else os.path.realpath(path.removeprefix("file://"))


def _form(value: Any) -> str:
    """Return the tag of the form in which ``data.validation`` is given; only its errors are then reported."""
    if isinstance(value, DatasetConfig) or (isinstance(value, dict) and "path" in value):
        return "<dataset>"
    return "<named>" if isinstance(value, dict) else "<path>"


Dataset = Annotated[
    Annotated[PathText, Tag("<path>")] | Annotated[DatasetConfig, Tag("<dataset>")],
    Discriminator(lambda value: _form(value).replace("<named>", "<dataset>")),
]
ValidationSets = Annotated[
    Annotated[PathText, Tag("<path>")]
    | Annotated[DatasetConfig, Tag("<dataset>")]
    | Annotated[dict[str, Dataset], Tag("<named>")],
    Discriminator(_form),
]


class DataConfig(Section):
    """Token shards made by ``fusiontree data build``, or other token sources.

    The path of a dataset is a folder (``~`` and ``$NAME`` are replaced), a URL that fsspec knows (s3:// http:// https://
    gs:// hf:// …), or ``pipe:COMMAND`` with ``{name}`` where the command takes a file's name.
    """

    train: PathText | list[SourceConfig] = setting(
        ..., "Dataset folder or URL, or a list of {path, weight, type, options} to mix."
    )
    validation: ValidationSets | None = setting(
        None,
        "Held-out dataset for validation, or a mapping from names to datasets; a dataset is a folder, a URL or {path, "
        "type, options}. Must not be a training dataset.",
    )
    num_workers: int = setting(1, "Threads that read ahead; 0: each step waits for its rows to be read.", ge=0)
    prefetch_steps: int = setting(4, "Number of steps to read ahead.", unit="steps", ge=1)
    shuffle: bool = setting(True, "Shuffle the rows by training.seed; false keeps the shards' order.")
    shuffle_shards: int = setting(
        16, "Number of shards whose rows are shuffled together; more shards mix better, fewer shards read faster.", ge=1
    )
    on_damage: Literal["stop", "skip"] = setting(
        "stop", "If rows cannot be read: stop the run and name them, or skip them (their slots get no labels)."
    )
    max_skipped_rows: int = setting(100, "Rows that on_damage: skip may skip in a run before the run stops.", ge=0)
    allow_pipe: bool = setting(False, "Allow pipe: datasets. Their commands run in a shell with your permissions.")
    storage_options: dict[str, Any] = setting(
        {}, "Passed to fsspec for datasets at URLs, e.g. {anon: true} or {endpoint_url: …} for s3://."
    )
    cache_dir: str = setting(
        "~/.cache/fusiontree/shards",
        "Folder for shards of datasets at URLs; best on a local disk that all processes of a node share.",
    )
    cache_size_gib: float = setting(
        50.0, "Maximum size of cache_dir; the least recently used shards are removed first.", gt=0
    )
    prefetch_shards: int = setting(16, "Number of shards to fetch from URLs ahead of use.", ge=0)
    fetch_attempts: int = setting(6, "Attempts to read from a URL or a failing disk before the run stops.", ge=1)
    fetch_stall_s: float = setting(
        60.0, "A transfer from a URL that receives no data for this long has failed.", unit="seconds", gt=0
    )
    fetch_wait_s: float = setting(
        1.0, "Wait before the second attempt; doubles with each further attempt, up to a minute.", unit="seconds", ge=0
    )

    @property
    def sources(self) -> list[SourceConfig]:
        """The datasets that are mixed."""
        return [SourceConfig(path=self.train, weight=1.0)] if isinstance(self.train, str) else self.train

    @property
    def validation_sets(self) -> dict[str, DatasetConfig]:
        """The validation datasets by name, in order; the name of an unnamed dataset is empty."""
        given = self.validation
        named: dict[str, str | DatasetConfig] = given if isinstance(given, dict) else {"": given} if given else {}
        return {name: DatasetConfig(path=d) if isinstance(d, str) else d for name, d in named.items()}

    @property
    def cache_folder(self) -> Path:
        """``cache_dir`` with ``~`` and ``$NAME`` replaced, on this node: they may differ between nodes."""
        return Path(expand_path(self.cache_dir))

    @property
    def is_remote(self) -> bool:
        """Whether a dataset is at a URL or behind a command."""
        return any(is_remote(dataset.path) for dataset in (*self.sources, *self.validation_sets.values()))

    @property
    def longest_read_s(self) -> float:
        """Seconds for which a read is retried before the run stops: the waits, and silence in attempts of URLs."""
        waits = self.fetch_attempts - 1
        growing = [min(LONGEST_WAIT_S, self.fetch_wait_s * 2.0**number) for number in range(min(waits, 64))]
        waits_s = sum(growing) + (waits - len(growing)) * (growing[-1] if growing else 0.0)
        return waits_s + (self.fetch_attempts * self.fetch_stall_s if self.is_remote else 0.0)

    @field_validator("train", mode="before")
    @classmethod
    def _is_named(cls, value: Any) -> Any:
        if value == "":
            raise ValueError("train names no dataset; give its folder")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.sources:
            raise ValueError("train is an empty list; name a dataset folder")
        trained = [(_place(d.path), d.type, d.options) for d in self.sources]
        for source, place in zip(self.sources, trained, strict=True):
            if trained.count(place) > 1:
                given = source.path.rstrip("/")
                raise ValueError(f"train lists '{given}' twice; list it once with the sum of the weights")
        for name, dataset in self.validation_sets.items():
            if not re.fullmatch(r"[\w.-]*", name) or (isinstance(self.validation, dict) and not name):
                raise ValueError(f"validation set '{name}': use letters, digits and the characters _ . - in its name")
            if (_place(dataset.path), dataset.type, dataset.options) in trained:
                raise ValueError(f"validation '{dataset.path}' is trained on; hold out another dataset")
        for path in [d.path for d in (*self.sources, *self.validation_sets.values())]:
            if not path.startswith("pipe:"):
                continue
            if not self.allow_pipe:
                raise ValueError(f"'{path}' runs a shell command; set data.allow_pipe to true if you trust it")
            if "{name}" not in path:
                raise ValueError(
                    f"'{path}' does not contain {{name}}; write {{name}} where the command takes a file's name"
                )
        return self
