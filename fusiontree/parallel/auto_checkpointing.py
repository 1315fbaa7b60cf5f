"""``training.activation_checkpointing: auto``: fills a memory budget with the fastest mix of recomputation.

The first step recomputes every block in full. Its first micro-batch measures the bytes that each block keeps under each
mode, and the step measures the peak of the memory. The mix is chosen after it. The second step measures the peak under
that mix, and the final choice follows: the first choice assumes that all added bytes exist at the peak, the second
knows. From the third step on the mix is fixed. Recomputation gives equal values, so losses do not depend on the mix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers.base import Seconds
from fusiontree.parallel.activation_checkpointing import Checkpointing
from fusiontree.parallel.fp8 import fp8_by_layer
from fusiontree.parallel.kept_memory import kept_bytes
from fusiontree.parallel.layout import Layout
from fusiontree.parallel.recompute_mix import added_bytes, choose_mix, layer_costs, peak_bytes, seconds_by_layer
from fusiontree.training.config import TrainingConfig
from fusiontree.utils.device import available_memory
from fusiontree.utils.errors import UserError

GIB = 2**30
_ROUNDS = 2


class Memory(Protocol):
    """The memory that a rank's tensors are in."""

    def budget(self) -> float:
        """Return the bytes that tensors may fill at one time; called after a step."""
        ...

    def begin_step(self) -> None:
        """Begin to measure the peak."""
        ...

    def peak(self, nbytes: Sequence[dict[str, float]], modes: Sequence[str]) -> float:
        """Return the most bytes that were in use since :meth:`begin_step`, given what each layer keeps by mode."""
        ...

    def release(self) -> None:
        """Give cached memory back, as a new mix needs blocks of other sizes."""
        ...


class CudaMemory:
    """A GPU's memory as PyTorch's allocator counts it."""

    def __init__(self, device: torch.device, limit: float) -> None:
        """Allow the share ``limit`` of the memory of ``device``."""
        self._device, self._limit = device, limit

    def budget(self) -> float:
        """Return the share of all memory, but leave half of the rest to fragmentation.

        CUDA, NCCL and other processes hold memory that the allocator cannot have.
        """
        free, total = torch.cuda.mem_get_info(self._device)
        reachable = free + torch.cuda.memory_reserved(self._device)
        return min(self._limit * total, reachable - (1 - self._limit) / 2 * total)

    def begin_step(self) -> None:
        """Begin to measure the peak."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self, nbytes: Sequence[dict[str, float]], modes: Sequence[str]) -> float:
        """Return the measured peak. Allocations follow the host's order, so this need not wait for the device."""
        return torch.cuda.max_memory_allocated(self._device)

    def release(self) -> None:
        """Give cached blocks back to CUDA."""
        torch.cuda.empty_cache()


class CpuMemory:
    """A share of the CPU memory that is free before the first step. The peak is computed: no allocator counts it."""

    def __init__(self, limit: float, ranks: int) -> None:
        """Divide the share ``limit`` of the free memory among ``ranks`` processes of this machine."""
        self._limit, self._ranks = limit, ranks
        self._free: int | None = None

    def budget(self) -> float:
        """Return this rank's part of the memory that was free when the first step began."""
        assert self._free is not None, "no step began"
        return self._limit * self._free / self._ranks

    def begin_step(self) -> None:
        """Note the free memory.

        Raises:
            UserError: the system does not report its free memory.
        """
        if self._free is None:
            self._free = available_memory()
        if self._free is None:
            raise UserError(
                "training.activation_checkpointing auto needs the free memory, which this system does not report; use "
                "none, selective or full"
            )

    def peak(self, nbytes: Sequence[dict[str, float]], modes: Sequence[str]) -> float:
        """Return what the layers keep, and the block that is recomputed: states are not part of the free memory."""
        return peak_bytes(nbytes, modes)

    def release(self) -> None:
        """Do nothing: the allocator of the CPU keeps no cache."""


def device_memory(layout: Layout, limit: float) -> Memory:
    """Return the memory of this rank's device, of which tensors may fill the share ``limit``."""
    if layout.device.type == "cuda":
        return CudaMemory(layout.device, limit)
    return CpuMemory(limit, layout.place.local_world_size)


