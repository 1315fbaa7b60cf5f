"""How the model is laid out over processes."""

from __future__ import annotations

from typing import ClassVar, Literal

from fusiontree.utils.settings import Section, setting

EngineName = Literal["fsdp2", "zero3", "zero2", "zero1", "ddp"]


class ParallelConfig(Section):
    """The layout. Data parallel size is what is left of the world size after the other axes."""

    renamed: ClassVar[dict[str, str]] = {"keep_below": "zero3_persistence_threshold"}

    engine: EngineName = setting(
        "fsdp2",
        "fsdp2 shards parameters, gradients and optimizer; ddp keeps whole parameters on every rank and shards "
        "gradients and optimizer. Of DeepSpeed: "
        "zero3 shards like fsdp2, zero2 keeps whole parameters, zero1 whole gradients too.",
    )
    offload: Literal["none", "optimizer", "all"] = setting(
        "none",
        "zero engines only: what waits in CPU memory. optimizer: master weights and moments, and the step is computed "
        "there; all: parameters too (zero3).",
    )
    zero3_persistence_threshold: int = setting(
        0,
        "zero3 only: parameters of at most this size stay gathered on every rank, which saves small messages.",
        unit="elements",
        ge=0,
    )
    reshard_after_forward: bool = setting(
        True,
        "fsdp2 only: give a block's gathered parameters up after its forward pass and gather them again for its "
        "backward pass. false keeps them until then: half the gathers, for the memory of all 16-bit parameters.",
    )
    tp: int = setting(
        1,
        "Tensor parallel size: heads and vocabulary are split over so many neighbouring ranks, and the tokens between "
        "the mixers over the same ranks (sequence parallel).",
        unit="ranks",
        ge=1,
    )
    cp: int = setting(1, "Context parallel size: every row is cut into so many pieces, one a rank.", unit="ranks", ge=1)
    shard_size: int | None = setting(
        None,
        "fsdp2 only: ranks that share one copy of the parameters, usually the GPUs of a node; other groups of ranks "
        "hold copies. Absent means all ranks share one copy.",
        unit="ranks",
        ge=1,
    )
