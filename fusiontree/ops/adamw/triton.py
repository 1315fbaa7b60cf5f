"""Step of AdamW by two kinds of Triton kernels, whatever the number of tensors (GPU).

The first advances the step counts and computes the scalars of each tensor. The second updates blocks of elements; a
table on the device tells each program its tensor and its block. Tensors whose gradient or copy is of another dtype go
to another launch of it, as do tensors at addresses that vector loads cannot read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusiontree.ops.adamw.reference import Constants, Gradients, Parts

_BLOCK, _WARPS = 2048, 8
_TENSORS = 128  # per program of the first kernel
_ALIGNMENT = 16  # bytes of a vector load
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_ADDRESSES = ("values", "mean", "square", "copy")
_COLUMNS = 5  # of the table: these addresses and the number of elements
_SCALARS = 4  # of each tensor


@triton.jit
def _adamw_counts(
    steps_ptr, decays_ptr, scalars_ptr, rate_ptr, divisor_ptr, norm_ptr, count, log_beta1, log_beta2,
    COLUMNS: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    mask = n < count
    applied = tl.where(tl.abs(tl.load(norm_ptr)) < float("inf"), 1.0, 0.0)  # no comparison holds for NaN
    steps = tl.load(steps_ptr + n, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    step = tl.load(steps, mask=mask, other=0.0) + applied
    tl.store(steps, step, mask=mask)
    # In fp64: of 1 - beta ** step little is left in the first steps.
    bias1 = 1.0 - tl.exp(step.to(tl.float64) * log_beta1)
    bias2 = 1.0 - tl.exp(step.to(tl.float64) * log_beta2)
    rate = tl.load(rate_ptr).to(tl.float32)
    inverse = (1.0 / tl.load(divisor_ptr).to(tl.float64)).to(tl.float32)
    scalars = scalars_ptr + n * COLUMNS
    tl.store(scalars, inverse, mask=mask)
    tl.store(scalars + 1, rate * tl.load(decays_ptr + n, mask=mask, other=0.0), mask=mask)
    tl.store(scalars + 2, (rate / bias1).to(tl.float32), mask=mask)
    tl.store(scalars + 3, (1.0 / tl.sqrt(bias2)).to(tl.float32), mask=mask)


@triton.jit
def _places(address, n, type: tl.constexpr, aligned: tl.constexpr):
    """Return pointers to elements ``n`` of the tensor at ``address``."""
    places = address.to(tl.pointer_type(type)) + n
    if aligned:
        places = tl.multiple_of(places, 16)
    return places


@triton.jit
def _update_block(
    row, gradient_address, scalars, n, mask, beta1, rest1, beta2, rest2, eps,
    gradient_type: tl.constexpr, mean_type: tl.constexpr, square_type: tl.constexpr, copy_type: tl.constexpr,
    aligned: tl.constexpr,
):  # fmt: skip
    """Update elements ``n`` of a tensor, given its row of the table."""
    values_ptr = _places(tl.load(row), n, tl.float32, aligned)
    mean_ptr = _places(tl.load(row + 1), n, mean_type, aligned)
    square_ptr = _places(tl.load(row + 2), n, square_type, aligned)
    values = tl.load(values_ptr, mask=mask)
    mean = tl.load(mean_ptr, mask=mask).to(tl.float32) * beta1
    square = tl.load(square_ptr, mask=mask).to(tl.float32) * beta2
    if gradient_type is not None:
        gradient_ptr = _places(gradient_address, n, gradient_type, aligned)
        gradient = tl.load(gradient_ptr, mask=mask).to(tl.float32) * tl.load(scalars)
        mean += gradient * rest1
        square += gradient * gradient * rest2
    values -= values * tl.load(scalars + 1)
    values -= tl.load(scalars + 2) * mean / (tl.sqrt(square) * tl.load(scalars + 3) + eps)
    tl.store(values_ptr, values, mask=mask)
    tl.store(mean_ptr, mean.to(mean_type), mask=mask)
    tl.store(square_ptr, square.to(square_type), mask=mask)
    if copy_type is not None:
        tl.store(_places(tl.load(row + 3), n, copy_type, aligned), values.to(copy_type), mask=mask)


@triton.jit
def _adamw_update(
    blocks_ptr, table_ptr, gradients_ptr, scalars_ptr, norm_ptr, beta1, rest1, beta2, rest2, eps,
    gradient_type: tl.constexpr, mean_type: tl.constexpr, square_type: tl.constexpr, copy_type: tl.constexpr,
    aligned: tl.constexpr, COLUMNS: tl.constexpr, SCALARS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.abs(tl.load(norm_ptr)) < float("inf"):
        block = tl.load(blocks_ptr + tl.program_id(0))
        tensor = block >> 32
        row, scalars = table_ptr + tensor * COLUMNS, scalars_ptr + tensor * SCALARS
        gradient, size = tl.load(gradients_ptr + tensor), tl.load(row + 4)
        start = (block - (tensor << 32)) * BLOCK
        n = start + tl.arange(0, BLOCK)
        if start + BLOCK <= size:  # a mask of unknown borders would allow no vector loads
            _update_block(
                row, gradient, scalars, n, None, beta1, rest1, beta2, rest2, eps,
                gradient_type, mean_type, square_type, copy_type, aligned,
            )  # fmt: skip
        else:
            _update_block(
                row, gradient, scalars, n, n < size, beta1, rest1, beta2, rest2, eps,
                gradient_type, mean_type, square_type, copy_type, aligned,
            )  # fmt: skip


class _Kind(NamedTuple):
    """What decides the launch that updates a tensor; None: it has no gradient, or no copy."""

    gradient: torch.dtype | None
    mean: torch.dtype
    square: torch.dtype
    copy: torch.dtype | None
    aligned: bool

    def arguments(self) -> dict[str, Any]:
        """Return the kernel's arguments of these names."""
        dtypes = {"gradient": self.gradient, "mean": self.mean, "square": self.square, "copy": self.copy}
        types = {f"{name}_type": None if dtype is None else _TYPES[dtype] for name, dtype in dtypes.items()}
        return {**types, "aligned": self.aligned}


