"""Selective recomputation: frees marked results after the forward pass and recomputes them when backward needs them.

A norm, an activation or a gate mix reads and writes memory only once, so recomputing its result is cheaper than keeping
it. :func:`recomputed` marks such a result. Inside :class:`Recomputed`, an operation that would save the marked result
for its backward (such as a matrix product that saves its input) saves the formula and the formula's inputs instead. All
other tensors are saved as usual: only marked formulas run twice, and no operation is traced.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_active: list[Recomputed] = []


def recomputed(formula: Callable[..., Any], *inputs: Any) -> Any:
    """Return ``formula(*inputs)`` (a tensor or a tuple of tensors) and mark it to be recomputed rather than kept.

    ``formula`` must be deterministic. Outside :class:`Recomputed` this is a plain call.
    """
    outputs = formula(*inputs)
    mark_recomputable(outputs, formula, *inputs)
    return outputs


def mark_recomputable(outputs: Any, formula: Callable[..., Any], *inputs: Any) -> None:
    """Mark ``outputs`` to be recomputed as ``formula(*inputs)``, which must return equal values."""
    if _active and torch.is_grad_enabled():
        _active[-1].register(formula, inputs, outputs)


def recomputing() -> bool:
    """Return whether results of :func:`recomputed` are recomputed now."""
    return bool(_active) and torch.is_grad_enabled()


class Recomputed(saved_tensors_hooks):
    """Context of a forward pass in which results of :func:`recomputed` are not kept for the backward pass."""

    def __init__(self, watch: Callable[[Tensor, Any], Any] | None = None) -> None:
        """Start without marked results.

        Args:
            watch: is given each tensor that an operation saves, and what is kept in its place; for measurements of a
                forward without a backward.
        """
        pack = self._pack if watch is None else lambda tensor: watch(tensor, self._pack(tensor))
        super().__init__(pack, self._unpack)
        self._recipes: dict[int, tuple[weakref.ref[Tensor], _Recipe, int]] = {}

    def __enter__(self) -> None:
        super().__enter__()
        _active.append(self)

    def __exit__(self, *error: Any) -> None:
        _active.pop()
        super().__exit__(*error)
        self._recipes.clear()

    def register(self, formula: Callable[..., Any], inputs: tuple[Any, ...], outputs: Any) -> None:
        """Record that ``formula(*inputs)`` computes ``outputs``."""
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        places = [tensor.untyped_storage().data_ptr() for tensor in tensors]
        taken = {value.untyped_storage().data_ptr() for value in inputs if isinstance(value, Tensor)}
        if len(set(places)) < len(places) or not taken.isdisjoint(places):
            return  # a view of an input or of another output: dropping it frees no memory
        recipe = _Recipe(formula, tuple(self._pack(v) if isinstance(v, Tensor) else v for v in inputs), tensors)
        for index, (place, tensor) in enumerate(zip(places, tensors, strict=True)):
            self._recipes[place] = (weakref.ref(tensor), recipe, index)

    def _pack(self, tensor: Tensor) -> Any:
        # Called for every tensor that the forward pass saves, so it calls no function of ours.
        if isinstance(tensor, torch.nn.Parameter):
            return tensor
        place = tensor.untyped_storage().data_ptr()
        found = self._recipes.get(place)
        if found is not None:
            marked, recipe, index = found
            result = marked()
            # The memory of a freed result may have been reused by another tensor.
            if result is not None and result.dtype == tensor.dtype and result.untyped_storage().data_ptr() == place:
                return _Use(recipe, index, tensor)
        return tensor.detach() if tensor.requires_grad else tensor

    @staticmethod
    def _unpack(saved: Any) -> Tensor:
        return saved.value() if isinstance(saved, _Use) else saved


def kept_tensors(saved: Any) -> Iterator[Tensor]:
    """Yield the tensors that a value packed by :class:`Recomputed` keeps: itself, or a formula's inputs."""
    if isinstance(saved, Tensor):
        yield saved
    elif isinstance(saved, _Use):
        for value in saved.inputs:
            yield from kept_tensors(value)


class _Recipe:
    """One call of a formula; its values are recomputed at the first use and freed after the last."""

    def __init__(self, formula: Callable[..., Any], inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        self._formula = formula
        self.inputs = inputs
        self._layouts = [(t.size(), t.stride(), t.storage_offset()) for t in outputs]
        self._values: tuple[Tensor, ...] | None = None
        self.uses = 0

    def values(self) -> tuple[Tensor, ...]:
        """Return the results; called exactly once per use."""
        values = self._values
        if values is None:
            with torch.no_grad():
                found = self._formula(*(v.value() if isinstance(v, _Use) else v for v in self.inputs))
            found = found if isinstance(found, tuple) else (found,)
            values = tuple(_laid_out(t, *layout) for t, layout in zip(found, self._layouts, strict=True))
        self.uses -= 1
        self._values = values if self.uses > 0 else None
        return values


class _Use:
    """Saved for backward in place of a result or of a view of it."""

    def __init__(self, recipe: _Recipe, index: int, tensor: Tensor) -> None:
        self._recipe, self._index = recipe, index
        self._layout = (tensor.size(), tensor.stride(), tensor.storage_offset())
        recipe.uses += 1

    @property
    def inputs(self) -> tuple[Any, ...]:
        return self._recipe.inputs

    def value(self) -> Tensor:
        return self._recipe.values()[self._index].as_strided(*self._layout)


def _laid_out(tensor: Tensor, size: torch.Size, stride: tuple[int, ...], offset: Any) -> Tensor:
    """Return ``tensor`` with the strides it had in the forward pass, so that views of it can be restored."""
    assert tensor.size() == size, f"recomputed shape {tuple(tensor.size())} instead of {tuple(size)}"
    if tensor.stride() == stride and tensor.storage_offset() == offset:
        return tensor
    assert offset == 0, "a marked result must start at storage offset 0"
    return torch.empty_strided(size, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
