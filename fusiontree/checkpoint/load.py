"""Loads the newest undamaged checkpoint into the tensors of a run or into a single-device model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor

from fusiontree.checkpoint.exchange import first_of, rank_of
from fusiontree.checkpoint.folders import MANIFEST, STATE, complete_checkpoints
from fusiontree.checkpoint.manifest import CheckpointDamage, Report
from fusiontree.checkpoint.model_settings import different_settings
from fusiontree.checkpoint.reader import CheckpointReader
from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers.base import Fp32Parameters
from fusiontree.models.model import FusionTreeModel
from fusiontree.utils.errors import UserError, nearest_file


def load_newest(
    checkpoints: Path,
    tensors: dict[str, Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    check: Callable[[Path, dict[str, Any]], None] = lambda folder, state: None,
    on_damage: Callable[[str], None] = lambda message: None,
    report: Report | None = None,
) -> tuple[Path, dict[str, Any]] | None:
    """Fill ``tensors`` from the newest undamaged checkpoint; all bytes are hashed while they are read.

    If any rank finds a checkpoint damaged, all ranks skip it and load the next older checkpoint from the start. Renames
    and deletes nothing. A collective call.

    Args:
        checkpoints: RUN/checkpoints.
        tensors: this rank's view of the state.
        group: a group of all ranks; None for a single process.
        check: called with folder and small values before tensors are filled; may raise UserError.
        on_damage: called with a message for every damaged checkpoint.
        report: called with the bytes read and the total bytes.

    Returns:
        The folder and its small values, or None if there is no checkpoint.

    Raises:
        CheckpointDamage: all checkpoints are damaged.
        UserError: the newest undamaged checkpoint belongs to another model.
    """
    first = rank_of(group) == 0
    folders = first_of([str(f) for f in complete_checkpoints(checkpoints)] if first else None, group)
    assert folders is not None
    for name in reversed(folders):
        folder = Path(name)
        try:
            return folder, load_on_all_ranks(folder, tensors, group=group, check=check, report=report)
        except CheckpointDamage as damage:
            on_damage(f"skipped a damaged checkpoint: {damage}")
    if folders:
        raise CheckpointDamage(
            f"all {len(folders)} checkpoints in {checkpoints} are damaged; restore one of them or start in a new "
            f"run_dir"
        )
    return None


def load_on_all_ranks(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    check: Callable[[Path, dict[str, Any]], None] = lambda folder, state: None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Fill ``tensors`` from one checkpoint and return its small values. A collective call.

    Raises:
        CheckpointDamage: a rank found a file that differs from its recorded hash; raised on every rank.
        UserError: the checkpoint does not fit; raised on every rank.
    """
    state: dict[str, Any] = {}
    mistake: str | None = None
    damage: str | None = None
    try:
        state = load_checkpoint(folder, tensors, check=check, report=report, small_files=rank_of(group) == 0)
    except CheckpointDamage as error:
        damage = str(error)
    except UserError as error:
        mistake = str(error)
    if (mistake := first_of(mistake, group)) is not None:
        raise UserError(mistake)
    if (damage := first_of(damage, group)) is not None:
        raise CheckpointDamage(damage)
    return state


def load_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    check: Callable[[Path, dict[str, Any]], None] = lambda folder, state: None,
    report: Report | None = None,
    small_files: bool = True,
) -> dict[str, Any]:
    """Fill ``tensors`` from one checkpoint and return its small values; all used bytes are verified.

    Args:
        folder: the checkpoint.
        tensors: this rank's view of the state.
        check: called with folder and small values before tensors are filled; may raise UserError.
        report: called with the bytes read and the total bytes.
        small_files: also verify the files that nobody uses here: one rank of many is enough.

    Raises:
        CheckpointDamage: a file differs from its recorded hash.
        UserError: a tensor is missing or has another shape, or ``check`` raised it.
    """
    reader = CheckpointReader(folder)
    if small_files:
        reader.check_small_files()
    else:
        reader.check(STATE)
    state = read_state(folder)
    check(folder, state)
    reader.fill(tensors, report=report)
    return state


