"""The hybrid language model on one device.

Shape legend: B rows, S tokens, C channels, L layers, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusiontree.models.block import FusionBlock
from fusiontree.models.cache import DecodeCache
from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers.base import MixerInputs
from fusiontree.models.norm import RMSNorm
from fusiontree.models.srte import SharedTimeEncoding
from fusiontree.models.token_layout import BlockInputs, TokenLayout, lay_out_tokens
from fusiontree.ops.cross_entropy import (
    TeacherOutput,
    TokenScores,
    linear_cross_entropy,
    linear_distillation,
    linear_token_scores,
)
from fusiontree.ops.documents import Documents
from fusiontree.ops.rotary import rotary_tables
from fusiontree.utils.errors import UserError


class LayerSums(NamedTuple):
    """Sums over each row's real tokens and channels in every layer, times the row's weight; fp32."""

    sums_LB: dict[str, Tensor]
    """By name: see :meth:`fusiontree.models.block.FusionBlock.forward`; 0 in layers without the name."""
    count_B: Tensor
    """Number of summed elements per row and layer (tokens x channels), times the row's weight."""


class ModelOutput(NamedTuple):
    """Outputs of the model's forward; fields that were not requested are None."""

    loss_sum: Tensor | None
    """Cross entropy summed over the tokens with a label, in nats; fp32 scalar."""
    z_sum: Tensor | None
    """Squared log-partition summed over the tokens with a label; fp32 scalar."""
    logits_BSV: Tensor | None
    layer_sums: LayerSums
    cache: DecodeCache | None
    hidden_BSC: Tensor | None = None
    """Input of the head, after the last norm."""
    token_scores: TokenScores | None = None
    """Scores of the labels, ``[B, S]``."""
    divergence_sum: Tensor | None = None
    """Divergence from the teacher summed over the tokens with a label (:func:`linear_distillation`); fp32 scalar."""


