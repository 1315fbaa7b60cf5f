"""Step of AdamW over many tensors: gradients of 16 or 32 bits, fp32 values and their 16-bit copies in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from fusiontree.ops.adamw.reference import Constants, Parts, Update
from fusiontree.ops.dispatch import Backend, Operation, anywhere, loader, triton_unavailable

__all__ = ["Constants", "Parts", "Update", "adamw"]

UPDATES = Operation(
    "elementwise",
    [
        Backend("triton", loader("fusiontree.ops.adamw.triton:TritonUpdate"), triton_unavailable),
        Backend("reference", loader("fusiontree.ops.adamw.reference:ReferenceUpdate"), anywhere),
    ],
    shown="AdamW",
)


def adamw(parts: Sequence[Parts], constants: Constants, backend: str = "auto") -> Update:
    """Return the update of all ``parts``, which keep their memory from now on.

    Args:
        parts: at least one; all on one device.
        constants: decays and denominator term, the same for all parts.
        backend: a name of :data:`UPDATES` or "auto".

    Raises:
        ValueError: a tensor's values are not fp32, or a tensor or state is not contiguous.
    """
    for number, its in enumerate(parts):
        held = [("value", its.values), ("mean", its.mean), ("square", its.square), ("copy", its.copy)]
        for name, tensor in held:
            if tensor is not None and (tensor.numel() != its.values.numel() or not tensor.is_contiguous()):
                raise ValueError(
                    f"{name} of tensor {number} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; AdamW "
                    f"needs contiguous tensors of {its.values.numel()} elements, as .contiguous() returns them"
                )
        if its.values.dtype.itemsize != 4 or its.step.dtype != its.values.dtype:
            raise ValueError(
                f"tensor {number} is {its.values.dtype} and its step count {its.step.dtype}; AdamW needs fp32 values "
                f"and counts, so give the fp32 values here and their copy in another type as ``copy``"
            )
    return UPDATES.choose(backend, parts[0].values.device.type)(parts, constants)
