"""FusionTree's training checkpoint as source and target of a conversion."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusiontree.checkpoint.folders import folder_step, step_folder
from fusiontree.checkpoint.load import find_checkpoint, read_state
from fusiontree.checkpoint.reader import CheckpointReader
from fusiontree.checkpoint.save_plan import Rectangle
from fusiontree.checkpoint.tables import Files, write_tables, written_rows
from fusiontree.checkpoint.verify import verify
from fusiontree.checkpoint.write_files import Written, write_file, write_small_files
from fusiontree.convert.reader import MODEL, TOKENIZER_FILES, CheckpointSource, Entry, Stream, checked, state_prefix
from fusiontree.utils.files import atomic_write

_FILE_BYTES = 4 << 30
_STEP_NAME = re.compile(r"step-\d{8}")


class TrainingCheckpoint(CheckpointSource):
    """RUN/checkpoints/step-XXXXXXXX; compares every file with its recorded hash."""

    def __init__(self, path: Path) -> None:
        """Open the folder, or the newest checkpoint of a run folder.

        Raises:
            UserError: there is no checkpoint, or its tensors do not match its configuration.
            CheckpointDamage: a file differs from its recorded hash.
        """
        self.folder = find_checkpoint(path)
        verify(self.folder)
        values = read_state(self.folder)
        self.config = values.pop("config")
        self.state = values
        self.files = [self.folder / name for name in TOKENIZER_FILES if (self.folder / name).is_file()]
        self._reader = CheckpointReader(self.folder)
        self.entries = {name: Entry(saved.shape, saved.dtype) for name, saved in self._reader.tensors.items()}
        self.entries = checked(self.entries, self.model_config, str(self.folder))
        self._ahead: dict[str, Tensor] = {}
        self._order = list(self.entries)
        self._places = {name: place for place, name in enumerate(self._order)}
        self._limit = max(entry.nbytes for entry in self.entries.values())

    def read(self, name: str) -> Tensor:
        """Return one tensor; also reads the small tensors after it ahead, up to the size of the largest tensor."""
        if name not in self._ahead:
            self._ahead.clear()
            wanted: dict[str, Tensor] = {}
            size = 0
            for near in self._order[self._places[name] :]:
                size += self.entries[near].nbytes
                if wanted and size > self._limit:
                    break
                wanted[near] = torch.empty(self.entries[near].shape, dtype=self.entries[near].dtype)
            self._reader.fill(wanted, in_flight=16 << 20)
            self._ahead = wanted
        return self._ahead.pop(name)


class Lazy(NamedTuple):
    """A tensor to write; its rectangles are created one at a time."""

    entry: Entry
    chunks: dict[tuple[int, ...], tuple[int, ...]]
    """Offset and shape of each rectangle."""
    make: Callable[[tuple[int, ...]], Tensor]
    """Returns the rectangle at an offset."""


def one_rectangle(entry: Entry, make: Callable[[], Tensor]) -> Lazy:
    """Return a tensor of one rectangle."""
    return Lazy(entry, {(0,) * len(entry.shape): entry.shape}, lambda offset: make())


def write_dcp(folder: Path, tensors: dict[str, Lazy], *, index: bool = True) -> Files:
    """Write tensors as a DCP folder, a rectangle at a time, and return its files' entries in the manifest.

    Without ``index`` the folder is as torch writes it, for readers of other programs only.
    """
    files: list[list[Rectangle]] = [[]]
    size = 0
    for name, lazy in tensors.items():
        if size > _FILE_BYTES:
            files.append([])
            size = 0
        files[-1] += [(name, offset, shape) for offset, shape in lazy.chunks.items()]
        size += lazy.entry.nbytes
    written: list[Written] = []
    for number, rectangles in enumerate(files):
        pieces = ((rectangle, tensors[rectangle[0]].make(rectangle[1])) for rectangle in rectangles)
        written.append(write_file(folder, f"__0_{number}.distcp", pieces))
    entries = {name: (lazy.entry.shape, lazy.entry.dtype) for name, lazy in tensors.items()}
    rows = written_rows(written, entries)
    return write_tables(folder, entries, {part.name: part.size for part in written}, [rows], index=index)


def write(folder: Path, stream: Stream, *, config_yaml: str | None, name: str) -> None:
    """Write a run folder with one checkpoint, or one checkpoint folder.

    A source without states of the optimizer gets zeros, so that training can go on from it as from step 0.

    Args:
        folder: temporary folder that becomes the target.
        stream: the tensors.
        config_yaml: the run's full configuration as YAML, if known.
        name: the target's name; ``step-XXXXXXXX`` creates a checkpoint folder, any other name a run folder.
    """
    source = stream.source
    values = source.state or fresh_state()
    if _STEP_NAME.fullmatch(name):
        values = {**values, "step": folder_step(Path(name))} if source.state is None else values
        target = folder
    else:
        target = step_folder(folder / "checkpoints", values["step"])
        target.mkdir(parents=True)
        for file in source.files:
            shutil.copyfile(file, folder / file.name)
        if config_yaml is not None:
            with atomic_write(folder / "config.yaml") as out:
                out.write(config_yaml)
    tensors = {tensor: one_rectangle(stream.entry(tensor), partial(stream.read, tensor)) for tensor in source.entries}
    if not source.has_optimizer:
        tensors.update(_zero_states(source))
    files = write_dcp(target, tensors)
    write_small_files(target, values | {"config": source.config}, source.files, files)


def fresh_state() -> dict[str, Any]:
    """Return the small values of a run at step 0."""
    rng = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()
    return {
        "step": 0,
        "tokens": 0,
        "data": None,
        "skipped_in_a_row": 0,
        "engine": {"optimizer_step": 0},
        "rng": {"torch_cpu": rng},
    }


def _zero_states(source: CheckpointSource) -> dict[str, Lazy]:
    zeros: dict[str, Lazy] = {}
    for name, (shape, _) in source.entries.items():
        for state, dtype in source.state_dtypes.items():
            key = state_prefix(state) + name.removeprefix(MODEL)
            zeros[key] = one_rectangle(Entry(shape, dtype), partial(torch.zeros, shape, dtype=dtype))
    return zeros
