"""The ``training.optimizer`` section and the specification of each optimizer; importing it needs no torch.

A specification says all that engines, checkpoints, converters and planner ask of an optimizer. docs/extend/optimizer.md
adds one from a user's file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.utils.errors import UserError, nearest
from fusiontree.utils.registry import Registry
from fusiontree.utils.settings import Section, setting

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from fusiontree.optim.build import FusedStep, Leaf

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DEFAULT = "adamw"


class OptimizerSettings(Section):
    """Name of the optimizer. Each registered optimizer derives its section from this one."""

    name: str = setting(DEFAULT, "Optimizer; adamw, or one that a plugin registers. Each has its own settings.")


class AdamWSettings(OptimizerSettings):
    """Name of the optimizer and its settings (those of adamw are listed)."""

    beta1: float = setting(0.9, "AdamW's decay of the mean.", ge=0, lt=1)
    beta2: float = setting(0.95, "AdamW's decay of the mean square.", ge=0, lt=1)
    eps: float = setting(1e-8, "AdamW's denominator term.", gt=0)


@dataclass(frozen=True)
class OptimizerSpec:
    """One kind of optimizer."""

    settings: type[OptimizerSettings]
    """Section that validates ``training.optimizer``."""
    build: Callable[[list[dict[str, Any]], Any], Optimizer]
    """Returns the optimizer, given torch's parameter groups (each has its ``weight_decay``) and validated settings.

    The parameters are plain fp32 tensors, most of them flat shards of several parameters. Before the first step the
    engine fills ``optimizer.state`` of each with ``step`` (fp32 scalar, 0) and with zeros for each of ``states``;
    ``optimizer.step()`` adds 1 to ``step``. Before each step the engine sets ``lr`` in each group.
    """
    states: Mapping[str, str] = field(default_factory=dict)
    """Name -> dtype (``float32``, ``bfloat16``, ``float16``) of each state of the parameter's shape."""
    whole_matrices: bool = False
    """True if a step needs matrices in their shape, which engines that shard them do not give."""
    scales_gradients: bool = False
    """True if ``step()`` divides gradients by the tensor ``optimizer.grad_scale`` and changes nothing where
    ``optimizer.found_inf`` is 1, as torch's fused optimizers do. Otherwise the engine divides the gradients, and waits
    for the gradient norm to decide whether to step."""
    fused: Callable[[Optimizer, Sequence[Leaf]], FusedStep] | None = None
    """Returns a step over the optimizer's tensors and states that also reads 16-bit gradients and writes the copies
    that the model computes with, or None if there is no such step. Engines use it on GPUs where parameters keep their
    memory."""

    def without_states(self) -> OptimizerSpec:
        """Return the specification of an optimizer that never steps, for frozen parameters."""
        return replace(self, states={})

    @property
    def bytes_per_parameter(self) -> int:
        """Bytes of the states of one parameter."""
        return sum(_BYTES[dtype] for dtype in self.states.values())


OPTIMIZERS: Registry[OptimizerSpec] = Registry("optimizer")


def _build_adamw(groups: list[dict[str, Any]], settings: AdamWSettings) -> Optimizer:
    import torch

    return torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True)


def _fuse_adamw(optimizer: Optimizer, leaves: Sequence[Leaf]) -> FusedStep:
    from fusiontree.optim.adamw import FusedAdamW

    return FusedAdamW(optimizer, leaves)


OPTIMIZERS.register(
    DEFAULT,
    OptimizerSpec(
        settings=AdamWSettings,
        build=_build_adamw,
        states={"exp_avg": "float32", "exp_avg_sq": "float32"},
        scales_gradients=True,
        fused=_fuse_adamw,
    ),
)


def validated_settings(values: Any) -> OptimizerSettings:
    """Validate ``training.optimizer`` by the section of the optimizer that it names.

    Raises:
        UserError: no optimizer has this name, or the optimizer has no setting of some key's name.
        ValidationError: of pydantic, if a value is of the wrong type or range.
    """
    if isinstance(values, Mapping):
        name = str(values.get("name", DEFAULT))
        section = OPTIMIZERS.get(name).settings
        for key in values.keys() - set(section.known_keys()):
            known = section.known_keys()
            hint = nearest(key, known) or f"; known keys: {', '.join(known)}"
            raise UserError(f"unknown key '{key}' of optimizer {name}{hint}")
        return section.model_validate(dict(values))
    if not isinstance(values, OptimizerSettings):
        raise UserError(f"{values!r} is no section; write optimizer: {{name: {DEFAULT}}}")
    return values


def stored_name(config: Mapping[str, Any]) -> str:
    """Return the optimizer's name in a stored configuration; configurations before the setting existed mean adamw."""
    return str(((config.get("training") or {}).get("optimizer") or {}).get("name", DEFAULT))


def stored_spec(config: Mapping[str, Any]) -> OptimizerSpec:
    """Return the specification of the optimizer that a stored configuration names.

    Raises:
        UserError: it is not registered; the plugin that adds it is missing.
    """
    return OPTIMIZERS.get(stored_name(config))


def check_same_optimizer(folder: Path, stored: Mapping[str, Any], name: str) -> None:
    """Check that a checkpoint's state is that of optimizer ``name``; ``stored`` is the checkpoint's configuration.

    Raises:
        UserError: another optimizer wrote it.
    """
    saved = stored_name(stored)
    if saved != name:
        raise UserError(
            f"{folder} was trained with training.optimizer.name {saved}, and the configuration says {name}, which has "
            f"other states; set training.optimizer.name={saved}, or start another run_dir from its weights alone "
            f"(checkpoint.init_from=RUN, checkpoint.init_optimizer=false)"
        )
