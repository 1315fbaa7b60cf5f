"""Placement: how an engine keeps a set of parameters, from the module's view of them to the optimizer's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fusiontree.optim.build import Leaf
from fusiontree.optim.config import OptimizerSpec
from fusiontree.parallel.global_tensor import GlobalTensor, ShardSpec
from fusiontree.parallel.shard_groups import DistributedModel, ShardGroup

Decays = Callable[[str, nn.Parameter], bool]
"""Tells from a parameter's name and the parameter whether weight decay applies."""
NamedPiece = tuple[str, tuple[int, ...], Tensor]
"""Name of a parameter, offset of a rectangle in the full parameter, and its values."""


class Placement:
    """A set of parameters that are kept in one way.

    Building: ``take`` for each shard group, ``end_block`` after the groups of a block, ``finish`` once. Then per step
    ``begin`` before each forward pass, ``begin_backward`` and ``end_backward`` around each backward pass,
    ``wait_gradients``, ``gradients``, ``set_gradients`` and ``discard``. Methods that a placement does not need do
    nothing. All ranks call each method together, as it may communicate.
    """

    in_place: ClassVar[bool] = False
    """Whether the parameters that the model computes with keep memory and values for all micro-batches of a step."""
    fusable: ClassVar[bool] = False
    """Whether a fused step of the optimizer can take :meth:`leaf_gradients` and write the copies of :meth:`leaves`."""
    fused: bool = False
    """Set by the engine: a fused step is in use, so that after a step the copies have the optimizer's values."""

    def __init__(self, model: DistributedModel, decays: Decays, optimizer: OptimizerSpec) -> None:
        """Start without parameters.

        Args:
            model: the model, whose modules get the parameters that they compute with.
            decays: tells whether weight decay applies.
            optimizer: its states.
        """
        self.model: nn.Module = model.module
        self.specs = model.specs
        self.decays, self.optimizer = decays, optimizer

    def take(
        self,
        group: ShardGroup,
        parameters: dict[str, nn.Parameter],
        dtype: torch.dtype,
        mesh: DeviceMesh,
        block: ShardGroup,
    ) -> None:
        """Keep parameters, which are materialized in fp32.

        Args:
            group: their shard group.
            parameters: by name, without those of inner groups.
            dtype: of the values that the model computes with.
            mesh: the ranks that share them.
            block: the group of the block (or of the root) that contains ``group``.
        """
        raise NotImplementedError

    def end_block(self) -> None:
        """All groups of a block, or of the root, were taken."""

    def finish(self, root: nn.Module) -> nn.Module:
        """All parameters were taken; return the module to call in place of ``root``."""
        return root

    def leaves(self) -> Iterator[Leaf]:
        """Yield this rank's tensors for the optimizer: plain ones, as DTensors cost the host several times as much."""
        raise NotImplementedError

    def begin(self, training: bool) -> None:
        """A forward pass begins, of a training step or of an evaluation."""

    def begin_backward(self, last: bool) -> None:
        """A backward pass begins; ``last`` marks the final one of the step."""

    def end_backward(self) -> None:
        """A backward pass is over."""

    def end_evaluation(self) -> None:
        """The forward pass of an evaluation is over: no backward pass follows."""

    def wait_gradients(self) -> None:
        """Let later work of the device's stream come after all reductions."""

    def pass_state(self) -> Any:
        """Return what the passes of this step left on the host: references to gradients, and how far the step is."""
        raise NotImplementedError(f"{type(self).__name__} does not define pass_state")

    def set_pass_state(self, state: Any) -> None:
        """Put the host where it was at :meth:`pass_state`."""
        raise NotImplementedError

    def gradients(self) -> list[Tensor]:
        """Return this rank's shards of the reduced gradient."""
        raise NotImplementedError

    def set_gradients(self) -> None:
        """Give the gradients to the optimizer's tensors.

        A parameter without a gradient, which nothing in the model uses, gets zeros: in a flat buffer the optimizer
        cannot leave it out, so every engine must apply its weight decay.
        """

    def leaf_gradients(self) -> Iterator[Tensor | None]:
        """Yield the gradient of each tensor of :meth:`leaves` for a fused step, in its own dtype; None: it has none."""
        raise NotImplementedError

    def refresh(self) -> None:
        """Write the copies anew where a fused step is in use and others may have changed the optimizer's tensors.

        Recorded passes read the copies and do not write them.
        """

    def discard(self) -> None:
        """Clear the gradients; the step is over, and may have changed the parameters."""

    def mark_stale(self) -> None:
        """The optimizer's tensors may have been written to."""

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield live tensors of the training state with their names in a checkpoint."""
        raise NotImplementedError

    def parameter_pieces(self) -> Iterator[NamedPiece]:
        """Yield this rank's shards; where other ranks hold copies, the values that the last forward pass used."""
        raise NotImplementedError


def as_global(spec: ShardSpec, values: Tensor, start: int) -> GlobalTensor:
    """Return the position of consecutive elements of this rank's tensor parallel shard, from ``start`` on."""
    return GlobalTensor(spec.global_shape, spec.pieces(values.view(-1), start), values.dtype, values.device)


def put_in_place(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Let ``model`` compute with ``parameters`` in the place of those with the same names."""
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, parameter)
