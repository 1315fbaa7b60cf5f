"""One decoding step of the whole model in few launches: a layer takes about a dozen instead of about seventy.

Projections that read the same input become one product, whose weights are stored side by side; norms, activations,
residual additions and the gate's mix of branches are computed inside the products. A layer with a mixer that has no
such step runs its ordinary forward. The result is that of ``model(tokens_B1, cache=cache)``, rounded less often.

Shape legend: B rows, C channels of the model, M outputs of joined projections, V vocabulary.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from fusiontree.models.block import FusionBlock, NormedMLP
from fusiontree.models.cache import DecodeCache
from fusiontree.models.cuda_graph import recordable
from fusiontree.models.gate import even_mix
from fusiontree.models.mixers.base import Mixer, MixerInputs
from fusiontree.models.mixers.cache import LayerCache
from fusiontree.models.model import FusionTreeModel
from fusiontree.models.token_layout import BlockInputs, lay_out_tokens
from fusiontree.models.weight_only import WeightOnlyLinear
from fusiontree.ops.elementwise import fused
from fusiontree.ops.rotary import rotary_tables
from fusiontree.ops.step import Activation, Mix, Norm, Second, Shift, Weight, product
from fusiontree.utils.cuda_graph import forked, join

log = logging.getLogger(__name__)


def prepare(model: FusionTreeModel) -> None:
    """Let recorded decoding steps of ``model`` be fused; see :class:`FusedStep` for what it does to the parameters."""
    model.fused_step = step = FusedStep(model)
    whole = [str(layer) for layer, block in enumerate(step.blocks) if not block.fuses_mixers]
    if whole and recordable(model.embed.weight.device):  # elsewhere no step is recorded
        log.warning("decoding runs the ordinary forward of layers %s: a mixer has no fused step", ", ".join(whole))


class FusedStep:
    """Computes the logits of the next tokens of a fixed cache.

    Construction stores the weights of joined projections side by side and makes the parameters views of them, so that
    no memory is added; ``model`` is for inference from then on. Do not replace or move its parameters afterwards.
    """

    def __init__(self, model: FusionTreeModel) -> None:
        self._model = model
        self.blocks = [FusedBlock(cast(FusionBlock, block)) for block in model.layers]

    def __call__(self, tokens_B1: Tensor, cache: DecodeCache) -> Tensor:
        """Continue every row of ``cache`` by its token; return the logits ``[B, V]``."""
        model, config = self._model, self._model.config
        assert cache.fixed_columns is not None, "a fused step needs a fixed cache"
        layout = lay_out_tokens(tokens_B1.shape, tokens_B1.device, None, None, cache)
        model.check_length(layout.end)
        x_BC = model.embed(tokens_B1)[:, 0]
        tables = fused(rotary_tables, config.kernels.elementwise, x_BC.device.type)
        cos_BSD, sin_BSD = tables(layout.positions_BS, config.attention_head_dim, config.rope_theta)
        mixer = MixerInputs(None, cos_BSD, sin_BSD, None, layout.new)
        inputs = BlockInputs(mixer, model.srte(layout.positions_BS, x_BC.dtype))
        follows = False
        for block, kept in zip(self.blocks, cache.layers, strict=True):
            x_BC = block(x_BC, inputs, kept, follows)
            follows = block.fuses_mixers
        norm, head = Norm(model.norm.weight, model.norm.eps), Weight(model.head.weight)
        logits_BV = product(x_BC, head, norm=norm, follows=follows, backend=config.kernels.elementwise)
        cache.advance(layout.counts, 1)
        return logits_BV


class FusedBlock:
    """The step of one block."""

    def __init__(self, block: FusionBlock) -> None:
        self._block = block
        self._backend = block.backend
        mixers = [(mixer, mixer.adds_time_encoding) for mixer in block.mixers().values()]
        self.fuses_mixers = all(mixer.step_projections() for mixer, _ in mixers)
        """Whether all mixers have a step. Its last launch is a product, which lets its successor start early. Else the
        block's forward is called."""
        if not self.fuses_mixers:
            return
        # Mixers that read the time encoding come first, because a product adds it for its first outputs.
        self._order: list[tuple[Mixer, bool, int]] = [
            (mixer, encoded, sum(_outputs(m) for m in mixer.step_projections()))
            for mixer, encoded in sorted(mixers, key=lambda pair: not pair[1])
        ]
        self._projections = join_weights(*(m for mixer, _, _ in self._order for m in mixer.step_projections()))
        self._outputs = {mixer: weight_of(mixer.step_output()) for mixer, _ in mixers}
        self._names = {mixer: name for name, mixer in block.mixers().items()}
        self._join_mix()

    def _join_mix(self) -> None:
        block, mlp = self._block, self._block.mlp
        ups = [mlp.up] if mlp.gate is None else [mlp.gate, mlp.up]
        self._activation: Activation = "gelu" if mlp.gate is None else "swiglu"
        self._residual = isinstance(mlp, NormedMLP)
        if block.align is not None:
            self._align_up = join_weights(block.align.up, block.align.skip)
            self._align_down = weight_of(block.align.down)
        downs = [] if block.gate is None else [block.gate.down]
        self._rank = sum(map(_outputs, downs))
        self._gate_up = None if block.gate is None else weight_of(block.gate.up)
        self._gate_down = join_weights(*downs, *([] if self._residual else ups)) if block.reads_alignment else None
        self._mlp_up = join_weights(*ups) if self._residual else None
        self._out = None if block.out_proj is None else weight_of(block.out_proj)
        self._mlp_down = weight_of(mlp.down)

    def __call__(self, x_BC: Tensor, inputs: BlockInputs, cache: LayerCache, follows: bool = False) -> Tensor:
        """Return the residual stream after the layer, ``[B, C]``; ``follows``: see :func:`product`."""
        block = self._block
        if not self.fuses_mixers:
            return block(x_BC[:, None], inputs, None, cache)[0][:, 0]
        outputs_BC = self._branches(x_BC, inputs, cache, follows)
        if block.branch_norm is not None:
            outputs_BC = block.branch_norm(outputs_BC[:, None])[:, 0]
        return self._combine(x_BC, outputs_BC)

    def _branches(self, x_BC: Tensor, inputs: BlockInputs, cache: LayerCache, follows: bool) -> Tensor:
        """Return the branches' concatenated outputs, ``[B, n*C]``."""
        block, backend = self._block, self._backend
        shift = None
        if inputs.srte_BSC is not None:
            encoded = sum(size for _, encoded, size in self._order if encoded)
            shift = Shift(inputs.srte_BSC[:, 0], encoded) if encoded else None
        norm = Norm(block.norm.weight, block.norm.eps)
        projected_BM = product(x_BC, self._projections, norm=norm, shift=shift, follows=follows, backend=backend)
        channels, names = x_BC.shape[1], list(block.mixers())
        outputs_BC = x_BC.new_empty(x_BC.shape[0], channels * len(names))
        aside = len(names) > 1 and x_BC.is_cuda and torch.cuda.is_current_stream_capturing()
        start = 0
        for index, (mixer, _, size) in enumerate(self._order):
            name = self._names[mixer]
            place = names.index(name) * channels
            with forked(projected_BM) if aside and index == 0 else nullcontext():
                mixed_BC = mixer.step(projected_BM[:, start : start + size], inputs.mixer, cache[name])
                out_BC = outputs_BC[:, place : place + channels]
                product(mixed_BC, self._outputs[mixer], out_BN=out_BC, follows=True, backend=backend)
            start += size
        if aside:
            join(x_BC.device)
        return outputs_BC

    def _combine(self, x_BC: Tensor, outputs_BC: Tensor) -> Tensor:
        """Compute :meth:`FusionBlock.combine` of outputs to which the block's norm of branches was applied."""
        block, backend = self._block, self._backend
        down_BM = outputs_BC
        if self._gate_down is not None:
            z_BC = self._aligned(outputs_BC)
            down_BM = product(z_BC, self._gate_down, follows=block.align is not None, backend=backend)
        if self._gate_up is not None:
            mix, down_BR = Mix(outputs_BC, block.given_branches), down_BM[:, : self._rank]
            mixed_BC = product(down_BR, self._gate_up, activation="tanh", mixed=mix, follows=True, backend=backend)
        else:
            mixed_BC = even_mix(outputs_BC, block.mix, len(block.mixers()))
        output: dict[str, Any] = {"add_BN": x_BC, "follows": self._gate_up is not None, "backend": backend}
        if self._mlp_up is None:
            up_BM = down_BM[:, self._rank :]
            if self._out is None:
                return self._add_mlp(x_BC + mixed_BC, up_BM, follows=False)
            return product(mixed_BC, self._out, second=Second(up_BM, self._mlp_down, self._activation), **output)
        x_BC = x_BC + mixed_BC if self._out is None else product(mixed_BC, self._out, **output)
        norm = Norm(block.mlp.norm.weight, block.mlp.norm.eps)  # type: ignore[union-attr, arg-type]
        up_BM = product(x_BC, self._mlp_up, norm=norm, follows=self._out is not None, backend=backend)
        return self._add_mlp(x_BC, up_BM, follows=True)

    def _aligned(self, outputs_BC: Tensor) -> Tensor:
        """Return the input of gate and MLP, ``[B, C]``."""
        block, backend = self._block, self._backend
        if block.align is None:
            return block._aligned(outputs_BC)[0]
        # No early start: the branches' streams join ahead of it.
        both_BM = product(outputs_BC, self._align_up, backend=backend)
        inner_BC, skip_BC = both_BM.chunk(2, dim=-1)
        return product(inner_BC, self._align_down, activation="gelu", add_BN=skip_BC, follows=True, backend=backend)

    def _add_mlp(self, x_BC: Tensor, up_BM: Tensor, follows: bool) -> Tensor:
        """Return ``x`` plus the MLP's result from its inner values ahead of the activation."""
        chosen: dict[str, Any] = {"activation": self._activation, "follows": follows, "backend": self._backend}
        return product(up_BM, self._mlp_down, add_BN=x_BC, **chosen)


