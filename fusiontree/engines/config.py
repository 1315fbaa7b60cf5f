"""Engines by name: their limits, memory, traffic and construction; importing it needs no torch.

A specification says all that configuration checks and planner ask of an engine. docs/extend/engine.md explains how a
plugin adds one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypedDict, Unpack

from fusiontree.optim.config import OPTIMIZERS, OptimizerSettings
from fusiontree.utils.registry import Registry

if TYPE_CHECKING:
    from fusiontree.engines.base import Engine
    from fusiontree.engines.parameters.base import Decays
    from fusiontree.parallel.config import ParallelConfig
    from fusiontree.parallel.layout import Layout
    from fusiontree.parallel.shard_groups import DistributedModel, ShardGroup
    from fusiontree.training.config import TrainingConfig


@dataclass(frozen=True)
class Sizes:
    """Quantities of a run on one rank, from which memory and traffic of the training state follow."""

    on_rank: float
    """Parameters of one tensor parallel rank before the engine shards them."""
    shard: float
    """Parameters of one rank's shard."""
    block: float
    """Parameters of the largest block on one tensor parallel rank."""
    element: int
    """Bytes of an element in the precision of the forward pass."""
    stepped: int
    """Bytes of a parameter's fp32 value and of its states in the optimizer."""
    passes: int
    """Micro-batches per step and rank."""
    ranks: int
    """Number of processes."""
    shard_ranks: int
    """Ranks that share one copy of the parameters."""
    fp8: float = 0.0
    """Parameters of one tensor parallel rank whose products are computed in FP8."""

    @property
    def kept_casts(self) -> float:
        """Bytes of FP8 casts, as they are and transposed, that serve all micro-batches of a step."""
        return 2 * self.fp8 if self.passes > 1 else 0.0


class StateMemory(NamedTuple):
    """Bytes of one rank."""

    states: float
    """Master parameters, gradients, states of the optimizer, and full copies that the engine keeps."""
    gathered: float
    """Parameters and gradients of the blocks that compute."""


class Transfer(NamedTuple):
    """Collectives of one step, seen from one rank."""

    nbytes: float
    """Size of the full tensors; a rank sends and receives (ranks - 1) / ranks of it."""
    ranks: int
    """Ranks of the collective."""
    span: int
    """Neighbouring ranks that the collective's group is spread over; decides which links it uses."""


class EngineParts(TypedDict):
    """Arguments of an engine."""

    materialize: Callable[[ShardGroup], None]
    """Gives a shard group memory and initial values."""
    decays: Decays
    """Tells from name and parameter whether weight decay applies."""
    parallel: ParallelConfig
    training: TrainingConfig


class EngineSpec:
    """One kind of engine."""

    package: ClassVar[str | None] = None
    """Package that the engine imports, if it is optional; FusionTree's extra has the same name."""
    settings: ClassVar[frozenset[str]] = frozenset()
    """Settings of ``parallel`` that only some engines have, and this engine has."""
    casts_parameters: ClassVar[bool] = False
    """True if modules read cast copies of their fp32 parameters, made in their forward."""
    shards_parameters: ClassVar[bool] = False
    """True if each rank holds a shard of the parameters, and gathers them block by block."""

    def offloads(self, parallel: ParallelConfig) -> list[str]:
        """Return the values of ``parallel.offload`` that are possible."""
        return ["none"]

    def keeps_matrices(self, ranks: int) -> bool:
        """Return True if the optimizer's tensors have the shape of the parameters, with ``ranks`` processes."""
        return ranks == 1

    def problems(self, parallel: ParallelConfig, optimizer: OptimizerSettings, ranks: int) -> Iterator[str]:
        """Yield the reasons why the engine cannot run this configuration, each with the way out."""
        for name, default in _SPECIAL_SETTINGS.items():
            if getattr(parallel, name) != default and name not in self.settings:
                others = " or ".join(other for other, spec in ENGINES.items() if name in spec.settings)
                yield (
                    f"parallel.{name} is for engine {others}, and parallel.engine is {parallel.engine}; remove it or "
                    f"use {others}"
                )
        if parallel.offload not in (allowed := self.offloads(parallel)):
            limited = allowed != self.offloads(parallel.model_copy(update={"tp": 1}))
            why = " with parallel.tp above 1" if limited and parallel.offload == "optimizer" else ""
            yield (
                f"parallel.offload {parallel.offload} is not possible with parallel.engine {parallel.engine}{why}; use "
                f"one of {allowed}, or parallel.engine=zero3"
            )
        if OPTIMIZERS.get(optimizer.name).whole_matrices and not self.keeps_matrices(ranks):
            yield (
                f"training.optimizer {optimizer.name} needs whole matrices, and parallel.engine {parallel.engine} "
                f"shards them over {ranks} process(es); use another optimizer, or one process with parallel.engine=ddp"
            )

    def missing_package(self) -> str | None:
        """Return the name of the package that the engine needs and that is not installed."""
        return self.package if self.package is not None and find_spec(self.package) is None else None

    def memory(self, sizes: Sizes, parallel: ParallelConfig) -> StateMemory:
        """Return the bytes of the training state on the fullest rank."""
        raise NotImplementedError

    def traffic(self, sizes: Sizes, parallel: ParallelConfig) -> list[Transfer]:
        """Return the collectives of parameters and gradients in one step."""
        raise NotImplementedError

    def build(self, model: DistributedModel, layout: Layout, **parts: Unpack[EngineParts]) -> Engine:
        """Return the engine with an initialized model.

        Args:
            model: the model on the meta device.
            layout: this process among all.
            **parts: by keyword; see :class:`EngineParts`.
        """
        raise NotImplementedError