class TritonUpdate:
    """An :class:`~fusiontree.ops.adamw.reference.Update` in few launches."""

    def __init__(self, parts: Sequence[Parts], constants: Constants) -> None:
        """Write the addresses to the device."""
        self.parts, self.constants = list(parts), constants  # the table does not keep the memory
        self._device = parts[0].values.device
        addresses = [[_address(getattr(its, name)) for name in _ADDRESSES] for its in parts]
        self._aligned = [all(address % _ALIGNMENT == 0 for address in row) for row in addresses]
        sizes = [its.values.numel() for its in parts]
        self._blocks_of = [-(-size // _BLOCK) for size in sizes]
        self._table = self._on_device([[*row, size] for row, size in zip(addresses, sizes, strict=True)])
        self._steps = self._on_device([_address(its.step) for its in parts])
        self._decays = torch.tensor([its.decay for its in parts], dtype=torch.float32, device=self._device)
        self._scalars = torch.zeros(len(parts), _SCALARS, device=self._device)
        self._launches: dict[tuple[_Kind, ...], list[tuple[_Kind, Tensor]]] = {}
        self._prepared: dict[tuple[int, ...], Tensor] = {}

    def _on_device(self, values: list[Any] | Tensor) -> Tensor:
        """Return int64 values on the device without waiting for it."""
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("AdamW: the gradients' addresses must be prepared before a CUDA graph is recorded")
        host = torch.as_tensor(values, dtype=torch.int64)
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host

    def _launches_of(self, gradients: Gradients, addresses: tuple[int, ...]) -> list[tuple[_Kind, Tensor]]:
        """Return the kinds of tensors, each with its blocks: tensor in the high 32 bits, number in the low ones."""
        kinds = tuple(
            _Kind(
                None if gradient is None else gradient.dtype,
                its.mean.dtype,
                its.square.dtype,
                None if its.copy is None else its.copy.dtype,
                aligned and address % _ALIGNMENT == 0,
            )
            for gradient, its, aligned, address in zip(gradients, self.parts, self._aligned, addresses, strict=True)
        )
        if kinds not in self._launches:
            blocks: dict[_Kind, list[Tensor]] = {}
            for number, (kind, count) in enumerate(zip(kinds, self._blocks_of, strict=True)):
                blocks.setdefault(kind, []).append(torch.arange(count, dtype=torch.int64) + (number << 32))
            self._launches[kinds] = [(kind, self._on_device(torch.cat(its))) for kind, its in blocks.items()]
        return self._launches[kinds]

    def prepare(self, gradients: Gradients) -> None:
        """Write the gradients' addresses to the device, for as long as this object lives."""
        addresses = tuple(_address(gradient) for gradient in gradients)
        self._launches_of(gradients, addresses)
        if addresses not in self._prepared:
            self._prepared[addresses] = self._on_device(list(addresses))

    def __call__(self, gradients: Gradients, rate: Tensor, divisor: Tensor, norm: Tensor) -> None:
        """Do :meth:`~fusiontree.ops.adamw.reference.Update.__call__`."""
        gradients = [None if gradient is None else gradient.contiguous() for gradient in gradients]
        addresses = tuple(_address(gradient) for gradient in gradients)
        table = self._prepared.get(addresses)
        table = self._on_device(list(addresses)) if table is None else table
        beta1, beta2, eps = self.constants
        count = len(self.parts)
        _adamw_counts[(triton.cdiv(count, _TENSORS),)](
            self._steps, self._decays, self._scalars, rate, divisor, norm, count, _log(beta1), _log(beta2),
            COLUMNS=_SCALARS, TENSORS=_TENSORS,
        )  # fmt: skip
        for kind, blocks in self._launches_of(gradients, addresses):
            if blocks.numel():
                _adamw_update[(blocks.numel(),)](
                    blocks, self._table, table, self._scalars, norm, beta1, 1 - beta1, beta2, 1 - beta2, eps,
                    **kind.arguments(), COLUMNS=_COLUMNS, SCALARS=_SCALARS, BLOCK=_BLOCK, num_warps=_WARPS,
                )  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf
