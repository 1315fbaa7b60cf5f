"""A micro batch of whole rows becomes the model's inputs on this rank's device.

Shape legend: L layers, B rows, S tokens of a row.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusiontree.ops.documents import Documents
from fusiontree.parallel.layout import Layout


def place_inputs(
    input_ids_BS: Tensor,
    labels_BS: Tensor,
    positions_BS: Tensor,
    row_weight_B: Tensor,
    branch_scale_LB2: Tensor | None,
    *,
    layout: Layout,
) -> dict[str, Any]:
    """Return the keyword arguments of the model's forward; the batch is on the CPU, the result on the device."""
    device = layout.device

    def send(tensor: Tensor) -> Tensor:
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    # Boundaries are found on the CPU, where that costs no wait for the device.
    return {
        "input_ids_BS": send(input_ids_BS),
        "labels_BS": send(labels_BS),
        "documents": Documents.from_positions(positions_BS).to(device, non_blocking=True),
        "branch_scale_LB2": None if branch_scale_LB2 is None else send(branch_scale_LB2),
    }
