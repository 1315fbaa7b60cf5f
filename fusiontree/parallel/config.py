"""The ``parallel`` section: engine and parallel sizes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator

from fusiontree.engines.config import known_engine
from fusiontree.utils.settings import Section, setting


class ParallelConfig(Section):
    """Engine and layout. The data parallel size is world size / (tp x cp)."""

    renamed: ClassVar[dict[str, str]] = {"keep_below": "zero3_persistence_threshold"}

    engine: Annotated[str, AfterValidator(known_engine)] = setting(
        "fsdp2",
        "fsdp2 shards parameters, gradients and optimizer state; ddp replicates parameters and shards gradients and "
        "optimizer state. DeepSpeed engines: zero3 shards like fsdp2; zero2 replicates parameters; zero1 replicates "
        "parameters and gradients. A plugin may register others.",
    )
    offload: Literal["none", "optimizer", "all"] = setting(
        "none",
        "zero engines only: state kept in CPU memory. optimizer: master weights and moments, and the CPU computes the "
        "optimizer step; all: parameters too (zero3).",
    )
    zero3_persistence_threshold: int = setting(
        0,
        "zero3 only: parameters of at most this many elements stay gathered on every rank, which avoids small "
        "messages.",
        unit="elements",
        ge=0,
    )
    reshard_after_forward: bool = setting(
        True,
        "fsdp2 only: free a block's gathered parameters after its forward pass and gather them again for its backward "
        "pass. false keeps them: half the gathers, at the cost of memory for all parameters in 16 bits.",
    )
    tp: int = setting(
        1,
        "Tensor parallel size: number of neighbouring ranks over which heads and vocabulary are split; the tokens "
        "between the mixers are split over the same ranks (sequence parallel).",
        unit="ranks",
        ge=1,
    )
    cp: int = setting(
        1, "Context parallel size: number of chunks of every row, one chunk per rank.", unit="ranks", ge=1
    )
    shard_size: int | None = setting(
        None,
        "fsdp2 only: number of ranks that share one copy of the parameters, usually the GPUs of a node; each group of "
        "shard_size ranks holds one copy. Absent means all ranks share one copy.",
        unit="ranks",
        ge=1,
    )
