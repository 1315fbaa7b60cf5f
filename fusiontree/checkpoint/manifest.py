"""SHA-256 of every file of a checkpoint, so that damage is found before it is loaded.

DCP, like most formats, notices a truncated file and loads a flipped byte silently.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fusiontree.checkpoint.folders import MANIFEST
from fusiontree.utils.files import atomic_write
from fusiontree.utils.hashing import sha256_file


class CheckpointDamage(RuntimeError):
    """A file of a checkpoint is missing or differs from its recorded hash."""


def file_entries(files: list[Path], folder: Path) -> dict[str, dict[str, int | str]]:
    """Return ``{relative name: {bytes, sha256}}`` of ``files``, which lie under ``folder``."""
    return {
        str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(files)
    }


def write_manifest(folder: Path, entries: dict[str, dict[str, int | str]]) -> None:
    """Write the manifest; its presence declares the folder complete."""
    with atomic_write(folder / MANIFEST) as file:
        json.dump({"format": "fusiontree-checkpoint", "version": 1, "files": entries}, file, indent=1, sort_keys=True)


def verify(folder: Path, threads: int = 4) -> None:
    """Check every file against the manifest.

    Raises:
        CheckpointDamage: naming the first file that is missing, of another size, or of another hash.
    """
    manifest = folder / MANIFEST
    try:
        entries = json.loads(manifest.read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointDamage(f"{manifest} cannot be read ({error}); the checkpoint is not usable") from error

    def check(item: tuple[str, dict[str, int | str]]) -> str | None:
        name, entry = item
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{file} has {file.stat().st_size} bytes, its manifest says {entry['bytes']}"
        if sha256_file(file) != entry["sha256"]:
            return f"{file} differs from the SHA-256 in its manifest"
        return None

    with ThreadPoolExecutor(threads) as pool:
        for problem in pool.map(check, sorted(entries.items())):
            if problem:
                raise CheckpointDamage(problem)
