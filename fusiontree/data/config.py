"""Which token shards are read, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from fusiontree.utils.settings import Section, setting


class SourceConfig(Section):
    """One of several datasets that are mixed."""

    path: str = setting(..., "Folder or URL of the dataset.")
    weight: float = setting(
        ..., "Share of the rows, relative to the other sources' weights.", gt=0, allow_inf_nan=False
    )


class DataConfig(Section):
    """Token shards made by tools/build_shards.py.

    A dataset is a folder, a URL that fsspec knows (s3:// http:// https:// gs:// hf:// …), or
    ``pipe:COMMAND`` with ``{name}`` where the command takes a file's name.
    """

    train: str | list[SourceConfig] = setting(..., "Dataset folder or URL, or a list of {path, weight} to mix.")
    validation: str | None = setting(None, "Held-out dataset; training never reads it.")
    num_workers: int = setting(1, "Threads that read ahead; 0 reads when a step needs its rows.", ge=0)
    prefetch_steps: int = setting(4, "Steps that are read ahead.", unit="steps", ge=1)
    shuffle: bool = setting(True, "Visit the rows in an order decided by training.seed; false keeps the shards' order.")
    shuffle_shards: int = setting(
        16, "Shards whose rows are mixed with each other; more mix better, fewer keep reads together.", ge=1
    )
    on_damage: Literal["stop", "skip"] = setting(
        "stop", "What to do with rows that cannot be read: stop naming them, or keep their slot without labels."
    )
    max_skipped_rows: int = setting(100, "Rows that on_damage: skip may skip in the whole run before it stops.", ge=0)
    allow_pipe: bool = setting(False, "Allow pipe: datasets. Their commands run in a shell with your rights.")
    storage_options: dict[str, Any] = setting(
        {}, "Passed to fsspec for datasets at URLs, e.g. {anon: true} or {endpoint_url: …} for s3://."
    )
    cache_dir: str = setting(
        "~/.cache/fusiontree/shards",
        "Where shards of datasets at URLs are kept; best a local disk that the processes of a machine share.",
    )
    cache_size_gib: float = setting(50.0, "What cache_dir may hold; the shards unused for longest go first.", gt=0)
    prefetch_shards: int = setting(16, "Shards fetched from URLs before their rows are due.", ge=0)
    fetch_attempts: int = setting(6, "Attempts to read from a URL or a failing disk before the run stops.", ge=1)
    fetch_wait_s: float = setting(
        1.0, "Wait before the second attempt; it doubles with each further one, up to a minute.", unit="seconds", ge=0
    )

    @property
    def sources(self) -> list[SourceConfig]:
        """The datasets that are mixed."""
        return [SourceConfig(path=self.train, weight=1.0)] if isinstance(self.train, str) else self.train

    @property
    def cache_folder(self) -> Path:
        """``cache_dir`` with the home folder put in."""
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
                raise ValueError(f"'{path}' does not say where a file's name goes; write {{name}} there")
        return self
