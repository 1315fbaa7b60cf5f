"""Activation checkpointing: selects the results of a block's forward to keep; the backward pass recomputes the rest.

``forward`` is wrapped, not the module, so parameter names stay. A block draws no random numbers (branch dropout is an
input), so recomputation restores no generator state.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusiontree.models.model import FusionTreeModel
from fusiontree.ops.attention.flash4 import ALL_BEFORE
from fusiontree.ops.recompute import Recomputed
from fusiontree.parallel.recompute_mix import describe_mix, modes_by_layer

_ATEN = torch.ops.aten
KEPT = {
    ALL_BEFORE,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Operations whose results mode ``full`` keeps too: expensive to compute, and small compared with other activations.

Not included: torch's varlen_attn, whose outputs are recomputed.
"""


class CheckpointedForward:
    """The forward of a block under one of the modes; the mode may change between steps."""

    def __init__(self, forward: Callable[..., Any], mode: str) -> None:
        """Wrap ``forward``; ``mode`` is none, selective, full or offload."""
        self.forward, self.mode = forward, mode
        self.before: Callable[..., None] | None = None
        """Called once, with the wrapped forward and its arguments, before the next forward with gradients."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        if self.before is not None and torch.is_grad_enabled():
            before, self.before = self.before, None
            before(self.forward, *args, **kwargs)
        return _FORWARDS[self.mode](self.forward, *args, **kwargs)


class Checkpointing:
    """The activation checkpointing of a model's blocks, with modes that do not change."""

    settled = True
    """The modes do not change any more: CUDA graphs may be captured."""

    def __init__(self, forwards: Sequence[CheckpointedForward]) -> None:
        """Take the forwards of the blocks, in order."""
        self.forwards = forwards
        self.announce: Callable[[str], None] = lambda line: None
        """Is given one line when modes were chosen; may be replaced."""

    @property
    def modes(self) -> list[str]:
        """The mode of each block."""
        return [forward.mode for forward in self.forwards]

    def step(self) -> AbstractContextManager[None]:
        """Return the context of one optimizer step; all ranks enter it together."""
        return nullcontext()

    def summary(self) -> str:
        """Return the number of layers of each mode."""
        return describe_mix(self.modes)


def checkpoint_activations(model: FusionTreeModel, mode: str, layers: int | None = None) -> Checkpointing:
    """Recompute activations of blocks in the backward pass.

    All parameters of a block must be available during its whole backward pass.

    Args:
        model: the ``forward`` of each of its blocks is wrapped.
        mode: none; full keeps a block's input and the result of global attention; selective keeps expensive results
            (matrix products, attention, scan) and recomputes each norm, convolution, activation and gate mix where the
            backward pass needs it (:mod:`fusiontree.ops.recompute`); offload is full with block inputs in CPU memory.
        layers: apply ``mode`` to the first ``layers`` blocks (None: all). The remaining blocks use ``selective`` if
            mode is ``full`` or ``offload``, and no recomputation if mode is ``selective``.
    """
    forwards = []
    for block, its_mode in zip(model.layers, modes_by_layer(mode, layers, len(model.layers)), strict=True):
        forwards.append(CheckpointedForward(block.forward, its_mode))
        block.forward = forwards[-1]
    return Checkpointing(forwards)


def fuse_projections(model: FusionTreeModel) -> None:
    """Let blocks fuse projections of the same input; for engines that gather a block's parameters together."""
    for module in model.modules():
        if hasattr(module, "fused_projections"):
            setattr(module, "fused_projections", True)  # noqa: B010


def _none(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **kwargs)


def _full(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_keeping, **kwargs)


def _selective(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with Recomputed():
        return forward(*args, **kwargs)


def _offload(forward: Callable[..., Any], x_BSC: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(x_BSC, *args, **kwargs)
    # The backward pass uses the graph of the forward; the recomputation only needs the input's value.
    stored = _Offloaded(x_BSC)
    out = _full(lambda *rest, **named: forward(stored.take(), *rest, **named), *args, **kwargs)
    stored.send()
    return out


class _Offloaded:
    """A tensor that is kept in CPU memory between the forward and its recomputation."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.device, self.requires_grad = tensor.device, tensor.requires_grad
        self.sent = False

    def send(self) -> None:
        """Copy the value to the CPU; the device memory is freed when the device's stream has made the copy."""
        on_cpu = torch.empty(self.tensor.shape, dtype=self.tensor.dtype, pin_memory=self.device.type == "cuda")
        self.tensor = on_cpu.copy_(self.tensor.detach(), non_blocking=True)
        self.sent = True

    def take(self) -> Tensor:
        """Return the tensor itself before :meth:`send`; after it, a copy of the value on the device."""
        if not self.sent:
            return self.tensor
        return self.tensor.to(self.device, non_blocking=True).requires_grad_(self.requires_grad)


_FORWARDS: dict[str, Callable[..., Any]] = {"none": _none, "selective": _selective, "full": _full, "offload": _offload}


def _keeping() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return the dispatch modes for a forward and for its recomputation.

    torch's selective checkpointing matches all operations of forward and recomputation by order. That fails with
    engines that gather parameters inside a block, as the recomputation then runs different operations. These modes
    match only the operations in ``KEPT``.
    """
    kept: deque[Any] = deque()
    return KeptResults(kept, replay=False), KeptResults(kept, replay=True)


class KeptResults(TorchDispatchMode):
    """Appends the results of the operations in ``KEPT`` to ``kept``, or with ``replay`` returns them instead."""

    def __init__(self, kept: deque[Any], replay: bool) -> None:
        super().__init__()
        self.kept, self.replay = kept, replay

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.replay and func in KEPT:
            results, versions = self.kept.popleft()
            assert versions == _versions(results), f"a kept result of {func} was overwritten after the forward"
            return results
        out = func(*args, **(kwargs or {}))
        if func in KEPT:
            results = _detached(out)
            self.kept.append((results, _versions(results)))
        return out


def _detached(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out.detach()
    return type(out)(_detached(x) for x in out) if isinstance(out, tuple | list) else out


def _versions(out: Any) -> list[int]:
    """Return the version counter of each result: how often its memory was written to."""
    return [x._version for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
