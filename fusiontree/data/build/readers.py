"""Texts of one file: JSON lines, a JSON array, Parquet, or plain text, whole or divided at separator lines.

Each reader yields texts as UTF-8 with a number for their origin. Line ends stay as they are, and only ``\\n`` ends a
line. Bytes that are not UTF-8 become the replacement character and are counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fusiontree.utils.errors import UserError, nearest

LONGEST_DOCUMENT = 1 << 30
"""Bytes of a document. It is held in memory several times."""
_CHUNK = 1 << 20
_END_LINES = re.compile(rb"(?m)^(<\|(?:im_)?(?:end|eos|eod|eot)[a-z_]*\|>|</s>|<(?:eos|eod|EOS|EOD)>|\[EOS\])\r?$")
"""Lines that are the usual names of tokens between documents."""


class TextReader:
    """Reads the texts of one file after the other."""

    def __init__(self, key: str, separator: str | None) -> None:
        """Prepare.

        Args:
            key: field of a JSON object, or column of a Parquet file, that holds the text.
            separator: line between two documents of a text file; None makes the file one document.
        """
        self.key = key
        self.separator = None if separator is None else separator.encode("utf-8")
        self.repaired = 0
        """Texts with bytes that were not UTF-8, or with half a surrogate pair."""
        self.separators = 0
        """Separator lines found."""
        self.undivided: dict[str, tuple[int, Path]] = {}
        """Lines that are names of tokens between documents, where no separator is given: their number, and the first
        file."""

    def lines(self, stream: IO[bytes], file: Path) -> Iterator[tuple[int, bytes]]:
        """Yield number and text of each line of JSON lines that is not empty."""
        number = 0
        while line := stream.readline(LONGEST_DOCUMENT + 1):
            number += 1
            if len(line) > LONGEST_DOCUMENT:
                raise _too_long(file, f"line {number}")
            if line.strip():
                values = _parsed(self._decoded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line))
                yield number, self._text_of(values, f"{file}, line {number}")

    def array(self, stream: IO[bytes], file: Path) -> Iterator[tuple[int, bytes]]:
        """Yield number and text of each element of a JSON array, without reading all of it at once."""
        decoder, number = json.JSONDecoder(), 0
        buffer, ended, at = b"", False, 0
        text = ""
        opened = False
        while True:
            match = re.compile(r"[\s\ufeff]*\[\s*" if not opened else r"\s*").match(text, at)
            at = match.end() if match else at
            opened = opened or match is not None
            if opened and at < len(text):
                if text[at] == "]":
                    if (text[at + 1 :] + stream.read(_CHUNK).decode("utf-8", errors="replace")).strip():
                        raise UserError(f"{file}: text follows the end of its JSON array after element {number}")
                    return
                try:
                    value, end = decoder.raw_decode(text, at)
                    end = re.compile(r"\s*").match(text, end).end()  # type: ignore[union-attr]
                    complete = text[end : end + 1] in (",", "]")
                except (ValueError, RecursionError) as error:
                    complete, value, end = False, error, at
                if complete:
                    number += 1
                    if end - at > LONGEST_DOCUMENT:
                        raise _too_long(file, f"element {number}")
                    value = {self.key: value} if isinstance(value, str) else value
                    yield number, self._text_of(value, f"{file}, element {number}")
                    at = end + (text[end] == ",")
                    continue
                if ended:
                    raise UserError(f"{file}: its JSON array is damaged or cut short after element {number}")
            elif ended:
                raise UserError(f"{file}: its JSON array is damaged or cut short after element {number}")
            if len(text) - at > LONGEST_DOCUMENT:
                raise _too_long(file, f"element {number + 1}")
            # Reading as much again as is left makes the total work proportional to the size of the file.
            part = stream.read(max(_CHUNK, len(text) - at))
            ended = not part
            buffer += part
            cut = len(buffer) if ended else _whole_characters(buffer)
            text, at, buffer = text[at:] + self._decoded(buffer[:cut]), 0, buffer[cut:]

    def parquet(self, file: Path) -> Iterator[tuple[int, bytes]]:
        """Yield number and text of each row of a Parquet file."""
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(
                f"'{file}' is a Parquet file, and pyarrow is not installed; pip install 'fusiontree[parquet]'"
            ) from error
        number = 0
        try:
            with pyarrow.parquet.ParquetFile(file) as table:
                columns = table.schema_arrow.names
                if self.key not in columns:
                    raise UserError(
                        f"'{file}' has no column '{self.key}'{nearest(self.key, columns)}; name the column with "
                        f"--text-key (columns: {', '.join(columns)})"
                    )
                for batch in table.iter_batches(batch_size=256, columns=[self.key]):
                    for value in batch.column(0).to_pylist():
                        number += 1
                        yield number, self._text_of({self.key: value}, f"{file}, row {number}")
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"'{file}', after row {number}: the Parquet file is damaged ({error})") from error

    def text(self, stream: IO[bytes], file: Path) -> Iterator[tuple[int, bytes]]:
        """Yield the text of a file with number 0, or each text between separator lines with its first line's number."""
        if self.separator is None:
            content = stream.read(LONGEST_DOCUMENT + 1)
            if len(content) > LONGEST_DOCUMENT:
                raise _too_long(file, "its text")
            for line in _END_LINES.findall(content):
                count, first_file = self.undivided.get(name := line.decode(), (0, file))
                self.undivided[name] = (count + 1, first_file)
            yield 0, self._valid(content)
            return
        lines: list[bytes] = []
        number, first, size = 0, 1, 0
        while line := stream.readline(LONGEST_DOCUMENT + 1):
            number += 1
            if line.rstrip(b"\r\n") == self.separator:
                self.separators += 1
                yield first, self._valid(b"".join(lines))
                lines, first, size = [], number + 1, 0
                continue
            lines.append(line)
            size += len(line)
            if size > LONGEST_DOCUMENT:
                raise _too_long(file, f"the document from line {first} on")
        yield first, self._valid(b"".join(lines))

    def _text_of(self, values: Any, place: str) -> bytes:
        """Return the text of a JSON value as UTF-8.

        Raises:
            UserError: it has no text under the key.
        """
        try:
            if isinstance(values, Exception):
                raise values
            text = values[self.key]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            known = nearest(self.key, values) if isinstance(values, dict) else ""
            raise UserError(
                f"{place}: no text under '{self.key}' ({error}){known}; name the field with --text-key, or leave the "
                "file out with --exclude"
            ) from error
        if not isinstance(text, str):
            raise UserError(f"{place}: '{self.key}' is {type(text).__name__}, not a text")
        try:
            return text.encode("utf-8")
        except UnicodeEncodeError:  # half a surrogate pair
            self.repaired += 1
            return text.encode("utf-8", errors="replace")

    def _decoded(self, content: bytes) -> str:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            self.repaired += 1
            return content.decode("utf-8", errors="replace")

    def _valid(self, content: bytes) -> bytes:
        """Return ``content`` with invalid UTF-8 replaced."""
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            return self._decoded(content).encode("utf-8")
        return content


def _parsed(line: str) -> Any:
    """Return a line's JSON value, or the error."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return error


def _whole_characters(content: bytes) -> int:
    """Return the length of ``content`` without an incomplete character at its end."""
    for back in range(1, min(4, len(content)) + 1):
        if content[-back] & 0xC0 != 0x80:
            return len(content) - (back if content[-back] >= 0xC0 else 0)
    return len(content)


def _too_long(file: Path, what: str) -> UserError:
    return UserError(
        f"'{file}': {what} is a document of more than {LONGEST_DOCUMENT >> 30} GiB; divide it (--separator LINE names "
        "the line between the documents of a text file)"
    )
