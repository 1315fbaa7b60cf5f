"""The checkpoint of a teacher (``training.teacher``): whether it fits the run, and its values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from fusiontree.checkpoint.load import find_checkpoint, load_on_all_ranks, read_state, stored_model
from fusiontree.checkpoint.manifest import CheckpointDamage
from fusiontree.config.root import Config
from fusiontree.models.config import ModelConfig
from fusiontree.training.initial_state import OTHER_CHECKPOINT, check_tokenizer
from fusiontree.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontree.data.format import TokenizerInfo


@dataclass(frozen=True)
class TeacherCheckpoint:
    """A checkpoint whose model can be the teacher of the run."""

    folder: Path
    model: ModelConfig
    """Its model, with the run's kernels."""

    def record(self) -> dict[str, Any]:
        """Return plain values for the other ranks."""
        return {"folder": str(self.folder), "model": self.model.model_dump(mode="json")}

    @classmethod
    def of_record(cls, values: dict[str, Any]) -> TeacherCheckpoint:
        """Return the checkpoint that :meth:`record` described."""
        return cls(Path(values["folder"]), ModelConfig.model_validate(values["model"]))


class HasTensors(Protocol):
    """A model whose parameters are filled in place."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the parameters with their names in a checkpoint."""
        ...


def find_teacher(config: Config, tokenizer: TokenizerInfo) -> TeacherCheckpoint | None:
    """Return the teacher's checkpoint; None where the configuration names none.

    Args:
        config: of the run.
        tokenizer: of its datasets.

    Raises:
        UserError: there is no checkpoint at ``training.teacher``, it is damaged, its vocabulary or tokenizer differs,
            its learnable SRTE is too short for the rows, or the loss's backend does not support a teacher.
    """
    found = read_teacher(config)
    if found is None:
        return None
    folder, model = found.folder, found.model
    try:
        check_tokenizer(folder, tokenizer, "training.teacher")
    except CheckpointDamage as damage:
        raise UserError(f"training.teacher: {damage}; {OTHER_CHECKPOINT}") from damage
    if model.vocab_size != config.model.vocab_size:
        raise UserError(
            f"training.teacher '{folder}' has vocab_size {model.vocab_size} and this model {config.model.vocab_size}; "
            f"both must have the same"
        )
    longest = model.max_position_embeddings
    if model.srte_encoding == "learnable" and config.training.seq_len > longest:
        raise UserError(
            f"training.teacher '{folder}' has a learnable SRTE for texts of at most {longest} tokens, and "
            f"training.seq_len is {config.training.seq_len}; use shorter rows or another teacher"
        )
    if config.model.kernels.cross_entropy not in ("auto", "chunked"):
        raise UserError(
            f"kernels.cross_entropy={config.model.kernels.cross_entropy} does not compare with a teacher; use auto or "
            f"chunked"
        )
    return found


def read_teacher(config: Config) -> TeacherCheckpoint | None:
    """Return the checkpoint that the configuration names, without comparing it; None where it names none.

    Raises:
        UserError: there is no checkpoint at ``training.teacher``, it is damaged, or it does not describe its model in
            settings of this version.
    """
    given = config.training.teacher
    if given is None:
        return None
    folder = find_checkpoint(Path(given))
    try:
        stored = read_state(folder).get("config", {}).get("model")
    except CheckpointDamage as damage:
        raise UserError(f"training.teacher: {damage}; {OTHER_CHECKPOINT}") from damage
    if stored is None:
        raise UserError(f"training.teacher '{folder}' does not describe its model; {OTHER_CHECKPOINT}")
    model = stored_model({"model": stored}, f"the configuration of training.teacher '{folder}'")
    return TeacherCheckpoint(folder, model.model_copy(update={"kernels": config.model.kernels}))


def fill_teacher(teacher: HasTensors, found: TeacherCheckpoint, group: Any) -> None:
    """Fill a teacher's parameters; all ranks call this together.

    Args:
        teacher: without values.
        found: its checkpoint.
        group: a process group of all ranks on the CPU.

    Raises:
        UserError: a file differs from its recorded hash; raised on every rank.
    """
    try:
        load_on_all_ranks(found.folder, teacher.state_tensors(), group=group)
    except CheckpointDamage as damage:
        raise UserError(f"training.teacher: {damage}; {OTHER_CHECKPOINT}") from damage
