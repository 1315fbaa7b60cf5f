"""The checkpoint that a new run takes its first weights from (``checkpoint.init_from``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.checkpoint.folders import complete_checkpoints
from fusiontree.config.root import Config
from fusiontree.optim.config import OPTIMIZERS, check_same_optimizer
from fusiontree.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontree.data.format import TokenizerInfo

OTHER_CHECKPOINT = "name another checkpoint, RUN/checkpoints/step-XXXXXXXX"


@dataclass(frozen=True)
class InitialState:
    """A checkpoint that fits the run."""

    folder: Path
    step: int
    """Step of the checkpoint."""
    with_optimizer: bool
    differences: tuple[str, ...] = ()
    """A sentence for each setting of the model that differs."""

    def record(self) -> dict[str, Any]:
        """Return what the run's first event says about it."""
        values = {"folder": str(self.folder), "step": self.step, "optimizer": self.with_optimizer}
        return values | ({"differences": list(self.differences)} if self.differences else {})

    @classmethod
    def of_record(cls, values: dict[str, Any]) -> InitialState:
        """Return the checkpoint that :meth:`record` described."""
        return cls(Path(values["folder"]), values["step"], values["optimizer"], tuple(values.get("differences", ())))

    def __str__(self) -> str:
        """Return the console's line."""
        what = "weights and optimizer state" if self.with_optimizer else "weights"
        more = "".join(f"; {sentence}" for sentence in self.differences)
        return f"starts from the {what} of {self.folder}; step, data and schedule start anew{more}"


def find_initial_state(config: Config, tokenizer: TokenizerInfo) -> InitialState | None:
    """Return the checkpoint to start from; None where the configuration names none or the run has a checkpoint.

    Args:
        config: of the run.
        tokenizer: of its datasets.

    Raises:
        UserError: there is no checkpoint at ``checkpoint.init_from``; it is damaged; or its model, optimizer or
            tokenizer differs.
    """
    from fusiontree.checkpoint.initial import check_fits
    from fusiontree.checkpoint.load import find_checkpoint, read_state
    from fusiontree.checkpoint.manifest import CheckpointDamage

    given = config.checkpoint.init_from
    if given is None or complete_checkpoints(Path(config.run_dir) / "checkpoints"):
        return None
    folder = find_checkpoint(Path(given))
    optimizer, with_optimizer = config.training.optimizer.name, config.checkpoint.init_optimizer
    states = tuple(OPTIMIZERS.get(optimizer).states) if with_optimizer else ()
    try:
        state = read_state(folder)
        stored = state.get("config") or {}
        if with_optimizer:
            check_same_optimizer(folder, stored, optimizer)
        differences = check_fits(folder, stored, config.model, states)
        differences += check_tokenizer(folder, tokenizer, "checkpoint.init_from")
    except CheckpointDamage as damage:
        raise UserError(f"checkpoint.init_from: {damage}; {OTHER_CHECKPOINT}") from damage
    return InitialState(folder, state["step"], with_optimizer, tuple(differences))


def check_tokenizer(folder: Path, tokenizer: TokenizerInfo, setting: str) -> list[str]:
    """Check that the checkpoint that ``setting`` names was trained with ``tokenizer``; return notes if it is unknown.

    Raises:
        UserError: it was trained with another tokenizer.
    """
    from fusiontree.data.tokenizers import TOKENIZER_INFO, load_tokenizer

    if not (folder / TOKENIZER_INFO).is_file():
        return ["its tokenizer is not known"]
    theirs = load_tokenizer(folder).info
    if (theirs.sha256, theirs.eos_id) != (tokenizer.sha256, tokenizer.eos_id):
        raise UserError(
            f"{setting} '{folder}' was trained with tokenizer '{theirs.name}' (end of document "
            f"{theirs.eos_id}), and the datasets have '{tokenizer.name}' ({tokenizer.eos_id}), whose tokens mean other "
            f"text; build the datasets with its tokenizer"
        )
    return []