_SPECIAL_SETTINGS = {"shard_size": None, "zero3_persistence_threshold": 0, "reshard_after_forward": True}
"""Settings of ``parallel`` that not every engine has, with the value that does nothing."""
ENGINES: Registry[EngineSpec] = Registry("engine")


class FullyShardedSpec(EngineSpec):
    """PyTorch's ``fully_shard``: parameters, gradients and states sharded."""

    settings = frozenset({"shard_size", "reshard_after_forward"})
    shards_parameters = True
    shard: ClassVar[bool] = True
    """Shard parameters, instead of replicating them."""

    def problems(self, parallel: ParallelConfig, optimizer: OptimizerSettings, ranks: int) -> Iterator[str]:
        """Yield also that ``shard_size`` does not divide the processes."""
        yield from super().problems(parallel, optimizer, ranks)
        size = parallel.shard_size
        if size is not None and (ranks % size or size % parallel.tp):
            fitting = [n for n in range(parallel.tp, ranks + 1, parallel.tp) if ranks % n == 0]
            yield (
                f"parallel.shard_size {size} must divide the {ranks} processes and be a multiple of parallel.tp "
                f"{parallel.tp}; use one of {fitting}"
            )

    def memory(self, sizes: Sizes, parallel: ParallelConfig) -> StateMemory:
        """Count shards; gathered are the block that computes, the next one, and the gradients of one."""
        states = (4 + sizes.stepped) * sizes.shard
        if sizes.ranks == 1:
            return StateMemory(states + sizes.kept_casts, 0.0)
        if parallel.reshard_after_forward:
            return StateMemory(states, 3.0 * sizes.element * sizes.block)
        return StateMemory(states, sizes.element * (sizes.on_rank + sizes.block))  # all blocks, the gradients of one

    def traffic(self, sizes: Sizes, parallel: ParallelConfig) -> list[Transfer]:
        """Gather for forward and, unless kept, for backward; scatter gradients in fp32; in every pass."""
        gathers = 2 if parallel.reshard_after_forward else 1
        block_by_block = sizes.passes * sizes.on_rank * (gathers * sizes.element + 4)
        transfers = [Transfer(block_by_block, sizes.shard_ranks, sizes.shard_ranks)]
        copies = sizes.ranks // sizes.shard_ranks
        if copies > 1:  # the shards of the gradient are summed over the copies
            transfers.append(Transfer(sizes.passes * sizes.on_rank / sizes.shard_ranks * 8, copies, sizes.ranks))
        return transfers

    def build(self, model: DistributedModel, layout: Layout, **parts: Unpack[EngineParts]) -> Engine:
        """Return a :class:`TorchEngine`."""
        from fusiontree.engines.torch_engine import TorchEngine

        return TorchEngine(
            model,
            layout,
            materialize=parts["materialize"],
            decays=parts["decays"],
            training=parts["training"],
            shard=self.shard,
            reshard_after_forward=parts["parallel"].reshard_after_forward,
        )


