"""Checks every file of a checkpoint against its recorded hash."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fusiontree.checkpoint.index import INDEX, TensorIndex
from fusiontree.checkpoint.manifest import (
    ByteCount,
    CheckpointDamage,
    FileEntry,
    Report,
    check_file,
    read_manifest,
)
from fusiontree.checkpoint.open_files import OpenFiles


def verify(folder: Path, threads: int = 4, report: Report | None = None) -> None:
    """Check every file against the manifest, tensor files against the index.

    Raises:
        CheckpointDamage: a file is missing, or its size or hash differs; the message names the first such file.
    """
    entries = read_manifest(folder)
    count = ByteCount(sum(entry.size for entry in entries.values()), report)
    if any(entry.indexed for entry in entries.values()) and INDEX in entries:
        check_file(folder / INDEX, entries[INDEX], count.add)
        index = TensorIndex(folder, entries, OpenFiles(folder))
        entries = {name: entry for name, entry in entries.items() if name != INDEX} | dict(_parts(index, entries))
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda item: check_file(folder / item[0], item[1], count.add), sorted(entries.items())):
            pass


def _parts(index: TensorIndex, entries: dict[str, FileEntry]) -> Iterator[tuple[str, FileEntry]]:
    """Yield the entries of the tensor files with their parts, which the index has."""
    rows = index.all_rows()
    rows = rows[np.lexsort([rows["start"], rows["file"]])]
    borders = np.searchsorted(rows["file"], range(len(index.files) + 1))
    for name, begin, end in zip(index.files, borders, borders[1:], strict=False):
        part = rows[begin:end]
        ends = np.cumsum(part["length"])
        size = entries[name].size
        if (part["start"] != ends - part["length"]).any() or (int(ends[-1]) if len(ends) else 0) != size:
            raise CheckpointDamage(f"{index.path}: the rectangles in '{name}' are not its {size} bytes")
        digests = (digest.tobytes().hex() for digest in part["digest"])
        yield name, FileEntry(size, tuple(zip(part["length"].tolist(), digests, strict=True)), whole=False)
