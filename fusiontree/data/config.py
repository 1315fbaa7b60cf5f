"""Which token shards are read, and how."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from fusiontree.utils.section import Section, setting


class SourceConfig(Section):
    """One of several datasets that are mixed."""

    path: str = setting(..., "Folder of the dataset.")
    weight: float = setting(..., "Share of the rows, relative to the other sources' weights.", gt=0)


class DataConfig(Section):
    """Token shards made by tools/build_shards.py."""

    train: str | list[SourceConfig] = setting(..., "Folder of the dataset, or a list of {path, weight} to mix.")
    validation: str | None = setting(None, "Folder of the held-out dataset; training never reads it.")
    num_workers: int = setting(1, "Threads that read ahead; 0 reads when a step needs its rows.", ge=0)
    prefetch_steps: int = setting(4, "Steps that are read ahead.", unit="steps", ge=1)
    shuffle: bool = setting(True, "Visit the rows in an order decided by training.seed; false keeps the shards' order.")
    shuffle_shards: int = setting(
        16, "Shards whose rows are mixed with each other; more mix better, fewer keep reads together.", ge=1
    )
    on_damage: Literal["stop", "skip"] = setting(
        "stop", "What to do with rows that cannot be read: stop naming them, or keep their slot without labels."
    )
    max_skipped_rows: int = setting(100, "Rows that on_damage: skip may skip before the run stops.", ge=0)

    @property
    def sources(self) -> list[SourceConfig]:
        """The datasets that are mixed."""
        return [SourceConfig(path=self.train, weight=1.0)] if isinstance(self.train, str) else self.train

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.sources:
            raise ValueError("train is an empty list; name a dataset folder")
        return self
