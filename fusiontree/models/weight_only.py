"""Weights in 8 bits for inference: a scale per output, activations as before.

Decoding reads every weight once per step, so halving their bytes nearly doubles its bound. Prefills convert the weights
of one projection at a time.

Shape legend: N outputs, K inputs.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusiontree.models.model import FusionTreeModel
from fusiontree.ops.step import Weight
from fusiontree.utils.errors import UserError

WeightFormat = Literal["int8", "fp8"]
_LARGEST = {"int8": 127.0, "fp8": 448.0}
"""Greatest value of each format; fp8 has 4 exponent and 3 mantissa bits (OCP's E4M3)."""
RELATIVE_ERROR = {"int8": 0.012, "fp8": 0.028}
"""Root mean square error of normally distributed weights relative to theirs (rows of 2,048 to 8,192); see the tests."""


class WeightOnlyLinear(nn.Module):
    """A linear map without bias whose weight is stored in 8 bits with a scale per output."""

    values: Tensor
    scale: Tensor

    def __init__(self, weight_NK: Tensor, kind: WeightFormat) -> None:
        """Quantize ``weight_NK``: the largest magnitude of each output becomes the format's largest."""
        super().__init__()
        largest = _LARGEST[kind]
        exact_NK = weight_NK.detach().float()
        scale_N = (exact_NK.abs().amax(dim=1) / largest).clamp(min=torch.finfo(torch.float32).tiny)
        scaled_NK = exact_NK / scale_N[:, None]
        if kind == "int8":
            values = scaled_NK.round().clamp(-largest, largest).to(torch.int8)
        else:
            values = scaled_NK.clamp(-largest, largest).to(torch.float8_e4m3fn)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale_N)

    @property
    def stored(self) -> Weight:
        """The weight as products of a decoding step read it."""
        return Weight(self.values, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x W^T``."""
        return F.linear(x, self.stored.dense(x.dtype))


@torch.no_grad()
def quantize_weights(model: FusionTreeModel, kind: WeightFormat) -> int:
    """Replace every projection of the layers by a :class:`WeightOnlyLinear`; return the bytes saved.

    Embedding, head, norms and fp32 parameters stay as they are. For inference only: the weights have no gradients.

    Raises:
        UserError: the GPU has no fp8.
    """
    device = model.embed.weight.device
    if kind == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError(f"weights fp8 need a GPU with fp8 (compute capability 8.9 or newer), not {device}; use int8")
    saved = 0
    for block in model.layers:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and child.bias is None:
                    small = WeightOnlyLinear(child.weight, kind)
                    saved += child.weight.nbytes - small.values.nbytes - small.scale.nbytes
                    setattr(parent, name, small)
    return saved
