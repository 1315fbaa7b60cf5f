"""Whether the tensors of a checkpoint can be the initial values of another run (``checkpoint.init_from``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from fusiontree.checkpoint.reader import CheckpointReader
from fusiontree.models.config import ModelConfig
from fusiontree.models.model import FusionTreeModel
from fusiontree.utils.errors import UserError

_MAY_DIFFER = frozenset(
    (
        *("window_size", "window_size_last", "attention_type", "max_position_embeddings", "rope_theta", "norm_eps"),
        *("initializer_range", "drop_branch_prob", "load_balance_coeff", "entropy_reg_coeff", "z_loss_coeff"),
        *("mamba.chunk_size", "mamba.A_init_range", "mamba.dt_init_range", "mamba.dt_min", "mamba.dt_max"),
        *(f"mixers.gated_delta_net.{name}" for name in ("chunk_size", "A_init_range", "dt_init_range")),
    )
)
"""Settings that give the weights no other meaning: reach of attention, initial values, coefficients of losses."""


def check_fits(folder: Path, stored: Mapping[str, Any], model: ModelConfig, states: tuple[str, ...]) -> list[str]:
    """Check that a checkpoint has exactly the model's parameters and their wanted states.

    Args:
        folder: the checkpoint.
        stored: its configuration.
        model: of the new run.
        states: names of the optimizer's states to take from the checkpoint.

    Returns:
        A sentence for each model setting that differs and may differ.

    Raises:
        CheckpointDamage: a small file of the checkpoint is damaged.
        UserError: settings that give the weights another meaning differ, or names or shapes of tensors.
    """
    reader = CheckpointReader(folder)
    reader.check_small_files()
    differing = _differing(folder, stored.get("model"), model)
    if refused := [sentence for name, sentence in differing.items() if name not in _MAY_DIFFER]:
        lines = "\n".join(f"  {sentence}" for sentence in refused)
        raise UserError(
            f"checkpoint.init_from '{folder}' is of another model:\n{lines}\nset them as the checkpoint has them"
        )
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in FusionTreeModel(model).named_parameters()}
    kinds = ("model", *(f"optimizer.{state}" for state in states))
    wanted = {f"{kind}.{name}": shape for kind in kinds for name, shape in shapes.items()}
    prefixes = ("model.", "optimizer.") if states else ("model.",)
    found = {name: tuple(saved.shape) for name, saved in reader.tensors.items() if name.startswith(prefixes)}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            there, here = (list(side[name]) if name in side else "absent" for side in (found, wanted))
            way = "; checkpoint.init_optimizer=false takes the weights alone" if name.startswith("optimizer.") else ""
            raise UserError(f"checkpoint.init_from '{folder}': '{name}' is {there} there and {here} in this model{way}")
    return list(differing.values())


def _differing(folder: Path, stored: Mapping[str, Any] | None, model: ModelConfig) -> dict[str, str]:
    """Return dotted name -> sentence of every setting that differs; none where the checkpoint has no settings."""
    if not stored:
        return {}
    try:
        theirs = ModelConfig.model_validate(dict(stored)).model_dump(mode="json", by_alias=True)
    except ValidationError as error:
        raise UserError(
            f"checkpoint.init_from '{folder}' has settings of a model that this version does not know: "
            f"{error.errors()[0]['msg']}"
        ) from error
    ours = model.model_dump(mode="json", by_alias=True)
    theirs.pop("kernels", None)
    ours.pop("kernels", None)
    there, here = _flat(theirs), _flat(ours)
    return {
        name: f"model.{name} is {there.get(name)!r} there and {here.get(name)!r} in this run"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
