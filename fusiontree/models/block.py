"""One layer: branches read the same input in parallel, a gate mixes their outputs.

Shape legend: B rows, S tokens, C channels, n branches of the layer; 2 stands for the first and second branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusiontree.models.config import ModelConfig
from fusiontree.models.gate import Alignment, BranchNorm, FusionGate, even_mix, even_sums
from fusiontree.models.mixers import layer_mixers
from fusiontree.models.mixers.base import Mixer
from fusiontree.models.mixers.cache import LayerCache
from fusiontree.models.norm import ResidualRMSNorm
from fusiontree.models.token_layout import BlockInputs
from fusiontree.ops.elementwise import fused
from fusiontree.ops.gate import GivenBranches, gate_mix
from fusiontree.ops.gelu import gelu_product
from fusiontree.ops.linear import add_product, project
from fusiontree.ops.linear.side_by_side import joined
from fusiontree.ops.recompute import recomputed
from fusiontree.utils.cuda_graph import forked, join
from fusiontree.utils.errors import UserError
from fusiontree.utils.layer_metrics import layer_metric_sums


class MLP(nn.Module):
    """``down(gelu(up(z)))``, or SwiGLU (Shazeer 2020): ``down(silu(gate(z)) * up(z))``."""

    fused_projections = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down = nn.Linear(config.mlp_size, config.hidden_size, bias=False)
        self.backend = config.kernels.elementwise
        self.gate: nn.Linear | None = None
        if config.mlp_activation == "swiglu":
            self.gate = nn.Linear(config.hidden_size, config.mlp_size, bias=False)

    def forward(self, z_BSC: Tensor, sum_BSC: Tensor | None = None, projected: Sequence[Tensor] = ()) -> Tensor:
        """Return ``[B, S, C]``.

        Args:
            z_BSC: input.
            sum_BSC: product to which the result is added; of no further use. None: return the MLP's result alone.
            projected: results of :meth:`projections` for z; empty: compute them.
        """
        if not projected:
            projected = project(z_BSC, self.projections(), joint=self.fused_projections)
        if self.gate is None:
            return gelu_product(projected[0], self.down, sum_BSC, joint=self.fused_projections, backend=self.backend)
        inner_BSC = recomputed(fused(_swiglu, self.backend, z_BSC.device.type), *projected)
        if sum_BSC is None:
            return self.down(inner_BSC)
        return add_product(sum_BSC, inner_BSC, self.down, joint=self.fused_projections)

    def projections(self) -> tuple[nn.Module, ...]:
        """Return the linear maps of the input."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