def check_model(folder: Path, state: dict[str, Any], model: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to this model.

    Args:
        folder: the checkpoint, for the message.
        state: small values of the checkpoint.
        model: the ``model`` section, as plain values.

    Raises:
        UserError: fields differ; the message names them all.
    """
    differing = different_settings(state.get("config", {}).get("model", {}), model)
    if differing:
        lines = "\n".join(f"  {name}: {old!r} in the checkpoint, {new!r} now" for name, old, new in differing)
        raise UserError(
            f"{folder} is a checkpoint of another model:\n{lines}\nset these back, or start another run_dir with "
            f"checkpoint.init_from"
        )


def read_state(folder: Path) -> dict[str, Any]:
    """Return the checkpoint's small values: step, data position, configuration."""
    try:
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointDamage(f"{folder / STATE} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointDamage(f"{folder / STATE} holds no state")
    return values


def stored_model(config: Mapping[str, Any], place: str) -> ModelConfig:
    """Return the section ``model`` of a stored configuration, validated.

    Raises:
        UserError: it describes no model: it is of another version, or a plugin's mixer is not registered. ``place``
            names its origin.
    """
    try:
        return ModelConfig.model_validate(config["model"])
    except ValidationError as error:
        wrong = [f"{'.'.join(['model', *map(str, e['loc'])])}: {e['msg']}" for e in error.errors()]
        raise UserError(
            f"{place} describes no model of this version ({'; '.join(wrong)}); use the version that wrote it, and name "
            f"its plugins if it has any"
        ) from None


def row_length(given: int | None, config: Mapping[str, Any], folder: Path) -> int:
    """Return ``given`` tokens, of the option ``--seq-len``, else ``training.seq_len`` of a stored configuration.

    Raises:
        UserError: neither is there: a converted checkpoint may not say how it was trained.
    """
    length = given or config.get("training", {}).get("seq_len")
    if length is None:
        raise UserError(f"{folder} does not say the length of the rows it was trained on; give --seq-len N")
    return int(length)


def find_checkpoint(path: Path) -> Path:
    """Return ``path`` if it is a checkpoint folder, or the newest complete checkpoint of a run folder.

    Raises:
        UserError: there is no complete checkpoint.
    """
    if (path / MANIFEST).is_file():
        return path
    for folder in (path / "checkpoints", path):
        complete = complete_checkpoints(folder)
        if complete:
            return complete[-1]
    if not path.exists():
        raise UserError(f"checkpoint '{path}' does not exist{nearest_file(path)}")
    raise UserError(f"'{path}' holds no complete checkpoint; give a run folder or RUN/checkpoints/step-XXXXXXXX")


def load_model(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[FusionTreeModel, dict[str, Any]]:
    """Load a model on one device for generation; reads only the model's tensors and needs little memory besides them.

    Args:
        path: a run folder (its newest checkpoint) or a checkpoint folder.
        device: of the model.
        dtype: of the weights; mixers' :class:`Fp32Parameters` stay fp32.

    Returns:
        The model in evaluation mode, and the resolved configuration it was trained with.

    Raises:
        UserError: there is no checkpoint there, or its configuration describes no model.
        CheckpointDamage: a file differs from its recorded hash.
    """
    folder = find_checkpoint(Path(path))
    reader = CheckpointReader(folder)
    reader.check_small_files()
    config = read_state(folder)["config"]
    with torch.device("meta"):
        model = FusionTreeModel(stored_model(config, f"the configuration of '{folder}'"))
    model.requires_grad_(False)
    for module in model.modules():
        if not isinstance(module, Fp32Parameters):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    reader.fill({f"model.{name}": p.detach() for name, p in model.named_parameters()})
    return model.eval(), config
