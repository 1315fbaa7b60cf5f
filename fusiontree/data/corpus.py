"""Documents from text files, folders, JSONL (plain, .gz, .zst) and Megatron corpora, one by one in a fixed order."""

from __future__ import annotations

import fnmatch
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusiontree.data.megatron import is_megatron, read_megatron
from fusiontree.utils.errors import UserError, nearest
from fusiontree.utils.hashing import stable_hash

_JSONL = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst")


@dataclass(frozen=True)
class Document:
    """A text, or tokens that were made before, and where they came from."""

    text: str
    source: str
    tokens: np.ndarray | None = None
    """Given instead of a text by corpora that hold tokens."""

    def content(self) -> bytes:
        """What identifies the document: its text as UTF-8, or its tokens as bytes."""
        if self.tokens is not None:
            return self.tokens.astype("<u4").tobytes()
        return self.text.encode("utf-8", errors="replace")


@dataclass(frozen=True)
class CorpusOptions:
    """Which documents to read, and in which order."""

    inputs: Sequence[Path]
    include: Sequence[str] = ()
    """File name patterns in folders; none means every file."""
    exclude: Sequence[str] = ()
    """Patterns of file or folder names to leave out."""
    text_key: str = "text"
    """Field of a JSONL object that holds the text."""
    shuffle_seed: int | None = None
    """Puts the files in an order that this number decides; None keeps the order of their paths."""


def corpus_files(options: CorpusOptions) -> list[Path]:
    """Return the files to read, in order.

    Raises:
        UserError: an input does not exist, or nothing matches.
    """
    files: list[Path] = []
    for root in options.inputs:
        if root.is_dir():
            files += sorted(p for p in root.rglob("*") if p.is_file() and _wanted(p, root, options))
        elif root.is_file():
            files.append(root)
        else:
            near = nearest(root.name, (p.name for p in root.parent.iterdir())) if root.parent.is_dir() else ""
            raise UserError(f"input '{root}' does not exist{near}")
    files = [file for file in files if not is_megatron(file.with_suffix(".bin")) or file.suffix != ".idx"]
    if not files:
        patterns = f" matching {list(options.include)}" if options.include else ""
        raise UserError(f"no file{patterns} in {[str(p) for p in options.inputs]}")
    if options.shuffle_seed is not None:
        seed = options.shuffle_seed
        # Keyed by name and place in the list, not by the absolute path: a copy elsewhere gives the same order.
        keys = {file: stable_hash("files", seed, file.name, index) for index, file in enumerate(files)}
        files.sort(key=keys.__getitem__)
    return files


def _wanted(path: Path, root: Path, options: CorpusOptions) -> bool:
    relative = path.relative_to(root)
    if any(fnmatch.fnmatch(part, pattern) for part in relative.parts for pattern in options.exclude):
        return False
    return not options.include or any(fnmatch.fnmatch(path.name, pattern) for pattern in options.include)


def read_documents(files: Sequence[Path], text_key: str) -> Iterator[Document]:
    """Yield the documents of ``files``: each line of a JSONL file, each of a Megatron corpus, else the whole file.

    Text is UTF-8; bytes that are not become the replacement character, so no document is lost to one bad byte.

    Raises:
        UserError: a JSONL line is no object with the text field; file and line are named.
    """
    for file in files:
        if is_megatron(file):
            for number, tokens in enumerate(read_megatron(file)):
                yield Document("", f"{file}:{number}", tokens)
        elif file.name.endswith(_JSONL):
            yield from _read_jsonl(file, text_key)
        else:
            yield Document(file.read_bytes().decode("utf-8", errors="replace"), str(file))


def _open_text(file: Path) -> io.TextIOBase:
    if file.suffix == ".gz":
        return io.TextIOWrapper(gzip.open(file), encoding="utf-8", errors="replace")
    if file.suffix == ".zst":
        import zstandard

        return io.TextIOWrapper(zstandard.open(file, "rb"), encoding="utf-8", errors="replace")
    return file.open(encoding="utf-8", errors="replace")


def _read_jsonl(file: Path, text_key: str) -> Iterator[Document]:
    with _open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                text = values[text_key]
            except (ValueError, KeyError, TypeError) as error:
                known = nearest(text_key, values) if isinstance(error, KeyError) and isinstance(values, dict) else ""
                raise UserError(
                    f"{file}, line {number}: no text under '{text_key}' ({error}){known}; name the field with "
                    f"--text-key"
                ) from error
            if not isinstance(text, str):
                raise UserError(f"{file}, line {number}: '{text_key}' is {type(text).__name__}, not a text")
            yield Document(text, f"{file}:{number}")
