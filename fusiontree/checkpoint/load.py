"""Loading: the newest checkpoint whose files match their hashes, into live tensors or into a single-device model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusiontree.checkpoint.folders import MANIFEST, STATE, complete_checkpoints
from fusiontree.checkpoint.manifest import CheckpointDamage, Report
from fusiontree.checkpoint.metadata import read_metadata
from fusiontree.checkpoint.reader import CheckpointReader
from fusiontree.models.config import ModelConfig
from fusiontree.models.mamba import SSMParameters
from fusiontree.models.model import FusionTreeModel
from fusiontree.utils.errors import UserError, nearest


def load_newest(
    checkpoints: Path,
    tensors: dict[str, Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    check: Callable[[Path, dict[str, Any]], None] = lambda folder, state: None,
    on_damage: Callable[[str], None] = lambda message: None,
    report: Report | None = None,
) -> tuple[Path, dict[str, Any]] | None:
    """Fill ``tensors`` from the newest good checkpoint; each byte is hashed while it is read.

    A checkpoint that turns out damaged on any rank is passed over on all, and the next older one then fills everything
    anew. Nothing is renamed or deleted here. All ranks call this together.

    Args:
        checkpoints: RUN/checkpoints.
        tensors: this rank's view of the state.
        group: a group of all ranks; None when this process is alone.
        check: called with folder and small values before anything is filled; may raise UserError.
        on_damage: called with a message for every damaged checkpoint.
        report: called with the bytes done and in all.

    Returns:
        The folder and its small values, or None where there is no checkpoint at all.

    Raises:
        CheckpointDamage: there are checkpoints and none is good.
        UserError: the newest good one belongs to another model.
    """
    folders = _gather([str(f) for f in complete_checkpoints(checkpoints)], group)[0]  # as rank 0 sees it
    for name in reversed(folders):
        folder = Path(name)
        state: dict[str, Any] = {}
        mine: tuple[str, str] | None = None
        try:
            state = load_checkpoint(folder, tensors, check=check, report=report)
        except CheckpointDamage as damage:
            mine = ("damage", str(damage))
        except UserError as error:
            mine = ("mistake", str(error))
        problems = [problem for problem in _gather(mine, group) if problem]
        if not problems:
            return folder, state
        for kind, text in problems:
            if kind == "mistake":
                raise UserError(text)
        on_damage(f"damaged checkpoint passed over: {problems[0][1]}")
    if folders:
        raise CheckpointDamage(
            f"none of the {len(folders)} checkpoints in {checkpoints} is whole; restore one of them or start in a new "
            f"run_dir"
        )
    return None


def _gather(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    if group is None:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def load_checkpoint(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    check: Callable[[Path, dict[str, Any]], None] = lambda folder, state: None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Fill ``tensors`` from one checkpoint and return its small values; every byte that is used is checked.

    Raises:
        CheckpointDamage: a file differs from its recorded hash.
        UserError: a tensor is missing or has another shape, or ``check`` raised it.
    """
    reader = CheckpointReader(folder)
    reader.check_small_files()
    state = read_state(folder)
    check(folder, state)
    reader.fill(tensors, report=report)
    return state


def check_model(folder: Path, state: dict[str, Any], model: dict[str, Any]) -> None:
    """Check that a checkpoint is one of this model.

    Args:
        folder: for the message.
        state: its small values.
        model: the ``model`` section, as plain values.

    Raises:
        UserError: names every field that differs.
    """
    saved = dict(state.get("config", {}).get("model", {}))
    wanted = dict(model)
    for values in (saved, wanted):
        values.pop("kernels", None)  # how fast, not what
    differing = [key for key in sorted(saved.keys() | wanted.keys()) if saved.get(key) != wanted.get(key)]
    if saved and differing:
        lines = "\n".join(f"  model.{k}: {saved.get(k)!r} in the checkpoint, {wanted.get(k)!r} now" for k in differing)
        raise UserError(
            f"{folder} is a checkpoint of another model:\n{lines}\nset these back, or start in another run_dir"
        )


def read_state(folder: Path) -> dict[str, Any]:
    """Return the checkpoint's small values: step, data position, configuration."""
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointDamage(f"{folder / STATE} cannot be read: {error}") from error


def load_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors`` in place from the checkpoint; each kind takes its own part, whatever layout saved it.

    Raises:
        CheckpointDamage: bytes differ from their recorded hash.
        UserError: a tensor is missing in the checkpoint or has another shape.
    """
    CheckpointReader(folder).fill(tensors)


def saved_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and type of every tensor that a DCP folder holds, in the order they were saved.

    Raises:
        CheckpointDamage: its metadata cannot be read.
    """
    return {name: (saved.shape, saved.dtype) for name, saved in read_metadata(folder).items()}


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder that ``path`` names: itself, or the newest complete one of a run folder.

    Raises:
        UserError: there is none.
    """
    if (path / MANIFEST).is_file():
        return path
    for folder in (path / "checkpoints", path):
        complete = complete_checkpoints(folder)
        if complete:
            return complete[-1]
    if not path.exists():
        near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise UserError(f"checkpoint '{path}' does not exist{near}")
    raise UserError(f"'{path}' holds no complete checkpoint; give a run folder or RUN/checkpoints/step-XXXXXXXX")


def load_model(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[FusionTreeModel, dict[str, Any]]:
    """Load a model for one device, ready for generation; only its own bytes are read, and its memory is all it takes.

    Args:
        path: a run folder (its newest checkpoint) or a checkpoint folder.
        device: where the model lives.
        dtype: type of its weights; the state space parameters stay fp32.

    Returns:
        The model in evaluation mode, and the resolved configuration it was trained with.

    Raises:
        UserError: there is no checkpoint there.
        CheckpointDamage: a file differs from its recorded hash.
    """
    folder = find_checkpoint(Path(path))
    reader = CheckpointReader(folder)
    reader.check_small_files()
    config = read_state(folder)["config"]
    with torch.device("meta"):
        model = FusionTreeModel(ModelConfig.model_validate(config["model"]))
    model.requires_grad_(False)
    for module in model.modules():
        if not isinstance(module, SSMParameters):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    reader.fill({f"model.{name}": p.detach() for name, p in model.named_parameters()})
    return model.eval(), config
