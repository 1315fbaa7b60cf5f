"""Documents from text files, folders, JSONL (plain, .gz, .zst) and Megatron corpora, one by one in a fixed order."""

from __future__ import annotations

import fnmatch
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from fusiontree.data.sources.megatron import is_megatron, read_megatron
from fusiontree.utils.errors import UserError, nearest

_JSONL = (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".ndjson.gz", ".ndjson.zst")
_CHUNK = 1 << 20
_PEEKED = 8192
"""A file with a NUL byte among its first ``_PEEKED`` bytes is not text."""


class Document(NamedTuple):
    """A text or a token sequence, and its origin."""

    content: bytes
    """The text as UTF-8, or the tokens as little-endian uint32."""
    source: str
    is_tokens: bool = False


@dataclass(frozen=True)
class CorpusOptions:
    """Which documents to read."""

    inputs: Sequence[Path]
    include: Sequence[str] = ()
    """File name patterns in folders; none means every file that is text."""
    exclude: Sequence[str] = ()
    """Patterns of file or folder names to leave out."""
    text_key: str = "text"
    """Field of a JSONL object that holds the text."""


def corpus_files(options: CorpusOptions, output: Path | None = None) -> list[Path]:
    """Return the files to read, in order, without files in ``output``.

    Raises:
        UserError: an input does not exist, or nothing matches.
    """
    files: list[Path] = []
    own = output.resolve() if output else None
    for root in options.inputs:
        if root.is_dir():
            found = sorted(p for p in root.rglob("*") if p.is_file() and _wanted(p, root, options))
            if own and root.resolve() in own.parents:
                found = [p for p in found if own not in p.resolve().parents]
            files += found
        elif root.is_file():
            files.append(root)
        else:
            near = nearest(root.name, (p.name for p in root.parent.iterdir())) if root.parent.is_dir() else ""
            raise UserError(f"input '{root}' does not exist{near}")
    files = [file for file in files if not is_megatron(file.with_suffix(".bin")) or file.suffix != ".idx"]
    if not files:
        patterns = f" matching {list(options.include)}" if options.include else ""
        raise UserError(f"no file{patterns} in {[str(p) for p in options.inputs]}")
    return files


def _wanted(path: Path, root: Path, options: CorpusOptions) -> bool:
    relative = path.relative_to(root)
    if any(fnmatch.fnmatch(part, pattern) for part in relative.parts for pattern in options.exclude):
        return False
    return not options.include or any(fnmatch.fnmatch(path.name, pattern) for pattern in options.include)


class Corpus:
    """The documents of files: each line of a JSONL file, each document of a Megatron corpus, each other file.

    Text is UTF-8; invalid bytes become the replacement character, so one bad byte does not lose a document. Files in
    folders that are not text (a NUL byte near the beginning) are left out, unless patterns selected the files.
    """

    def __init__(self, files: Sequence[Path], options: CorpusOptions) -> None:
        """Prepare; nothing is read yet."""
        self.files, self.options = files, options
        self._sizes = {file: file.stat().st_size for file in files}
        self.bytes = sum(self._sizes.values())
        """Total bytes of all files."""
        self.bytes_read = 0
        """Bytes of the files that the latest iteration has read."""
        self.left_out: list[Path] = []
        """Files that the latest iteration left out because they are not text."""

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents.

        Raises:
            UserError: a JSONL line is not an object with the text field, or a compressed file ends early or is damaged;
                the message names file and line.
        """
        self.restart()
        for file in self.files:
            yield from self.documents_of(file)

    def restart(self, files: int = 0) -> None:
        """Reset the count of bytes read, with the first ``files`` files counted as read."""
        self.bytes_read = sum(self._sizes[file] for file in self.files[:files])
        self.left_out = []

    def documents_of(self, file: Path) -> Iterator[Document]:
        """Yield the documents of one file; see :meth:`__iter__`."""
        begin = self.bytes_read
        name = os.fsencode(file).decode("utf-8", errors="replace")
        if is_megatron(file):
            for number, tokens in enumerate(read_megatron(file)):
                self.bytes_read = begin + 2 * len(tokens)  # about
                yield Document(tokens.astype("<u4").tobytes(), f"{name}:{number}", is_tokens=True)
        elif file.name.endswith(_JSONL):
            with file.open("rb") as raw:
                for number, text in _jsonl_texts(raw, file, self.options.text_key):
                    self.bytes_read = begin + raw.tell()
                    yield Document(text.encode("utf-8", errors="replace"), f"{name}:{number}")
        else:
            content = file.read_bytes()
            if b"\0" in content[:_PEEKED] and not self.options.include and file not in self.options.inputs:
                self.left_out.append(file)
            else:
                self.bytes_read = begin + len(content)
                yield Document(_valid(content), name)
        self.bytes_read = begin + self._sizes[file]


def _valid(content: bytes) -> bytes:
    """Return ``content`` with invalid UTF-8 replaced."""
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("utf-8", errors="replace").encode("utf-8")
    return content


def _jsonl_texts(raw: IO[bytes], file: Path, key: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each non-empty line of a JSONL file."""
    number = 0
    try:
        for number, line in enumerate(_text_lines(raw, file), 1):
            if line.strip():
                yield number, _text_of(line, f"{file}, line {number}", key)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{file}, after line {number}: the compressed file is damaged or cut short ({error})"
        ) from error


def _text_lines(raw: IO[bytes], file: Path) -> Iterator[str]:
    lines: Any = raw
    if file.suffix == ".gz":
        lines = gzip.GzipFile(fileobj=raw)
    elif file.suffix == ".zst":
        lines = io.BufferedReader(_ZstdFrames(raw), _CHUNK)
    return iter(io.TextIOWrapper(lines, encoding="utf-8-sig", errors="replace", newline="\n"))


class _ZstdFrames(io.RawIOBase):
    """Reads all frames of a .zst file: zstandard's reader silently stops after one frame, complete or not."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw, self._left = raw, b""
        self._error = zstandard.ZstdError
        self._begin = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._begin()
        self._inside = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        while not self._left:
            data = (self._frame.unused_data if self._frame.eof else b"") or self._raw.read(_CHUNK // 8)
            if self._frame.eof:
                self._frame, self._inside = self._begin(), False
            if not data:
                if self._inside:
                    raise EOFError("it ends inside a frame")
                return 0
            self._inside = True
            try:
                self._left = self._frame.decompress(data)
            except self._error as error:
                raise EOFError(str(error)) from error
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _text_of(line: str, place: str, key: str) -> str:
    try:
        values = json.loads(line)
        text = values[key]
    except (ValueError, KeyError, TypeError) as error:
        known = nearest(key, values) if isinstance(error, KeyError) and isinstance(values, dict) else ""
        raise UserError(f"{place}: no text under '{key}' ({error}){known}; name the field with --text-key") from error
    if not isinstance(text, str):
        raise UserError(f"{place}: '{key}' is {type(text).__name__}, not a text")
    return text
