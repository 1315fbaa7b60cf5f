"""Counts the host's work of a forward and backward pass: dispatched operations, kernels and Python calls.

The operations with kernels of their own (scan, attention, norms, …) count as one call each, forward and backward, as
on a GPU, where their formulas are single launches; what the reference formulas do inside is not counted.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

import fusiontree
from fusiontree.ops import attention, conv, cross_entropy, elementwise, gate, gelu, norm, rotary, ssd

OWN, TORCH = str(Path(fusiontree.__file__).parent), str(Path(torch.__file__).parent)
_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
_COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>")
"""Calls in Python 3.11 alone."""
KERNELS = (
    attention.ATTENTION,
    conv.CONV,
    cross_entropy.CROSS_ENTROPY,
    gate.GRADIENTS,
    gate.MIX,
    gate.MIX_AND_SUMS,
    gelu.AGAIN_AND_GRADIENT,
    norm.NORM,
    norm.RESIDUAL_NORM,
    norm.GATED_NORM,
    rotary.ROTATE,
    rotary.ROTATE_BACK,
    ssd.SSD,
)


class HostWork(TorchDispatchMode):
    """Counts while it is entered, in the thread that entered it; on a CPU that thread runs the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self._inside = 0
        self.reset()

    def reset(self) -> None:
        """Forget what was counted."""
        self.operations: Counter[str] = Counter()
        """Launches by name: operations that return new values, and calls of kernels."""
        self.views: Counter[str] = Counter()
        """Dispatched operations that return views of their inputs."""
        self.own_calls: Counter[str] = Counter()
        """Python functions of FusionTree."""
        self.torch_calls = 0
        """Python functions of torch."""

    @contextmanager
    def counted_calls(self) -> Iterator[None]:
        """Count Python functions; not while operations are counted, which makes torch call many."""
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self.inside():
            out = func(*args, **(kwargs or {}))
        if not self._inside:
            aliases = [result.alias_info for result in func._schema.returns]
            if func is _UNSAFE_VIEW or any(alias is not None and not alias.is_write for alias in aliases):
                self.views[str(func)] += 1
            else:
                self.operations[str(func)] += 1
        return out

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and not self._inside:
            file, name = frame.f_code.co_filename, frame.f_code.co_name
            if file.startswith(OWN) and name not in _COMPREHENSIONS:
                self.own_calls[f"{file.removeprefix(OWN)}:{name}"] += 1
            self.torch_calls += file.startswith(TORCH)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Count nothing."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def as_one_call(self, name: str, formula: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``formula`` as a kernel: one operation forward, one backward."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.inside():
                leaves, spec = tree_flatten((args, kwargs))
                wanted = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
                if not wanted or not torch.is_grad_enabled():
                    outputs = formula(*args, **kwargs)
                else:
                    shape: list[Any] = []

                    def compute(*inputs: Tensor) -> list[Any]:
                        values = list(leaves)
                        for n, value in zip(wanted, inputs, strict=True):
                            values[n] = value
                        found_args, found_kwargs = tree_unflatten(values, spec)
                        flat, structure = tree_flatten(formula(*found_args, **found_kwargs))
                        shape.append(structure)
                        return flat

                    flat = _OneCall.apply(self, name, compute, *(leaves[n] for n in wanted))
                    outputs = tree_unflatten(flat, shape[0])
            if not self._inside:
                self.operations[name] += 1
            return outputs

        return run


class _OneCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: HostWork, name: str, compute: Callable[..., list[Any]], *inputs: Tensor) -> Any:
        with torch.enable_grad():
            ctx.leaves = [value.detach().requires_grad_() for value in inputs]
            ctx.results = compute(*ctx.leaves)
        ctx.work, ctx.name = work, name
        ctx.set_materialize_grads(False)
        return tuple(result.detach() for result in ctx.results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        with ctx.work.inside():
            pairs = [(r, g) for r, g in zip(ctx.results, grads, strict=True) if g is not None and r.grad_fn is not None]
            results, given = zip(*pairs, strict=True)
            found = torch.autograd.grad(results, ctx.leaves, given, allow_unused=True)
        ctx.work.operations[f"{ctx.name}, backward"] += 1
        return None, None, None, *found


def count_kernels_as_calls(work: HostWork, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every operation with a kernel count as one call of ``work``."""
    for operation in KERNELS:
        choose = operation.choose

        def chosen(backend: str, device: str, name: str = operation.shown, choose: Any = choose) -> Any:
            return work.as_one_call(name, choose(backend, device))

        monkeypatch.setattr(operation, "choose", chosen)
    monkeypatch.setattr(
        elementwise.ELEMENTWISE, "choose", lambda *_: lambda formula: work.as_one_call(formula.__name__, formula)
    )