class NormedMLP(MLP):
    """``x + mlp(norm(x))``: the MLP of a transformer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.norm = ResidualRMSNorm(config.hidden_size, config.norm_eps, config.kernels.elementwise)

    def forward(self, x_BSC: Tensor) -> Tensor:  # type: ignore[override]
        """Return the residual stream after the MLP, ``[B, S, C]``."""
        z_BSC, x_BSC = self.norm(x_BSC)
        return x_BSC + super().forward(z_BSC)


def _swiglu(gate_BSC: Tensor, up_BSC: Tensor) -> Tensor:
    return F.silu(gate_BSC) * up_BSC


class FusionBlock(nn.Module):
    """A residual block in two stages: :meth:`branches` mixes the tokens, :meth:`combine` acts on each token alone.

    The layer's letter in ``layer_pattern`` selects the mixers of its one or two branches. With two branches the gate
    multiplies the first output by g and the second by 1 - g. With one branch the output of the missing branch is
    treated as zero, and the weights of the alignment have no columns for it. ``branch_mix`` replaces the gate by the
    mean, the concatenation or the sum of the branches that the layer has.

    ``gather_tokens`` is called before ``branches`` and ``scatter_tokens`` after it. Without tensor parallelism both
    return their input unchanged; tensor parallelism replaces them by an all-gather and a reduce-scatter.
    """

    fused_projections = False

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Create the parameters uninitialized.

        Raises:
            UserError: a mixer's ``module_name`` is taken by another part of the block.
        """
        super().__init__()
        hidden, config = config.hidden_size, config.of_layer(layer)
        classes = layer_mixers(config, layer)
        self.norm = ResidualRMSNorm(hidden, config.norm_eps, config.kernels.elementwise)
        self.backend = config.kernels.elementwise
        self.gather_tokens: Callable[[Tensor], Tensor] = _unchanged
        self.may_fork = False
        """Whether no result is recomputed, so that each stream reads what its own branch computed."""
        for mixer in classes:
            if hasattr(self, mixer.module_name) or mixer.module_name in _LATER_ATTRIBUTES:
                raise UserError(f"mixer {mixer.name}: module_name '{mixer.module_name}' is taken; choose another")
            self.add_module(mixer.module_name, mixer(config, layer))
        self._branches = [(mixer.module_name, mixer.adds_time_encoding) for mixer in classes]
        alone: GivenBranches = "second" if classes[0].weighed_as_second else "first"
        self.given_branches: GivenBranches = "both" if len(classes) == 2 else alone
        self.scatter_tokens: Callable[[Tensor], Tensor] = _unchanged
        self.branch_norm: BranchNorm | None = None
        if config.branch_norm:
            self.branch_norm = BranchNorm(len(classes), hidden, config.norm_eps, config.kernels.elementwise)
        self.align = Alignment(len(classes), hidden, self.backend) if config.use_alignment else None
        self.reads_alignment = config.reads_alignment
        self.gate = FusionGate(config) if config.has_gate else None
        self.mix = config.branch_mix
        self.sums_branches = config.sums_branches
        self.out_proj: nn.Linear | None = None
        if config.projects_mix:
            width = hidden * len(classes) if config.branch_mix == "concat" else hidden
            self.out_proj = nn.Linear(width, hidden, bias=False)
        self.mlp = NormedMLP(config) if config.mlp_input == "residual" else MLP(config)

    def mixers(self) -> dict[str, Mixer]:
        """Return the mixers of the branches in order, by ``module_name``."""
        return {name: getattr(self, name) for name, _ in self._branches}

    def forward(
        self,
        x_BSC: Tensor,
        inputs: BlockInputs,
        branch_scale_B2: Tensor | None = None,
        cache: LayerCache | None = None,
        layer_metrics: tuple[str, ...] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the residual stream after this layer, and statistics summed over each row, ``[B]`` in fp32.

        The sums run over tokens and channels. Their keys: ``gate`` (g), ``entropy`` (binary entropy of g in nats),
        ``square`` (g²), and ``METRIC.FIELD`` for every layer metric.

        Args:
            x_BSC: residual stream ``[B, S, C]``.
            inputs: documents, positions and padding of the tokens.
            branch_scale_B2: factors of the first and second branch's output in each row; 0 drops the branch.
            cache: decoding caches of the branches, updated in place; None in training.
            layer_metrics: names of layer metrics to compute.
        """
        # Once for each branch, so that the norm adds their gradients; gathered tokens are added before the exchange.
        uses = len(self._branches) if self.gather_tokens is _unchanged else 1
        *normed, x_BSC = self.norm(x_BSC, uses)
        branch_inputs = normed if uses > 1 else [self.gather_tokens(normed[0])] * len(self._branches)
        outputs_BSC = self.branches(branch_inputs, inputs, cache)
        if self.sums_branches and branch_scale_B2 is None and not layer_metrics:
            outputs_BSC = even_mix(outputs_BSC, self.mix, len(self._branches))  # tensor parallelism sends half as much
        outputs_BSC = self.scatter_tokens(outputs_BSC)
        return self.combine(x_BSC, outputs_BSC, branch_scale_B2, inputs.mixer.padding_mask_BS, layer_metrics)

    def branches(self, branch_inputs: Sequence[Tensor], inputs: BlockInputs, cache: LayerCache | None = None) -> Tensor:
        """Return the branches' concatenated outputs: ``[B, S, 2C]`` for two branches, ``[B, S, C]`` for one.

        ``branch_inputs`` are the input of each branch ``[B, S, C]``, all in the same memory.
        """
        outputs = []
        u_BSC = branch_inputs[0]
        memory_BSC = self._memory_of_outputs(u_BSC)
        places = () if memory_BSC is None else memory_BSC.chunk(len(self._branches), dim=-1)
        side_by_side = self._side_by_side(u_BSC)
        for index, (name, adds_time_encoding) in enumerate(self._branches):
            with forked(u_BSC) if side_by_side and index == 0 else nullcontext():
                input_BSC = branch_inputs[index]
                if adds_time_encoding and inputs.srte_BSC is not None:
                    input_BSC = recomputed(torch.add, input_BSC, inputs.srte_BSC)
                of_branch = inputs.mixer._replace(place_BSC=places[index]) if places else inputs.mixer
                outputs.append(getattr(self, name)(input_BSC, of_branch, cache and cache[name]))
        if side_by_side:
            join(u_BSC.device)
        return joined(outputs, memory_BSC) if len(outputs) > 1 else outputs[0]

    def _memory_of_outputs(self, u_BSC: Tensor) -> Tensor | None:
        """Return memory for the branches' outputs side by side, or None if their products cannot write there."""
        if not self.fused_projections or len(self._branches) < 2 or torch.is_autocast_enabled(u_BSC.device.type):
            return None
        for name, _ in self._branches:
            mixer = getattr(self, name)
            # Not whether its weight is sharded now: an engine may gather a mixer's weights when the mixer runs, and the
            # recomputation of this block must do as its forward did.
            module = getattr(mixer, mixer.output_projection) if mixer.output_projection else None
            if type(module) is not nn.Linear or module.bias is not None:
                return None
        return u_BSC.new_empty(*u_BSC.shape[:-1], len(self._branches) * u_BSC.shape[-1])

    def _side_by_side(self, u_BSC: Tensor) -> bool:
        """Return whether the device executes both branches at the same time.

        Only where the pass is recorded: in eager passes a second stream costs the host more than it saves the device.
        Large inputs fill the device without that, and their memory would be freed later.
        """
        if not self.may_fork or len(self._branches) < 2 or u_BSC.numel() > _MOST_TO_FORK or not u_BSC.is_cuda:
            return False
        return torch.cuda.is_current_stream_capturing()

    def combine(
        self,
        x_BSC: Tensor,
        outputs_BSC: Tensor,
        branch_scale_B2: Tensor | None = None,
        padding_mask_BS: Tensor | None = None,
        layer_metrics: tuple[str, ...] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``x + out_proj(mix of outputs) + mlp(aligned outputs)``, and the sums of :meth:`forward`.

        With ``mlp_input`` residual: ``y + mlp(norm(y))`` with ``y = x + out_proj(mix of outputs)``. ``outputs_BSC`` are
        those of :meth:`branches`, or already their sum (``sums_branches``).
        """
        branches = len(self._branches)
        metric_sums: dict[str, Tensor] = {}
        if layer_metrics:
            outputs = dict(zip(self.mixers(), outputs_BSC.detach().chunk(branches, dim=-1), strict=True))
            with torch.no_grad():
                metric_sums = layer_metric_sums(layer_metrics, outputs, padding_mask_BS)
        if self.branch_norm is not None:
            outputs_BSC = self.branch_norm(outputs_BSC)
        if branch_scale_B2 is not None:
            start = 1 if self.given_branches == "second" else 0
            scale_BSn = branch_scale_B2[:, None, start : start + branches].to(outputs_BSC.dtype)
            outputs_BSC = (outputs_BSC.unflatten(-1, (branches, -1)) * scale_BSn.unsqueeze(-1)).flatten(2)
        z_BSC, passed_BSC = self._aligned(outputs_BSC) if self.reads_alignment else (None, outputs_BSC)
        down_BSR: Tensor | None = None
        projected: Sequence[Tensor] = ()
        joint = self.fused_projections and not isinstance(self.mlp, NormedMLP)
        if joint and self.gate is not None and z_BSC is not None:
            down_BSR, *projected = project(z_BSC, (self.gate.down, *self.mlp.projections()), joint=True)
        mixed_BSC, sums = self._mixed(z_BSC, down_BSR, passed_BSC, x_BSC.shape[-1], padding_mask_BS)
        if isinstance(self.mlp, NormedMLP):
            return self.mlp(x_BSC + mixed_BSC), sums | metric_sums
        if self.out_proj is None:  # what is added may be the branches' output itself
            return x_BSC + mixed_BSC + self.mlp(z_BSC, None, projected), sums | metric_sums
        return x_BSC + self.mlp(z_BSC, mixed_BSC, projected), sums | metric_sums

    def _aligned(self, outputs_BSC: Tensor) -> tuple[Tensor, Tensor]:
        """Return the input of gate and MLP, ``[B, S, C]``, and the outputs for the mix."""
        if self.align is not None:
            z_BSC, passed_BSC = self.align(outputs_BSC)
            # Only the gate's mix computes a gradient of its own; a sum without a gate hands on that of its result.
            return z_BSC, outputs_BSC if self.gate is None else passed_BSC
        if len(self._branches) == 2:
            return torch.add(*outputs_BSC.chunk(2, dim=-1)) / 2, outputs_BSC
        return outputs_BSC / 2, outputs_BSC  # the mean of the output and of zeros for the missing branch

    def _mixed(
        self,
        z_BSC: Tensor | None,
        down_BSR: Tensor | None,
        outputs_BSC: Tensor,
        channels: int,
        padding_mask_BS: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what the branches add to the residual stream, ``[B, S, C]``, and the sums of the gate's statistics."""
        if self.gate is not None:
            mixed_BSC, (gate_B, entropy_B, square_B) = gate_mix(
                self.gate(z_BSC, down_BSR),
                outputs_BSC,
                padding_mask_BS,
                given=self.given_branches,
                backend=self.backend,
            )
            sums = {"gate": gate_B, "entropy": entropy_B, "square": square_B}
        else:
            sums = even_sums(outputs_BSC, channels, padding_mask_BS)
            mixed_BSC = even_mix(outputs_BSC, self.mix, outputs_BSC.shape[-1] // channels)
        return mixed_BSC if self.out_proj is None else self.out_proj(mixed_BSC), sums


_MOST_TO_FORK = 1 << 25
"""Elements of a block's input up to which branches are recorded side by side; 32,768 tokens of 1,024 channels."""


def _unchanged(x_BSC: Tensor) -> Tensor:
    return x_BSC


_LATER_ATTRIBUTES = (
    "given_branches",
    "scatter_tokens",
    "branch_norm",
    "align",
    "reads_alignment",
    "gate",
    "mix",
    "sums_branches",
    "out_proj",
    "mlp",
)
"""Attributes that the constructor sets after the mixers; ``hasattr`` does not find them when a mixer is added."""
