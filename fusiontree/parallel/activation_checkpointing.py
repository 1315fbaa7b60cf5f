"""Which results of a block's forward are kept for the backward pass, and which are computed again.

``forward`` is wrapped, not the module, so parameter names stay. Nothing in a block draws random numbers (branch dropout
is an input), so there is no state of a generator to replay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fusiontree.models.model import FusionTreeModel
from fusiontree.ops.attention.flash4 import ALL_BEFORE
from fusiontree.ops.recompute import Recomputed

_ATEN = torch.ops.aten
KEPT = {
    ALL_BEFORE,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Operations whose results are kept by full recomputation too: dear, and small beside the other activations.

torch's varlen_attn is not among them: what it returns is computed again.
"""


def checkpoint_activations(model: FusionTreeModel, mode: str, layers: int | None = None) -> None:
    """Recompute blocks in the backward pass, throughout which all parameters of a block must be at hand.

    Args:
        model: its blocks' ``forward`` is wrapped.
        mode: none; full keeps a block's input and the result of global attention; selective keeps all that is dear to
            compute (matrix products, attention, scan) and computes norms, convolutions, activations and mixes again,
            each where it is needed (:mod:`fusiontree.ops.recompute`); offload is full with the inputs in CPU memory.
        layers: only the first so many (None: all). Of full and offload the others are selective, of selective they
            keep everything.
    """
    wrap: dict[str, Callable[..., Any]] = {"full": _full, "selective": _selective, "offload": _offload}
    if mode == "none":
        return
    for index, block in enumerate(model.layers):
        if layers is None or index < layers:
            block.forward = partial(wrap[mode], block.forward)
        elif mode != "selective":
            block.forward = partial(_selective, block.forward)


def fuse_projections(model: FusionTreeModel) -> None:
    """Let every block read its matrices' weights itself: for engines that gather a block's parameters together."""
    for module in model.modules():
        if hasattr(module, "fused_projections"):
            setattr(module, "fused_projections", True)  # noqa: B010


def _full(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_keeping, **kwargs)


def _selective(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with Recomputed():
        return forward(*args, **kwargs)


def _offload(forward: Callable[..., Any], x_BSC: Tensor, *args: Any, **kwargs: Any) -> Any:
    # The backward pass walks the forward's own graph; the recomputation only needs the input's value.
    stored = _Offloaded(x_BSC)
    out = _full(lambda *rest, **named: forward(stored.take(), *rest, **named), *args, **kwargs)
    stored.send()
    return out


class _Offloaded:
    """A tensor that waits in CPU memory between the forward and its recomputation."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.device, self.requires_grad = tensor.device, tensor.requires_grad
        self.sent = False

    def send(self) -> None:
        """Move the value to the CPU; the device's memory is free once its stream gets there."""
        on_cpu = torch.empty(self.tensor.shape, dtype=self.tensor.dtype, pin_memory=self.device.type == "cuda")
        self.tensor = on_cpu.copy_(self.tensor.detach(), non_blocking=True)
        self.sent = True

    def take(self) -> Tensor:
        """Return the tensor itself before :meth:`send`, and its value on the device after it."""
        if not self.sent:
            return self.tensor
        return self.tensor.to(self.device, non_blocking=True).requires_grad_(self.requires_grad)


def _keeping() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return the modes of a forward and of its recomputation.

    torch's own selective checkpointing matches every operation of the two passes by its order; engines that gather
    parameters inside a block run others in the recomputation than in the forward. These modes look at what is kept.
    """
    kept: deque[Any] = deque()
    return _Keep(kept), _Replay(kept)


class _Keep(TorchDispatchMode):
    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in KEPT:
            results = _detached(out)
            self.kept.append((results, _versions(results)))
        return out


class _Replay(TorchDispatchMode):
    def __init__(self, kept: deque[Any]) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in KEPT:
            results, versions = self.kept.popleft()
            assert versions == _versions(results), f"a kept result of {func} was overwritten after the forward"
            return results
        return func(*args, **(kwargs or {}))


def _detached(out: Any) -> Any:
    if isinstance(out, Tensor):
        return out.detach()
    return type(out)(_detached(x) for x in out) if isinstance(out, tuple | list) else out


def _versions(out: Any) -> list[int]:
    """How often the results' memory was written to."""
    return [x._version for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
