"""Tensor and sequence parallelism: the modules that replace modules of the model, and the function that applies them.

Heads and vocabulary are split over the ranks of ``tp``; between the mixers each rank holds 1/tp of its chunk's tokens.
A block gathers its input's tokens once for both branches and reduce-scatters both branches' partial outputs together.

Shape legend: B rows, S tokens of a chunk (s: this rank's 1/tp of them), C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fusiontree.models.block import FusionBlock
from fusiontree.models.mixers import mixer_of
from fusiontree.models.mixers.recurrent import CausalConv
from fusiontree.models.mixers.split import Ranges, split_of
from fusiontree.models.model import FusionTreeModel, LanguageModelHead
from fusiontree.ops.cross_entropy import (
    TeacherOutput,
    TokenScores,
    linear_cross_entropy,
    linear_distillation,
    linear_token_scores,
)
from fusiontree.parallel.collectives import gather_stack, scatter_tokens
from fusiontree.parallel.exchanges import gather_tokens
from fusiontree.parallel.global_tensor import ShardSpec
from fusiontree.parallel.layout import Layout


class VocabParallelEmbedding(nn.Embedding):
    """Looks up tokens in this rank's shard of the vocabulary and reduce-scatters the embeddings over the tokens."""

    def __init__(self, whole: nn.Embedding, group: dist.ProcessGroup) -> None:
        super().__init__(whole.num_embeddings, whole.embedding_dim, device="meta")
        self.weight = whole.weight
        self.group = group

    def forward(self, input_ids_BS: Tensor) -> Tensor:
        """Return the embeddings of this rank's tokens, ``[B, s, C]``."""
        size = self.num_embeddings // dist.get_world_size(self.group)
        index_BS = input_ids_BS - dist.get_rank(self.group) * size
        other_BS = (index_BS < 0) | (index_BS >= size)
        x_BSC = F.embedding(index_BS.masked_fill(other_BS, 0), self.weight)
        return scatter_tokens(x_BSC.masked_fill(other_BS.unsqueeze(-1), 0.0), self.group)


class VocabParallelHead(LanguageModelHead):
    """Cross entropy of gathered tokens; each rank computes the logits of its shard of the vocabulary."""

    def __init__(self, whole: LanguageModelHead, group: dist.ProcessGroup) -> None:
        nn.Module.__init__(self)
        self.weight = whole.weight
        self.backend = whole.backend
        self.group = group

    def forward(
        self,
        hidden_BSC: Tensor,
        labels_BS: Tensor | None = None,
        never_M: Tensor | None = None,
        *,
        teacher: TeacherOutput | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return ``(loss_sum, z_sum)`` or the labels' scores of the chunk, equal on all ranks of the group."""
        assert labels_BS is not None, "the full logits are not computed under tensor parallelism"
        hidden_NC = gather_tokens(hidden_BSC, self.group).flatten(0, 1)
        start = dist.get_rank(self.group) * self.weight.shape[0]

        def gather(part: Tensor) -> Tensor:
            return gather_stack(part, self.group)

        if never_M is not None:
            scores = linear_token_scores(
                hidden_NC, self.weight, labels_BS.flatten(), never_M, vocab_start=start, gather_parts=gather
            )
            return TokenScores(*(score_N.view(labels_BS.shape) for score_N in scores))
        if teacher is not None:
            flat = teacher._replace(hidden=gather_tokens(teacher.hidden, self.group).flatten(0, 1))
            return linear_distillation(
                hidden_NC, self.weight, flat, labels_BS.flatten(), vocab_start=start, gather_parts=gather
            )
        return linear_cross_entropy(
            hidden_NC, self.weight, labels_BS.flatten(), vocab_start=start, gather_parts=gather, backend=self.backend
        )


class SelectedLinear(nn.Linear):
    """A projection with replicated weights of which this rank computes only some outputs.

    Used if the projection has fewer indivisible units (heads, groups) than there are tensor parallel ranks.
    """

    def __init__(self, whole: nn.Linear, ranges: Ranges) -> None:
        super().__init__(whole.in_features, whole.out_features, bias=False, device="meta")
        self.weight = whole.weight
        self.ranges = ranges
        self.product: Callable[[Tensor, Tensor], Tensor] = F.linear
        """Computes the outputs from input and selected weights; may be replaced."""

    def forward(self, x_BSC: Tensor) -> Tensor:
        """Return the outputs of this rank's ranges."""
        return self.product(x_BSC, _select(self.weight, self.ranges))


class SelectedConv(CausalConv):
    """A convolution with replicated weights of which this rank computes only some channels."""

    def __init__(self, whole: CausalConv, ranges: Ranges) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias, self.backend = whole.weight, whole.bias, whole.backend
        self.ranges = ranges

    def taps(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of this rank's channels."""
        return _select(self.weight, self.ranges), _select(self.bias, self.ranges)


def _select(parameter: Tensor, ranges: Ranges) -> Tensor:
    # A copy, never a view: engines free the full parameter after this forward.
    return torch.cat([parameter[start:stop] for start, stop in ranges])


def apply_tensor_parallel(model: FusionTreeModel, layout: Layout) -> dict[str, ShardSpec]:
    """Reduce a model on the meta device to this rank's part; return this rank's shard of each parameter, by name.

    Split parameters get the local shape and the attribute ``tensor_model_parallel``. Parameter names do not change.
    With tp = 1 the model does not change.
    """
    specs = {name: ShardSpec(tuple(p.shape)) for name, p in model.named_parameters()}
    ranks, rank = layout.tp_size, layout.tp_rank
    if ranks == 1:
        return specs
    group, config = layout.tp_group, model.config
    model.embed = VocabParallelEmbedding(model.embed, group)
    model.head = VocabParallelHead(model.head, group)
    for block in model.layers:
        assert isinstance(block, FusionBlock)
        block.gather_tokens = partial(gather_tokens, group=group)  # the branches read all tokens of the chunk
        block.scatter_tokens = partial(scatter_tokens, group=group)  # sums over the heads of all ranks
    replaced: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one parameter
    for module_name, module in list(model.named_modules()):
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            name = f"{module_name}.{leaf}"
            split = split_of(name, config)
            if split is None:
                assert mixer_of(name, config) is None, f"the tp_plan of the mixer that owns {name} does not split it"
                continue
            spec = ShardSpec.of(split, tuple(parameter.shape), rank, ranks)
            if not spec.is_split:
                _select_outputs(model, module_name, split.ranges(rank, ranks))
                continue
            if name in specs:  # a tied head is listed under the embedding's name
                specs[name] = spec
            if parameter not in replaced:
                local = nn.Parameter(torch.empty(spec.local_shape, device="meta"))
                local.tensor_model_parallel = True  # type: ignore[attr-defined]
                replaced[parameter] = local
            setattr(module, leaf, replaced[parameter])
    return specs


def _select_outputs(model: nn.Module, name: str, ranges: Ranges) -> None:
    module = model.get_submodule(name)
    if isinstance(module, SelectedLinear | SelectedConv):  # already replaced for its other parameter (weight or bias)
        return
    parent, _, leaf = name.rpartition(".")
    new: nn.Module
    if isinstance(module, CausalConv):
        new = SelectedConv(module, ranges)
    else:
        assert isinstance(module, nn.Linear), f"{name} has fewer units than there are ranks and cannot be replicated"
        new = SelectedLinear(module, ranges)
    setattr(model.get_submodule(parent), leaf, new)
