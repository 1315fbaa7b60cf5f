"""Turns a micro-batch of full sequences into the model's inputs on this rank's device.

Shape legend: L layers, B rows, S tokens of a row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fusiontree.data.batch import IGNORED, MicroBatch
from fusiontree.models.model import LayerSums
from fusiontree.ops.cross_entropy import TokenScores
from fusiontree.ops.documents import Documents
from fusiontree.parallel.collectives import all_gather, sum_identity
from fusiontree.parallel.context_parallel import PieceDocuments
from fusiontree.parallel.layout import Layout
from fusiontree.utils.device import send


class ModelInputs(NamedTuple):
    """This rank's chunk of the rows of a micro-batch, as the keyword arguments of the model's forward."""

    input_ids_BS: Tensor
    labels_BS: Tensor
    documents: Documents
    branch_scale_LB2: Tensor | None
    layer_metrics: tuple[str, ...]

    @property
    def document_kinds(self) -> list[int | None]:
        """What kernels depend on and the host knows of the documents (:attr:`Documents.tokens_before`)."""
        return [part.tokens_before for part in self.documents.nested()]

    def padded(self, count: int | None) -> ModelInputs:
        """Return the inputs with boundaries padded to ``count`` documents (:meth:`Documents.padded`); None: no pads."""
        return self if count is None else self._replace(documents=self.documents.padded(count))

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in an order that depends on the layout alone."""
        scale = [] if self.branch_scale_LB2 is None else [self.branch_scale_LB2]
        parts = [(part.positions_BS, part.segments_BS, part.cu_seqlens) for part in self.documents.nested()]
        return [self.input_ids_BS, self.labels_BS, *scale, *(tensor for part in parts for tensor in part)]

    def with_new_boundaries(self) -> ModelInputs:
        """Return inputs of the same memory with new tensors as boundaries.

        Operations keep what they derive from boundaries (a mask) by the identity of the tensor. They must derive it
        anew for each batch that is copied into the same memory, and in each recording.
        """
        return self._replace(documents=self.documents.map(lambda tensor: tensor.view(tensor.shape)))

    def to(self, device: torch.device) -> ModelInputs:
        """Return the inputs on ``device``; the host does not wait for the copies."""
        scale_LB2 = self.branch_scale_LB2
        return ModelInputs(
            send(self.input_ids_BS, device, non_blocking=True),
            send(self.labels_BS, device, non_blocking=True),
            self.documents.to(device, non_blocking=True),
            None if scale_LB2 is None else send(scale_LB2, device, non_blocking=True),
            self.layer_metrics,
        )


def count_documents(micro: MicroBatch) -> int:
    """Return the number of documents in the rows of a micro-batch on the CPU; 0 if every row is one.

    Parts of one document in several rows are counted separately. A context parallel chunk has at most as many.
    """
    positions_BS = micro.positions_BS
    inner = int((positions_BS[:, 1:] == 0).sum())
    alike = bool((positions_BS[:, 0] == positions_BS[0, 0]).all())
    return 0 if inner == 0 and alike else inner + len(positions_BS)


def shard_inputs(
    micro: MicroBatch, branch_scale_LB2: Tensor | None, layer_metrics: tuple[str, ...], layout: Layout | None
) -> ModelInputs:
    """Return this rank's chunk of each sequence, on the CPU: on the device, reading boundaries would synchronize.

    The batch is on the CPU and equal on all ranks of ``layout.row_group``. Without a layout the chunk is all of it.
    """
    cp_rank, cp_size = (0, 1) if layout is None else (layout.cp_rank, layout.cp_size)
    length = micro.input_ids_BS.shape[1] // cp_size
    chunk = slice(cp_rank * length, (cp_rank + 1) * length)
    if cp_size > 1:
        documents: Documents = PieceDocuments.from_row(micro.positions_BS, cp_rank, cp_size)
    else:
        documents = Documents.from_positions(micro.positions_BS)
    return ModelInputs(
        micro.input_ids_BS[:, chunk], micro.labels_BS[:, chunk], documents, branch_scale_LB2, layer_metrics
    )


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


def fill_up_rows(micro: MicroBatch, multiple: int) -> MicroBatch:
    """Append tokens without labels, as another document, until the rows' length divides by ``multiple`` (cp x tp)."""
    rows, length = micro.input_ids_BS.shape
    missing = -length % multiple
    if not missing:
        return micro
    zeros_BP = torch.zeros(rows, missing, dtype=torch.int64)
    return replace(
        micro,
        input_ids_BS=torch.cat([micro.input_ids_BS, zeros_BP], dim=1),
        labels_BS=torch.cat([micro.labels_BS, zeros_BP + IGNORED], dim=1),
        positions_BS=torch.cat([micro.positions_BS, zeros_BP + torch.arange(missing)], dim=1),
    )


def gather_scores(scores: TokenScores, length: int, layout: Layout | None) -> TokenScores:
    """Return the scores of full rows of ``length`` tokens on the CPU, from those of each rank's chunk; collective.

    Every rank of ``layout.row_group`` gets the same values; ranks of one cp rank hold equal scores.
    """
    packed_2BS = torch.stack([scores.log_likelihood, scores.chosen.to(torch.float32)])
    if layout is not None and layout.cp_size > 1:
        pieces_R2BS = all_gather(packed_2BS, layout.cp_group)
        packed_2BS = torch.cat(pieces_R2BS.unbind(0), dim=-1)
    return TokenScores(packed_2BS[0, :, :length].cpu(), packed_2BS[1, :, :length].cpu() > 0)
