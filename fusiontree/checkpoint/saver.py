"""Saves checkpoints in the background while training continues.

A save pauses training shortly to copy the state to CPU memory; then a thread writes the copy. Each rank writes its
files; then rank 0 writes the small files and, last, the manifest, and renames the folder. The threads of the ranks
communicate over a separate process group. If any thread fails, all ranks agree on the error and return it as the result
of the save; training and existing checkpoints are not affected.
"""

from __future__ import annotations

import json
import queue
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.exchange import first_of, rank_of
from fusiontree.checkpoint.folders import partial_folder, put_away, step_folder
from fusiontree.checkpoint.retention import remove_old
from fusiontree.checkpoint.save_plan import Rectangle, SavePlan, holdings_of, make_plan
from fusiontree.checkpoint.snapshot import Snapshot, live_pieces
from fusiontree.checkpoint.tables import Files, gather_tables
from fusiontree.checkpoint.write_files import Written, write_files, write_small_files
from fusiontree.utils.files import fsync_directory

_SMALL_FILES = 16 << 20
"""Disk space reserved for manifest, metadata, state and tokenizer, in bytes."""


@dataclass(frozen=True)
class SaveResult:
    """Result of a save; equal on all ranks except for the times."""

    step: int
    folder: Path
    stall_s: float
    """Time that training waited, in seconds."""
    write_s: float
    """Time from the start to the rename, in seconds."""
    size: int
    """Bytes of tensors."""
    error: str | None = None
    """Reason why there is no checkpoint, or None."""
    fatal: bool = False
    """True if no later save can succeed, because another process has taken the run folder."""
    removed: list[str] = field(default_factory=list)
    """Older checkpoints that retention deleted; only on rank 0."""
    note: dict[str, Any] = field(default_factory=dict)
    """The ``note`` given to :meth:`Saver.save`."""


@dataclass(frozen=True)
class _Failure:
    """Reason why there will be no checkpoint."""

    text: str
    fatal: bool = False


@dataclass(frozen=True)
class _Request:
    step: int
    values: dict[str, Any]
    extra_files: Sequence[Path]
    note: dict[str, Any]
    began: float