class AutoCheckpointing(Checkpointing):
    """Chooses the modes of the blocks after the first and the second step; see the module's text."""

    def __init__(
        self,
        checkpointing: Checkpointing,
        memory: Memory,
        gather_text: Callable[[str], list[str]],
        *,
        seconds: Sequence[Seconds],
        tokens: float,
        limit: float,
    ) -> None:
        """Measure nothing yet.

        Args:
            checkpointing: of the model; every block is in mode full.
            memory: of this rank.
            gather_text: returns every rank's text on all ranks.
            seconds: of each layer, per token.
            tokens: of this rank's part of a micro-batch.
            limit: ``training.memory_limit``, which errors name.
        """
        super().__init__(checkpointing.forwards)
        self.settled = False
        self._memory, self._gather_text = memory, gather_text
        self._seconds, self._tokens, self._limit = seconds, tokens, limit
        self._kept: list[dict[str, float]] = []
        self._round = 0
        self._filled = ""

    @contextmanager
    def step(self) -> Iterator[None]:
        """Return the context of one optimizer step, after which the mix may change; all ranks enter it together.

        Raises:
            UserError: memory does not suffice for full recomputation, or for the chosen mix.
        """
        try:
            if self.settled:
                yield
                return
            self._begin()
            yield
            self._choose()
        except torch.OutOfMemoryError as error:
            raise UserError(self._out_of_memory(error)) from error

    def summary(self) -> str:
        """Return the number of layers of each mode and, once chosen, the filled part of the budget."""
        return f"{super().summary()} (auto{self._filled})"

    def _begin(self) -> None:
        if self._round == 0:
            for forward in self.forwards:
                forward.before = self._measure
        self._memory.begin_step()

    def _measure(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._kept.append({mode: float(size) for mode, size in kept_bytes(forward, *args, **kwargs).items()})

    def _choose(self) -> None:
        """Choose the modes from the measurements of all ranks: the fullest rank decides for all."""
        self._round += 1
        peak, modes = self._memory.peak(self._kept, self.modes), self.modes
        base = peak - sum(sizes[mode] - sizes["full"] for sizes, mode in zip(self._kept, modes, strict=True))
        # Read after the step: NCCL takes memory at its first collectives.
        mine = {"base": base, "budget": self._memory.budget(), "kept": self._kept}
        ranks = [json.loads(text) for text in self._gather_text(json.dumps(mine))]
        fullest = min(ranks, key=lambda rank: rank["budget"] - rank["base"])
        spare = fullest["budget"] - fullest["base"]
        if spare < 0 and self._round == 1:
            raise UserError(self._too_small(fullest["base"], fullest["budget"]))
        layers = [
            layer_costs({mode: max(rank["kept"][index][mode] for rank in ranks) for mode in sizes}, its, self._tokens)
            for index, (sizes, its) in enumerate(zip(self._kept, self._seconds, strict=True))
        ]
        chosen = choose_mix(layers, max(0.0, spare))
        if chosen != modes:
            self._memory.release()
        for forward, mode in zip(self.forwards, chosen, strict=True):
            forward.mode = mode
        used = fullest["base"] + added_bytes(layers, chosen)
        self._filled = f", {used / GIB:.1f} of {fullest['budget'] / GIB:.1f} GiB"
        if self._round == _ROUNDS:
            self.settled = True
            self.announce(self.summary())

    def _out_of_memory(self, error: BaseException) -> str:
        way_out = "use more ranks, a smaller training.micro_batch_size or training.activation_checkpointing=offload"
        if self._round > 0:
            way_out = f"lower training.memory_limit (now {self._limit:g}), or {way_out}"
        found = str(error).split("\n")[0].split(". GPU")[0]
        return f"training.activation_checkpointing auto, {self.summary()}: {found}; {way_out}"

    def _too_small(self, needed: float, budget: float) -> str:
        return (
            f"training.activation_checkpointing auto: a step needs {needed / GIB:.3g} GiB per rank with every layer "
            f"recomputed in full, and training.memory_limit {self._limit:g} allows {budget / GIB:.3g} GiB; use more "
            f"ranks, a smaller training.micro_batch_size, training.activation_checkpointing=offload or a higher "
            f"training.memory_limit"
        )


def choose_automatically(
    checkpointing: Checkpointing, model: ModelConfig, training: TrainingConfig, layout: Layout
) -> AutoCheckpointing:
    """Return the automatic choice for a model whose blocks are in mode full.

    Args:
        checkpointing: of the model.
        model: the ``model`` section.
        training: the ``training`` section.
        layout: this process among all.
    """
    rows = min(training.micro_batch_size, -(-training.global_batch_size // layout.dp_size))
    return AutoCheckpointing(
        checkpointing,
        device_memory(layout, training.memory_limit),
        layout.gather_text,
        seconds=seconds_by_layer(model, training.seq_len, fp8_by_layer(model, training)),
        tokens=rows * training.seq_len / layout.cp_size / layout.tp_size,
        limit=training.memory_limit,
    )
