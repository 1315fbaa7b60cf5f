"""Documents from text files, folders, JSON, Parquet and Megatron corpora, one by one in a fixed order."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fusiontree.data.build.content import PackedDamage, open_unpacked, recognize
from fusiontree.data.build.readers import TextReader
from fusiontree.data.sources.megatron import is_megatron, read_megatron
from fusiontree.utils.errors import UserError, nearest_file


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
    """Field of a JSON object, or column of a Parquet file, that holds the text."""
    separator: str | None = None
    """Line between two documents of a text file; None makes a file one document."""


def corpus_files(options: CorpusOptions, output: Path | None = None) -> list[Path]:
    """Return the files to read, in order, without files in ``output``.

    Raises:
        UserError: an input does not exist, or nothing matches.
    """
    files: list[Path] = []
    own = output.resolve() if output else None
    for root in options.inputs:
        if root.is_dir():
            found = sorted(p for p in _walk(root) if p.is_file() and _wanted(p, root, options))
            if own and root.resolve() in own.parents:
                found = [p for p in found if own not in p.resolve().parents]
            files += found
        elif root.is_file():
            files.append(root)
        elif root.exists():
            raise UserError(f"input '{root}' is neither a file nor a folder")
        else:
            raise UserError(f"input '{root}' does not exist{nearest_file(root)}")
    _refuse_overlaps(options.inputs, files)
    bins = {file for file in files if is_megatron(file)}
    files = [file for file in files if file.suffix != ".idx" or file.with_suffix(".bin") not in bins]
    if not files:
        patterns = f" matching {list(options.include)}" if options.include else ""
        raise UserError(f"no file{patterns} in {[str(p) for p in options.inputs]}")
    return files


def _refuse_overlaps(inputs: Sequence[Path], files: Sequence[Path]) -> None:
    """Raise UserError if several inputs lead to the same file: its documents would be read several times."""
    roots = {os.path.realpath(root) for root in inputs}
    real = [os.path.realpath(file) for file in files] if len(inputs) > 1 else []
    for file, place in zip(files, real, strict=False):
        reached = [root for root in inputs if file == root or root in file.parents]
        others = [root for root in roots if place == root or place.startswith(root + os.sep)]
        if len(reached) > 1 or len(others) > 1 or len(roots) < len(inputs):
            raise UserError(
                f"several --input lead to '{file}', whose documents would be read twice; name each file and folder once"
            )


def _walk(root: Path) -> Iterator[Path]:
    """Yield the files under ``root``, those of linked folders too; a folder reached in several ways is read once.

    Raises:
        OSError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    seen: set[str] = set()
    for folder, names, files in os.walk(root, followlinks=True, onerror=fail):
        place = os.path.realpath(folder)
        if place in seen:  # a link to a folder that was read or that it lies in
            names.clear()
            continue
        seen.add(place)
        # Folders before links to them, so that a document's name does not depend on its links.
        names.sort(key=lambda name: (os.path.islink(os.path.join(folder, name)), name))
        yield from (Path(folder, name) for name in files)


def _wanted(path: Path, root: Path, options: CorpusOptions) -> bool:
    relative = path.relative_to(root)
    if any(fnmatch.fnmatch(part, pattern) for part in relative.parts for pattern in options.exclude):
        return False
    return not options.include or any(fnmatch.fnmatch(path.name, pattern) for pattern in options.include)


class Corpus:
    """The documents of files: texts of JSON lines, JSON arrays, Parquet and Megatron corpora, and each other file.

    Formats and compressions are told from the content. Text is UTF-8; invalid bytes become the replacement character,
    so one bad byte does not lose a document. Files in folders that are not text are left out; a file that was named
    itself has to be text.
    """

    def __init__(self, files: Sequence[Path], options: CorpusOptions) -> None:
        """Prepare; nothing is read yet."""
        self.files, self.options = files, options
        self._sizes = {file: file.stat().st_size for file in files}
        self.bytes = sum(self._sizes.values())
        """Total bytes of all files."""
        self.restart()

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents.

        Raises:
            UserError: a JSON value is not an object with the text field, a file that was named is no text, or a file is
                damaged or ends early; the message names file and line.
        """
        self.restart()
        for file in self.files:
            yield from self.documents_of(file)

    def restart(self, files: int = 0) -> None:
        """Reset the count of bytes read, with the first ``files`` files counted as read."""
        self.bytes_read = sum(self._sizes[file] for file in self.files[:files])
        """Bytes of the files that the latest iteration has read."""
        self._from_start = files == 0
        self.left_out: list[tuple[Path, str]] = []
        """Files that the latest iteration left out because they are not text, with the reason."""
        self.reader = TextReader(self.options.text_key, self.options.separator)
        """Reads the texts of the latest iteration."""

    def notes(self) -> list[str]:
        """Return sentences on what the latest iteration left out or changed, for the user."""
        found = []
        if self.left_out:
            file, reason = self.left_out[0]
            found.append(f"{len(self.left_out):,} files are no text and were left out, {file} first: {reason}")
        if self.reader.repaired:
            found.append(f"{self.reader.repaired:,} documents had bytes that are not UTF-8, replaced by U+FFFD")
        for line, (count, file) in self.reader.undivided.items():
            found.append(
                f"{count:,} lines are '{line}' alone, in {file} first, and were read as text, so that each file is one "
                f"document: --separator '{line}' divides files there"
            )
        whole = self._from_start and self.bytes_read == self.bytes
        if self.options.separator is not None and whole and not self.reader.separators:
            found.append(f"no line of a text file is --separator {self.options.separator!r}: it divided nothing")
        return found

    def documents_of(self, file: Path) -> Iterator[Document]:
        """Yield the documents of one file; see :meth:`__iter__`."""
        begin = self.bytes_read
        name = os.fsencode(file).decode("utf-8", errors="replace")
        if is_megatron(file):
            for number, tokens in enumerate(read_megatron(file)):
                self.bytes_read = begin + 2 * len(tokens)  # about
                yield Document(tokens.astype("<u4").tobytes(), f"{name}:{number}", is_tokens=True)
        else:
            last = 0
            try:
                for last, text in self._texts(file, begin):
                    yield Document(text, f"{name}:{last}" if last else name)
            except PackedDamage as error:
                raise UserError(
                    f"{file}, after line {last}: the compressed file is damaged or cut short ({error})"
                ) from error
        self.bytes_read = begin + self._sizes[file]

    def _texts(self, file: Path, begin: int) -> Iterator[tuple[int, bytes]]:
        """Yield number and text of each document of a file that is no Megatron corpus; count the bytes read."""
        named = file in self.options.inputs
        content = recognize(file, self.options.text_key, named)
        if not content.form:
            if named:
                raise UserError(f"input '{file}' is no text: {content.reason}")
            self.left_out.append((file, content.reason))
        elif content.form == "parquet":
            yield from self.reader.parquet(file)
        else:
            read = {"text": self.reader.text, "lines": self.reader.lines, "array": self.reader.array}[content.form]
            with file.open("rb") as raw, open_unpacked(raw, content.packed) as stream:
                for number, text in read(stream, file):
                    self.bytes_read = begin + raw.tell()
                    yield number, text