class Saver:
    """Writes the checkpoints of a run, one at a time. All ranks call its methods together, except :meth:`poll`."""

    def __init__(
        self,
        checkpoints: Path,
        config: CheckpointConfig,
        group: dist.ProcessGroup | None = None,
        may_commit: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Prepare to save.

        Args:
            checkpoints: RUN/checkpoints, on a file system that all ranks share.
            config: retention, and whether to write in the background.
            group: a gloo group of all ranks for exclusive use; None for a single process.
            may_commit: called on rank 0 before the folder is renamed; returns a reason not to commit, or None.
        """
        self.checkpoints, self.config, self.group = checkpoints, config, group
        self._may_commit = may_commit
        self._rank = rank_of(group)
        self._plan: SavePlan | None = None
        self._snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._results: queue.SimpleQueue[SaveResult] = queue.SimpleQueue()

    def prepare(self, tensors: dict[str, Tensor]) -> None:
        """Compute the save plan and allocate the buffers, so that the first save pauses no longer than later saves."""
        holdings = holdings_of(tensors)
        stale = self._plan is None or self._plan.holdings != holdings
        if first_of(True if stale else None, self.group):
            if self._snapshot:
                self._snapshot.close()
            self._plan, self._snapshot = make_plan(holdings, self.group), None
        assert self._plan is not None
        if self.config.async_ and self._snapshot is None:
            device = next((t.device for t in tensors.values()), torch.device("cpu"))
            self._snapshot = Snapshot(self._plan, device)

    def save(
        self,
        step: int,
        tensors: dict[str, Tensor],
        values: dict[str, Any],
        extra_files: Sequence[Path] = (),
        *,
        wait: bool = False,
        note: dict[str, Any] | None = None,
    ) -> None:
        """Start a save; :meth:`poll` returns its result.

        Waits first for a save that is still being written.

        Args:
            step: optimizer step of the state.
            tensors: this rank's view of the state: plain tensors (equal on all ranks), DTensors, GlobalTensors.
            values: JSON-able state, the same on all ranks.
            extra_files: small files to add to the checkpoint (a tokenizer).
            wait: return only after the checkpoint is written; then the state is not copied.
            note: returned in the result.
        """
        began = time.perf_counter()
        self.wait()
        self.prepare(tensors)
        plan = self._plan
        assert plan is not None
        request = _Request(step, json.loads(json.dumps(values)), extra_files, note or {}, began)
        if wait or self._snapshot is None:
            self._results.put(self._write(request, plan, live_pieces(plan, tensors), None))
            return
        self._snapshot.take(tensors)
        stall = time.perf_counter() - began
        pieces = dict(self._snapshot.buffers)

        def work() -> None:
            self._results.put(self._write(request, plan, pieces, stall))

        # A daemon thread, so that a failing process can end even if its peers hang.
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def poll(self) -> list[SaveResult]:
        """Return the results of saves that ended since the last call; other ranks may see them later."""
        self.wait(0)
        results = []
        while not self._results.empty():
            results.append(self._results.get())
        return results

    def wait(self, patience_s: float | None = None) -> None:
        """Wait until nothing is being written, at most ``patience_s`` seconds."""
        if self._thread is not None:
            self._thread.join(patience_s)
            if not self._thread.is_alive():
                self._thread = None

    def _write(
        self, request: _Request, plan: SavePlan, pieces: dict[Rectangle, Tensor], stall: float | None
    ) -> SaveResult:
        partial = partial_folder(self.checkpoints, request.step)
        removed: list[str] = []
        try:
            error = first_of(self._open(partial, plan) if self._rank == 0 else None, self.group)
            if error is None:
                written, mine = self._write_mine(partial, pieces)
                error = first_of(mine, self.group)
            if error is None:
                files, mine = self._describe(partial, plan, written)
                if files is not None:
                    mine = self._commit(request, partial, files)
                    removed = self._remove_old(request.step) if mine is None else []
                error = first_of(mine, self.group)
            if error and self._rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
        except Exception as failure:  # a peer has died, so the group is broken
            error = _Failure(f"rank {self._rank} lost the other ranks while it wrote {partial}: {failure}")
        seconds = time.perf_counter() - request.began
        return SaveResult(
            step=request.step,
            folder=step_folder(self.checkpoints, request.step),
            stall_s=seconds if stall is None else stall,
            write_s=seconds,
            size=plan.total_bytes,
            error=error.text if error else None,
            fatal=bool(error and error.fatal),
            removed=removed,
            note=request.note,
        )

    def _open(self, partial: Path, plan: SavePlan) -> _Failure | None:
        """Create the temporary folder, if there is enough disk space for the checkpoint."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            needed = plan.total_bytes + plan.total_bytes // 100 + _SMALL_FILES
            free = free_bytes(self.checkpoints)
            if free < needed:
                return _Failure(
                    f"{self.checkpoints} has {_size(free)} free, and the checkpoint of step {partial.name[-8:]} needs "
                    f"{_size(needed)}: free some space, or lower checkpoint.keep_last"
                )
            partial.mkdir()
        except OSError as error:
            return _Failure(_explain(error, partial))
        return None

    def _write_mine(self, partial: Path, pieces: dict[Rectangle, Tensor]) -> tuple[list[Written], _Failure | None]:
        try:
            return write_files(partial, self._rank, pieces), None
        except Exception as error:
            text = _explain(error, partial)
            if isinstance(error, FileNotFoundError) and self._rank:
                text += (
                    f" on rank {self._rank} ({socket.gethostname()}); was the folder removed, or is run_dir on a file "
                    f"system that not all ranks share?"
                )
            return [], _Failure(text)

    def _describe(self, partial: Path, plan: SavePlan, written: list[Written]) -> tuple[Files | None, _Failure | None]:
        """Write metadata and index on rank 0; return there the entries of the manifest. A collective call."""
        try:
            return gather_tables(partial, plan.tensors, written, self.group), None
        except Exception as error:
            return None, _Failure(_explain(error, partial))

    def _commit(self, request: _Request, partial: Path, files: Files) -> _Failure | None:
        """Write state and small files, then the manifest, and rename the folder to its final name."""
        final = step_folder(self.checkpoints, request.step)
        try:
            write_small_files(partial, {"step": request.step, **request.values}, request.extra_files, files)
            if problem := self._may_commit():
                return _Failure(problem, fatal=True)
            # A resumed or rewound run may reach a step again. Its old checkpoint is deleted last: a kill during the
            # deletion, which takes long, must not leave the step without a checkpoint.
            old = put_away(final) if final.exists() else None
            partial.rename(final)
            fsync_directory(self.checkpoints)
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)
        except Exception as error:
            return _Failure(_explain(error, partial))
        return None

    def _remove_old(self, newest: int) -> list[str]:
        try:
            return [folder.name for folder in remove_old(self.checkpoints, self.config, newest)]
        except OSError:
            return []  # retried after the next save or at the next start


def free_bytes(folder: Path) -> int:
    """Return the number of bytes that the user may still write in ``folder``."""
    return shutil.disk_usage(folder).free


def _explain(error: Exception, place: Path) -> str:
    if isinstance(error, OSError):
        return f"{error.filename or place}: {error.strerror or error}"
    return f"{place}: {type(error).__name__}: {error}"


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size > 1e9 else f"{size / 1e6:.1f} MB"
