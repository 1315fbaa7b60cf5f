"""The checkpoints of a run: saving, reports on saves, and loading the newest good one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusiontree.checkpoint.folders import (
    MANIFEST,
    complete_checkpoints,
    incomplete_checkpoints,
    remove_partial,
    set_aside,
)
from fusiontree.checkpoint.load import check_model, load_newest, load_on_all_ranks
from fusiontree.checkpoint.manifest import CheckpointDamage
from fusiontree.checkpoint.saver import Saver, SaveResult
from fusiontree.engines.base import Engine
from fusiontree.optim.config import check_same_optimizer
from fusiontree.tracking.console import report_bytes
from fusiontree.tracking.records import Records
from fusiontree.training.initial_state import OTHER_CHECKPOINT, InitialState
from fusiontree.utils.errors import UserError

log = logging.getLogger(__name__)


class RunCheckpoints:
    """Saves and loads the state of a run and writes an event for each save. All ranks call its methods together."""

    def __init__(self, saver: Saver, engine: Engine, records: Records, config: dict[str, Any]) -> None:
        """Connect; nothing is read or written yet.

        Args:
            saver: writes checkpoints in the background.
            engine: holds the tensors.
            records: takes the events.
            config: the run's configuration, whose model and optimizer a loaded checkpoint must have.
        """
        self.saver, self.engine, self.records, self.config = saver, engine, records, config
        self.saved_step: int | None = None
        """Step of the newest checkpoint that was loaded or whose save did not fail."""
        self.train_seconds = 0.0
        """Training time up to the newest checkpoint."""

    def remove_partial(self) -> None:
        """Remove what saves of earlier starts left behind; on the main rank only."""
        for partial in remove_partial(self.saver.checkpoints):
            self.records.event("partial_checkpoint_removed", folder=partial.name)

    def save(
        self, step: int, values: dict[str, Any], files: Sequence[Path], train_seconds: float, *, wait: bool
    ) -> None:
        """Save the state after ``step`` unless it was saved.

        Args:
            step: the last finished step.
            values: small JSON-able state beside the engine's tensors.
            files: small files to copy into the checkpoint.
            train_seconds: training time up to ``step``.
            wait: return when the checkpoint is written; otherwise it is written in the background.
        """
        self.wait()
        if self.saved_step == step:
            return
        note = {"train_seconds": round(train_seconds, 3)}
        self.saver.save(step, self.engine.state_tensors(), values, files, wait=wait, note=note)
        self.saved_step = step
        if wait:
            self.report()

    def wait(self) -> None:
        """Wait for the save in progress and report on it."""
        self.saver.wait()
        self.report()

    def wait_for_last_save(self, patience_s: float) -> None:
        """Wait at most ``patience_s`` seconds for the save in progress: it may be the newest state of the run."""
        self.saver.wait(patience_s)
        self.report(ending=True)

    def report(self, *, ending: bool = False) -> None:
        """Write an event for each save that ended since the last call.

        Args:
            ending: the run ends with another error, so a fatal error of a save is not raised.

        Raises:
            UserError: no later save can succeed, because another process has taken the run folder.
        """
        for result in self.saver.poll():
            if result.error is None:
                self._report_saved(result)
                continue
            self.saved_step = None if self.saved_step == result.step else self.saved_step
            self.records.event("save_failed", step=result.step, reason=result.error)
            if self.engine.is_main:
                log.error("step %d was NOT saved: %s", result.step, result.error)
            if result.fatal and not ending:
                raise UserError(result.error)

    def _report_saved(self, result: SaveResult) -> None:
        self.train_seconds = result.note["train_seconds"]
        self.records.event(
            "save",
            step=result.step,
            folder=result.folder.name,
            seconds=round(result.stall_s, 3),
            write_seconds=round(result.write_s, 3),
            bytes=result.size,
            removed=result.removed,
            train_seconds=result.note["train_seconds"],
        )
        self._say(
            f"saved {result.folder} ({result.size / 1e9:.2f} GB in {result.write_s:.1f} s; training waited "
            f"{result.stall_s:.2f} s)"
        )

    def load_newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Fill the engine's tensors from the newest good checkpoint; return its folder and its small values.

        Damaged newer checkpoints are renamed: a later save of the same step must not replace them.
        """
        found = load_newest(
            self.saver.checkpoints,
            self.engine.state_tensors(),
            group=self.saver.group,
            check=self._check,
            on_damage=self._report_damage,
            report=report_bytes(self._say, "reading and verifying the checkpoint"),
        )
        if found is not None:
            self.saved_step = found[1]["step"]
            if self.engine.is_main:
                for folder in complete_checkpoints(self.saver.checkpoints):
                    if folder > found[0]:
                        self._set_aside(folder)
        if self.engine.is_main:
            for folder in incomplete_checkpoints(self.saver.checkpoints):
                self._report_damage(f"skipped a damaged checkpoint: {folder} has no {MANIFEST}")
                self._set_aside(folder)
        self.engine.barrier()
        return found

    def load_initial(self, initial: InitialState) -> None:
        """Fill the engine's parameters, and with them the optimizer's state if wanted, from another run's checkpoint.

        Raises:
            UserError: a file differs from its recorded hash; raised on every rank.
        """
        tensors = self.engine.state_tensors()
        try:
            state = load_on_all_ranks(
                initial.folder,
                tensors if initial.with_optimizer else {n: t for n, t in tensors.items() if n.startswith("model.")},
                group=self.saver.group,
                report=report_bytes(self._say, "reading and verifying the checkpoint"),
            )
        except CheckpointDamage as damage:
            raise UserError(f"checkpoint.init_from: {damage}; {OTHER_CHECKPOINT}") from damage
        # Without the optimizer's state, its own fresh values: the engine must learn that its tensors have changed.
        self.engine.load_state_dict(state["engine"] if initial.with_optimizer else self.engine.state_dict())

    def _check(self, folder: Path, state: dict[str, Any]) -> None:
        check_model(folder, state, self.config["model"])
        check_same_optimizer(folder, state.get("config", {}), self.config["training"]["optimizer"]["name"])

    def _set_aside(self, folder: Path) -> None:
        try:
            aside = set_aside(folder)
        except OSError as error:
            log.warning("damaged checkpoint %s cannot be renamed: %s", folder, error)
            return
        self.records.event("checkpoint_set_aside", folder=folder.name, renamed=aside.name)
        log.warning("damaged checkpoint %s is now %s; it can be deleted", folder, aside.name)

    def _report_damage(self, message: str) -> None:
        self.records.event("checkpoint_damaged", reason=message)
        if self.engine.is_main:
            log.warning(message)

    def _say(self, message: str) -> None:
        if self.engine.is_main:
            log.info(message)