def weight_of(module: nn.Module) -> Weight:
    """Return the weight of a linear map without bias, in the format in which it is stored."""
    if isinstance(module, WeightOnlyLinear):
        return module.stored
    assert isinstance(module, nn.Linear) and module.bias is None, f"{type(module).__name__} is no plain linear map"
    return Weight(module.weight.detach())


def join_weights(*modules: nn.Module) -> Weight:
    """Store the weights of linear maps of one input side by side; each map's weight becomes a view of the result.

    Weights that are already stored so are returned without a copy.
    """
    parts = [weight_of(module) for module in modules]
    if len(parts) == 1:
        return parts[0]
    values = _side_by_side([part.values_NK for part in parts])
    scale = None
    if all(part.scale_N is not None for part in parts):
        scale = torch.cat([part.scale_N for part in parts])  # type: ignore[misc]
    assert scale is not None or not any(part.scale_N is not None for part in parts), "weights of different formats"
    views: Any = values.split([part.values_NK.shape[0] for part in parts])
    for module, view in zip(modules, views, strict=True):
        if isinstance(module, WeightOnlyLinear):
            module.values = view
        else:
            module.weight.data = view
    return Weight(values, scale)


def _side_by_side(tensors: list[Tensor]) -> Tensor:
    first, inputs = tensors[0], tensors[0].shape[1]
    following, offset = True, first.storage_offset()
    for tensor in tensors:
        following &= tensor.is_contiguous() and tensor.storage_offset() == offset
        following &= tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        offset += tensor.numel()
    if following and first.device.type != "meta":
        return first.as_strided((sum(tensor.shape[0] for tensor in tensors), inputs), (inputs, 1))
    return torch.cat(tensors)


def _outputs(module: nn.Module) -> int:
    return weight_of(module).values_NK.shape[0]
