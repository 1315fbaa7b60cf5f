"""How the model is laid out over processes."""

from __future__ import annotations

from typing import Literal

from fusiontree.utils.section import Section, setting


class ParallelConfig(Section):
    """The layout. Data parallel size is what is left of the world size after the other axes."""

    engine: Literal["fsdp2", "ddp"] = setting(
        "fsdp2", "fsdp2 shards parameters, gradients and optimizer; ddp keeps whole parameters on every rank."
    )
