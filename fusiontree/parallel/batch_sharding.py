"""Turns a micro-batch of full sequences into the model's inputs on this rank's device.

Shape legend: L layers, B rows, S tokens of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusiontree.data.batch import MicroBatch
from fusiontree.models.model import LayerSums
from fusiontree.ops.documents import Documents
from fusiontree.parallel.collectives import sum_identity
from fusiontree.parallel.context_parallel import PieceDocuments
from fusiontree.parallel.layout import Layout
from fusiontree.utils.device import send


def shard_inputs(
    micro: MicroBatch, branch_scale_LB2: Tensor | None, layer_metrics: tuple[str, ...], layout: Layout
) -> dict[str, Any]:
    """Return the keyword arguments of the model's forward: this rank's chunk of each sequence, on its device.

    The batch is on the CPU and equal on all ranks of ``layout.row_group``.
    """
    device = layout.device
    length = micro.input_ids_BS.shape[1] // layout.cp_size
    piece = slice(layout.cp_rank * length, (layout.cp_rank + 1) * length)

    # Document boundaries are computed on the CPU: on the device, reading them would synchronize.
    if layout.cp_size > 1:
        documents: Documents = PieceDocuments.from_row(micro.positions_BS, layout.cp_rank, layout.cp_size)
    else:
        documents = Documents.from_positions(micro.positions_BS)
    return {
        "input_ids_BS": send(micro.input_ids_BS[:, piece], device, non_blocking=True),
        "labels_BS": send(micro.labels_BS[:, piece], device, non_blocking=True),
        "documents": documents.to(device, non_blocking=True),
        "branch_scale_LB2": None if branch_scale_LB2 is None else send(branch_scale_LB2, device, non_blocking=True),
        "layer_metrics": layer_metrics,
    }


def sum_over_row(sums: LayerSums, layout: Layout) -> LayerSums:
    """Add up a micro-batch's layer sums over the ranks that hold tokens of the same sequences (cp x tp).

    Each of these ranks computes the same loss from the sums; the backward gives each rank the gradient of its local
    gates.
    """
    if layout.cp_size * layout.tp_size == 1:
        return sums
    packed = torch.cat([*sums.sums_LB.values(), sums.count_B.unsqueeze(0)])
    layers = len(packed) // len(sums.sums_LB)
    *summed_LB, count_1B = sum_identity(packed, layout.row_group).split([layers] * len(sums.sums_LB) + [1])
    return LayerSums(dict(zip(sums.sums_LB, summed_LB, strict=True)), count_1B[0])