class LanguageModelHead(nn.Module):
    """Logits of hidden states, or their summed loss without ever holding all logits in memory.

    With a tied embedding, ``weight`` is the embedding's parameter.
    """

    def __init__(self, vocab_size: int, channels: int, backend: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, channels))
        self.backend = backend

    def forward(
        self,
        hidden_BSC: Tensor,
        labels_BS: Tensor | None = None,
        never_M: Tensor | None = None,
        *,
        teacher: TeacherOutput | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return the logits ``[B, S, V]``, or with labels ``(loss_sum, z_sum)``, or with ``never_M`` their scores.

        With a teacher: ``(loss_sum, z_sum, divergence_sum)`` (:func:`linear_distillation`).

        Both sums are fp32 scalars over the tokens whose label is not negative: cross entropy in nats, and squared
        log-partition. The scores are :class:`TokenScores` of shape ``[B, S]``.
        """
        if labels_BS is None:
            return F.linear(hidden_BSC, self.weight)
        if never_M is not None:
            scores = linear_token_scores(hidden_BSC.flatten(0, 1), self.weight, labels_BS.flatten(), never_M)
            return TokenScores(*(score_N.view(labels_BS.shape) for score_N in scores))
        if teacher is not None:
            flat = teacher._replace(hidden=teacher.hidden.flatten(0, 1))
            return linear_distillation(hidden_BSC.flatten(0, 1), self.weight, flat, labels_BS.flatten())
        return linear_cross_entropy(hidden_BSC.flatten(0, 1), self.weight, labels_BS.flatten(), backend=self.backend)


class FusionTreeModel(nn.Module):
    """Embedding, blocks, norm, head.

    The constructor does not set parameter values: construct on any device (also meta), then call
    :func:`fusiontree.models.initialization.initialize_model` or load a checkpoint.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(FusionBlock(config, layer) for layer in range(config.num_layers))
        self.srte = SharedTimeEncoding(config)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, config.kernels.elementwise)
        self.head = LanguageModelHead(config.vocab_size, config.hidden_size, config.kernels.cross_entropy)
        self._tie()
        self.fused_step: Callable[[Tensor, DecodeCache], Tensor] | None = None
        """Decoding step in few launches, if :func:`fusiontree.models.fused_step.prepare` was called."""

    def forward(
        self,
        input_ids_BS: Tensor,
        *,
        labels_BS: Tensor | None = None,
        documents: Documents | None = None,
        padding_mask_BS: Tensor | None = None,
        branch_scale_LB2: Tensor | None = None,
        row_weight_B: Tensor | None = None,
        cache: DecodeCache | None = None,
        logits_to_keep: int | None = None,
        hidden_only: bool = False,
        layer_metrics: tuple[str, ...] = (),
        never_M: Tensor | None = None,
        teacher: TeacherOutput | None = None,
    ) -> ModelOutput:
        """Run the model on rows of one document each, packed rows, padded rows, or the next tokens of cached texts.

        Args:
            input_ids_BS: int64 tokens.
            labels_BS: the next token of each token; negative labels and labels on pads are ignored. With labels the
                output has the loss sums, without labels the logits.
            documents: boundaries of packed rows; None means each row is one document.
            padding_mask_BS: bool, True on real tokens, which must be contiguous in each row; excludes ``documents``.
            branch_scale_LB2: factors of each layer's and row's (first, second) branch outputs; 0 drops a branch.
            row_weight_B: weight of each row's layer sums, 0 for rows that only fill up a batch; None means 1.
            cache: of :meth:`new_cache`. An empty cache is filled (pads must be on the left); otherwise the tokens
                continue the cached texts. The cache is updated in place and returned. For inference only: no gradient
                flows through it.
            logits_to_keep: compute logits only for the last ``logits_to_keep`` tokens; None means all.
            hidden_only: return the head's input in place of logits; callers apply :attr:`head` to the tokens they need.
            layer_metrics: names of layer metrics whose sums to return.
            never_M: returns each label's scores instead of the loss sums, for inference; holds the int64 ids of tokens
                that generation never draws (may be empty).
            teacher: outputs of a teacher for the same tokens, from which the divergence is summed; None: no divergence.

        Raises:
            TypeError: the padding mask is not boolean.
            ValueError: arguments contradict each other, or real tokens in a mask are not contiguous.
            UserError: a row is longer than the learnable SRTE's table.
        """
        layout = lay_out_tokens(input_ids_BS.shape, input_ids_BS.device, documents, padding_mask_BS, cache)
        self.check_length(layout.end)
        x_BSC, sums = self._run_blocks(input_ids_BS, layout, branch_scale_LB2, cache, layer_metrics)
        layer_sums = _stack(sums, x_BSC, layout.padding_mask_BS, row_weight_B)
        if cache is not None:
            cache.advance(layout.counts, input_ids_BS.shape[1])
        hidden_BSC = self.norm(x_BSC)
        output = ModelOutput(None, None, None, layer_sums, cache)
        if hidden_only:
            return output._replace(hidden_BSC=hidden_BSC)
        if labels_BS is not None:
            if layout.padding_mask_BS is not None:
                labels_BS = labels_BS.masked_fill(~layout.padding_mask_BS, -100)
            return self._score(output, hidden_BSC, labels_BS, never_M, teacher)
        if logits_to_keep is not None:
            hidden_BSC = hidden_BSC[:, max(0, hidden_BSC.shape[1] - logits_to_keep) :]
        return output._replace(logits_BSV=self.head(hidden_BSC))

    def _run_blocks(
        self,
        input_ids_BS: Tensor,
        layout: TokenLayout,
        branch_scale_LB2: Tensor | None,
        cache: DecodeCache | None,
        layer_metrics: tuple[str, ...],
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return the residual stream after the last block, and each layer's sums."""
        x_BSC = self.embed(input_ids_BS)
        cos_BSD, sin_BSD = rotary_tables(layout.positions_BS, self.config.attention_head_dim, self.config.rope_theta)
        mixer = MixerInputs(layout.documents, cos_BSD, sin_BSD, layout.padding_mask_BS, layout.new)
        inputs = BlockInputs(mixer, self.srte(layout.positions_BS, x_BSC.dtype))
        sums: list[dict[str, Tensor]] = []
        for layer, block in enumerate(self.layers):
            scale_B2 = None if branch_scale_LB2 is None else branch_scale_LB2[layer]
            layer_cache = None if cache is None else cache.layers[layer]
            x_BSC, sums_of_layer = block(x_BSC, inputs, scale_B2, layer_cache, layer_metrics)
            sums.append(sums_of_layer)
        return x_BSC, sums

    def _score(
        self,
        output: ModelOutput,
        hidden_BSC: Tensor,
        labels_BS: Tensor,
        never_M: Tensor | None,
        teacher: TeacherOutput | None,
    ) -> ModelOutput:
        """Return ``output`` with the scores of the labels, or with the sums of the loss."""
        if never_M is not None:
            return output._replace(token_scores=self.head(hidden_BSC, labels_BS, never_M))
        if teacher is not None:
            loss_sum, z_sum, divergence_sum = self.head(hidden_BSC, labels_BS, teacher=teacher)
            return output._replace(loss_sum=loss_sum, z_sum=z_sum, divergence_sum=divergence_sum)
        loss_sum, z_sum = self.head(hidden_BSC, labels_BS)
        return output._replace(loss_sum=loss_sum, z_sum=z_sum)

    def check_length(self, length: int) -> None:
        """Check that the model has a position encoding for texts of ``length`` tokens.

        Raises:
            UserError: the learnable SRTE's table is shorter than ``length``.
        """
        limit = self.config.max_position_embeddings
        if self.config.srte_encoding == "learnable" and length > limit:
            raise UserError(
                f"a text of {length} tokens is longer than the learnable SRTE's table; shorten it to at most "
                f"max_position_embeddings = {limit} tokens, or train with srte_encoding sincos or none"
            )

    def new_cache(
        self,
        rows: int,
        max_length: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> DecodeCache:
        """Return an empty cache for ``rows`` texts.

        Args:
            rows: number of texts in the batch.
            max_length: expected tokens of the longest text, pads included; memory is allocated for them once. Longer
                texts are allowed.
            dtype: of keys and values; None means the embedding's dtype.
            device: of the cache; None means the embedding's device.
        """
        weight = self.embed.weight
        return DecodeCache(self.config, rows, max_length, dtype or weight.dtype, device or weight.device)

    def _tie(self) -> None:
        if self.config.tie_word_embeddings:
            self.head.weight = cast(nn.Parameter, self.embed.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._tie()  # leaving the meta device creates separate parameters for tied modules
        return self


def _stack(
    sums: list[dict[str, Tensor]], x_BSC: Tensor, padding_mask_BS: Tensor | None, row_weight_B: Tensor | None
) -> LayerSums:
    """Stack the sums of all layers and add the number of summed elements."""
    rows, length, channels = x_BSC.shape
    none_B = sums[0]["gate"].new_zeros(rows)
    names = dict.fromkeys(name for layer in sums for name in layer)
    sums_LB = {name: torch.stack([layer.get(name, none_B) for layer in sums]) for name in names}
    if padding_mask_BS is None:
        count_B = none_B + length * channels
    else:
        count_B = (padding_mask_BS.sum(1) * channels).to(none_B.dtype)
    if row_weight_B is None:
        return LayerSums(sums_LB, count_B)
    return LayerSums({name: total * row_weight_B for name, total in sums_LB.items()}, count_B * row_weight_B)
