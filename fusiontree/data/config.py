"""The ``data`` section: datasets to read, and how to read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from fusiontree.utils.settings import Section, setting


class SourceConfig(Section):
    """One of several datasets that are mixed."""

    path: str = setting(..., "Folder or URL of the dataset.")
    weight: float = setting(
        ..., "Fraction of the rows, relative to the sum of all sources' weights.", gt=0, allow_inf_nan=False
    )


class DataConfig(Section):
    """Token shards made by ``fusiontree data build``.

    A dataset is a folder, a URL that fsspec knows (s3:// http:// https:// gs:// hf:// …), or
    ``pipe:COMMAND`` with ``{name}`` where the command takes a file's name.
    """

    train: str | list[SourceConfig] = setting(..., "Dataset folder or URL, or a list of {path, weight} to mix.")
    validation: str | None = setting(None, "Held-out dataset for validation; must not be a training dataset.")
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
    fetch_wait_s: float = setting(
        1.0, "Wait before the second attempt; doubles with each further attempt, up to a minute.", unit="seconds", ge=0
    )

    @property
    def sources(self) -> list[SourceConfig]:
        """The datasets that are mixed."""
        return [SourceConfig(path=self.train, weight=1.0)] if isinstance(self.train, str) else self.train

    @property
    def cache_folder(self) -> Path:
        """``cache_dir`` with ``~`` expanded."""
        return Path(self.cache_dir).expanduser()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.sources:
            raise ValueError("train is an empty list; name a dataset folder")
        paths = [source.path.rstrip("/") for source in self.sources]
        for path in paths:
            if not path:
                raise ValueError("train names no dataset; give its folder")
            if paths.count(path) > 1:
                raise ValueError(f"train lists '{path}' twice; list it once with the sum of the weights")
        if self.validation is not None and self.validation.rstrip("/") in paths:
            raise ValueError(f"validation '{self.validation}' is trained on; hold out another dataset")
        for path in [*paths, self.validation or ""]:
            if not path.startswith("pipe:"):
                continue
            if not self.allow_pipe:
                raise ValueError(f"'{path}' runs a shell command; set data.allow_pipe to true if you trust it")
            if "{name}" not in path:
                raise ValueError(
                    f"'{path}' does not contain {{name}}; write {{name}} where the command takes a file's name"
                )
        return self
