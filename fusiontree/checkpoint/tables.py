"""Writes ``.metadata`` and the index, which describe a checkpoint's tensors, from what the ranks have written."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch.distributed as dist

from fusiontree.checkpoint.exchange import Rounds, gather_to_first, numbered
from fusiontree.checkpoint.hashed_file import TableFile
from fusiontree.checkpoint.index import IndexFile
from fusiontree.checkpoint.manifest import FileEntry
from fusiontree.checkpoint.metadata_file import MetadataFile
from fusiontree.checkpoint.rows import Tensors, in_order, row_type, rows_of
from fusiontree.checkpoint.write_files import Written

Files = dict[str, FileEntry]
"""Entries of the manifest, by file name."""


def gather_tables(
    folder: Path, tensors: Tensors, written: Sequence[Written], group: dist.ProcessGroup | None
) -> Files | None:
    """Write the tables on rank 0, from the files that each rank has written; a collective call.

    Returns:
        The manifest's entries on rank 0; None elsewhere.

    Raises:
        OSError: on rank 0: the disk is full …
    """
    listed = gather_to_first([(part.name, part.size) for part in written], group)
    rounds = Rounds(written_rows(written, tensors), len(tensors), group).gathered()
    try:
        if listed is None:
            return None
        files = {name: size for part in listed for name, size in part}
        before = np.cumsum([0, *map(len, listed)], dtype=np.uint32)
        return write_tables(folder, tensors, files, (_joined(rows, before) for rows in rounds if rows is not None))
    finally:
        deque(rounds, maxlen=0)  # all ranks take part in all rounds, whatever happened here


def _joined(gathered: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the rows of a round in order; ``before[rank]`` files belong to the ranks before it."""
    rows, ranks = numbered(gathered)
    rows["file"] += before[ranks]
    return rows[in_order(rows)]


def written_rows(written: Sequence[Written], tensors: Tensors) -> np.ndarray:
    """Return the rectangles in ``written`` as rows, in order; files are numbered in the order of ``written``."""
    numbers = {name: number for number, name in enumerate(tensors)}
    chunks = [(numbers[name], file, chunk) for file, part in enumerate(written) for name, chunk in part.chunks]
    kind = row_type(shape for shape, _ in tensors.values())
    rows = rows_of([(number, chunk.offset, chunk.shape) for number, _, chunk in chunks], kind)
    if chunks:
        rows["file"] = [file for _, file, _ in chunks]
        rows["start"] = [chunk.start for _, _, chunk in chunks]
        rows["length"] = [chunk.length for _, _, chunk in chunks]
        digests = b"".join(bytes.fromhex(chunk.digest or "") for _, _, chunk in chunks)
        rows["digest"] = np.frombuffer(digests, np.uint8).reshape(-1, 32)
    return rows[in_order(rows)]


def write_tables(
    folder: Path, tensors: Tensors, files: Mapping[str, int], rounds: Iterable[np.ndarray], *, index: bool = True
) -> Files:
    """Write ``.metadata`` and the index: shape and dtype of each tensor, and the places of its rectangles in files.

    Args:
        folder: of the checkpoint.
        tensors: all tensors.
        files: name and size of each tensor file, in the order of their numbers in rows.
        rounds: rows, sorted by tensor and offset; each time all rows of the next tensors.
        index: write an index, for our own reader; only ours needs one.

    Returns:
        The manifest's entries of both files and of ``files``.

    Raises:
        OSError: the disk is full …
    """
    names = list(files)
    with ExitStack() as stack:
        kinds: list[type[TableFile]] = [MetadataFile, IndexFile] if index else [MetadataFile]
        tables = [stack.enter_context(kind(folder, tensors, names)) for kind in kinds]
        for rows in rounds:
            for table in tables:
                table.add(rows)
        entries = {table.name: table.finish() for table in tables}
    return entries | {name: FileEntry(size, (), whole=False) for name, size in files.items()}