class ReplicatedSpec(FullyShardedSpec):
    """Parameters replicated; gradients and states sharded."""

    settings = frozenset()
    shards_parameters = shard = False

    def memory(self, sizes: Sizes, parallel: ParallelConfig) -> StateMemory:
        """Count full copies in the precision of the forward pass.

        One process keeps gradients as the backward pass made them. Several add up those of several passes in fp32; of
        one pass each rank keeps its shard. A block's gradients wait for the last of them, and those of two more blocks
        are in flight.
        """
        if sizes.ranks == 1:
            return StateMemory((4 + sizes.stepped) * sizes.on_rank + sizes.kept_casts, 0.0)
        gathered = sizes.element * sizes.block
        if sizes.passes == 1:
            states = sizes.element * sizes.on_rank + (4 + sizes.stepped) * sizes.shard
            return StateMemory(states, gathered + 3 * 4 * sizes.block)
        states = (sizes.element + 4) * sizes.on_rank + sizes.stepped * sizes.shard + sizes.kept_casts
        return StateMemory(states, gathered)

    def traffic(self, sizes: Sizes, parallel: ParallelConfig) -> list[Transfer]:
        """Scatter gradients in fp32 after the last pass, gather parameters."""
        return [Transfer(sizes.on_rank * (4 + sizes.element), sizes.ranks, sizes.ranks)]


class ZeroSpec(EngineSpec):
    """DeepSpeed ZeRO: states (stage 1), gradients (2) and parameters (3) sharded."""

    package = "deepspeed"

    def __init__(self, stage: int) -> None:
        """Describe a stage: 1, 2 or 3."""
        self.stage = stage
        self.settings = frozenset({"zero3_persistence_threshold"}) if stage == 3 else frozenset()  # type: ignore[misc]
        self.casts_parameters = stage < 3  # type: ignore[misc]
        self.shards_parameters = stage == 3  # type: ignore[misc]

    def keeps_matrices(self, ranks: int) -> bool:
        """Return False: DeepSpeed's tensors are flat even on one rank."""
        return False

    def offloads(self, parallel: ParallelConfig) -> list[str]:
        """Return ``all`` for stage 3 only; below, gradients in CPU memory are not summed over tp."""
        if self.stage == 3:
            return ["none", "optimizer", "all"]
        return ["none", "optimizer"] if parallel.tp == 1 else ["none"]

    def memory(self, sizes: Sizes, parallel: ParallelConfig) -> StateMemory:
        """Count full copies where the stage has them; stage 3 gathers two blocks and the gradients of one."""
        if self.stage == 3:
            gathered = 0.0 if sizes.ranks == 1 else 3.0 * sizes.element * sizes.block
            return StateMemory((4 + sizes.stepped) * sizes.shard, gathered)
        if self.stage == 2:
            return StateMemory(sizes.element * sizes.on_rank + (4 + sizes.stepped) * sizes.shard, 0.0)
        return StateMemory((sizes.element + 4) * sizes.on_rank + sizes.stepped * sizes.shard, 0.0)

    def traffic(self, sizes: Sizes, parallel: ParallelConfig) -> list[Transfer]:
        """Stage 3 as ``fsdp2``; stage 2 reduces in every pass, stage 1 after the last."""
        if self.stage == 3:
            return FullyShardedSpec().traffic(sizes, parallel)
        passes = 1 if self.stage == 1 else sizes.passes
        return [Transfer(passes * sizes.on_rank * 8, sizes.ranks, sizes.ranks)]

    def build(self, model: DistributedModel, layout: Layout, **parts: Unpack[EngineParts]) -> Engine:
        """Return a :class:`ZeroEngine`."""
        from fusiontree.engines.zero.engine import ZeroEngine

        return ZeroEngine(model, layout, stage=self.stage, **parts)


ENGINES.register("fsdp2", FullyShardedSpec())
for _stage in (3, 2, 1):
    ENGINES.register(f"zero{_stage}", ZeroSpec(_stage))
ENGINES.register("ddp", ReplicatedSpec())


def known_engine(name: str) -> str:
    """Return ``name``.

    Raises:
        UserError: no engine has this name.
    """
    ENGINES.get(name)
    return name
