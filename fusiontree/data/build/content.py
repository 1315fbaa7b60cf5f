"""What a file of a corpus contains, told from its bytes: compression, format of documents, or why it is no text."""

from __future__ import annotations

import bz2
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from fusiontree.utils.errors import UserError

PACKED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
_LINES_SUFFIXES = (".jsonl", ".ndjson", ".jl", ".jsonlines")
_PEEKED = 1 << 13
"""Bytes at a file's beginning that decide what it is."""
_LONGEST_LINE = 1 << 26
"""Bytes of a first line that are parsed to recognize JSON lines."""
_CHUNK = 1 << 17
_COMPRESSIONS = {
    "gz": re.compile(rb"\x1f\x8b"),
    "zst": re.compile(rb"\x28\xb5\x2f\xfd"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
}
_NO_TEXT = {
    b"PK\x03\x04": "a zip archive",
    b"ARROW1": "an Arrow file (save it as Parquet)",
    b"WARC/": "a web archive (extract its texts first)",
    b"%PDF-": "a PDF file",
    b"\x04\x22\x4d\x18": "compressed by lz4",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a": "a rar archive",
    b"Obj\x01": "an Avro file",
    b"MMIDIDX": "the index of a Megatron corpus (name its .bin)",
    b"\xff\xfe": "UTF-16 text (convert it to UTF-8)",
    b"\xfe\xff": "UTF-16 text (convert it to UTF-8)",
}
_CONTROLS = bytes({*range(32)} - set(b"\t\n\v\f\r\b\x1b"))
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Content:
    """What a file contains."""

    form: Literal["text", "lines", "array", "parquet", ""]
    """Text, JSON lines, a JSON array, Parquet, or no text."""
    packed: tuple[str, ...] = ()
    """Compressions, the outermost first."""
    reason: str = ""
    """Why it is no text."""


def recognize(file: Path, key: str, named: bool) -> Content:
    """Return what ``file`` contains.

    Args:
        file: to look into.
        key: field of a JSON object that holds the text.
        named: True if the user named this very file. JSON in a file called ``.json`` then has to be documents; in a
            folder, JSON without the field is text like any other.

    Raises:
        UserError: it is named and JSON of another form.
        PackedDamage: it is compressed and damaged near its beginning.
    """
    with file.open("rb") as raw:
        head = raw.read(_PEEKED)
    packed: list[str] = []
    while compression := next((name for name, magic in _COMPRESSIONS.items() if magic.match(head)), None):
        if len(packed) == 2:
            return Content("", tuple(packed), "compressed several times")
        packed.append(compression)
        with open_unpacked(file, packed) as stream:
            head = stream.read(_PEEKED)
    if head.startswith(b"PAR1"):
        return Content("" if packed else "parquet", tuple(packed), "a compressed Parquet file (unpack it)")
    reason = _why_no_text(head)
    if head and not reason and not packed and file.suffix.lower() in PACKED_SUFFIXES:
        reason = _why_damaged(head)
    if reason:
        return Content("", tuple(packed), reason)
    return Content(_form(file, packed, head, key, named), tuple(packed))


def _why_no_text(head: bytes) -> str:
    """Return why bytes at a file's beginning are no text; empty if they are."""
    for magic, reason in _NO_TEXT.items():
        if head.startswith(magic):
            return reason
    if head[257:262] == b"ustar":
        return "a tar archive"
    if b"\0" in head:
        return "a NUL byte near its beginning"
    if (controls := len(head) - len(head.translate(None, _CONTROLS))) > max(8, len(head) // 20):
        return f"{controls} control characters near its beginning"
    text = head.decode("utf-8", errors="replace")
    if (replaced := text.count("\ufffd") - head.count(b"\xef\xbf\xbd")) > max(64, len(text) // 4):
        return f"{replaced} bytes near its beginning that are not UTF-8 (convert other encodings)"
    return ""


def _why_damaged(head: bytes) -> str:
    """Return why a file with the name of a compressed one is not text that was unpacked already; empty if it is."""
    end = len(head) if len(head) < _PEEKED else -4  # the last character may be incomplete
    replaced = "\ufffd" in head[:end].decode("utf-8", errors="replace")
    if len(head) > 16 and not replaced and head.translate(None, _CONTROLS) == head:
        return ""
    return "its name is that of a compressed file, and its beginning is damaged or missing"


def _form(
    file: Path, packed: list[str], head: bytes, key: str, named: bool
) -> Literal["text", "lines", "array", "parquet", ""]:
    suffixes = [s.lower() for s in file.suffixes]
    suffix = next((s for s in reversed(suffixes) if s not in PACKED_SUFFIXES), "")
    begin = head.removeprefix(_BOM).lstrip()
    must = suffix in _LINES_SUFFIXES or (suffix == ".json" and named)
    if re.match(rb'\[\s*[{"]', begin):
        first = _first_element(file, packed)
        return "array" if must or (isinstance(first, dict) and key in first) else "text"
    if suffix in _LINES_SUFFIXES:
        return "lines"
    if begin.startswith(b"{"):
        first, second = _first_lines(file, packed)
        if first is None and isinstance(second, dict) and key in second:
            return "lines"  # the damage of the first line is then reported
        if isinstance(first, dict):
            several = isinstance(second, dict) and suffix == ".json"
            return "lines" if key in first or several or must else "text"
        if must:
            raise UserError(
                f"'{file}' is JSON, but neither JSON lines (one object per line) nor an array; convert it, for example "
                "with jq -c ."
            )
    return "text"


def _first_lines(file: Path, packed: list[str]) -> list[Any]:
    """Return the JSON values of the first two lines that are not empty; None where a line is no JSON value."""
    found: list[Any] = []
    with open_unpacked(file, packed) as stream:
        while len(found) < 2 and (line := stream.readline(_LONGEST_LINE)):
            if line.strip():
                try:
                    found.append(json.loads(line.decode("utf-8-sig", errors="replace")))
                except (ValueError, RecursionError):
                    found.append(None)
    return [*found, None, None][:2]


def _first_element(file: Path, packed: list[str]) -> Any:
    """Return the first element of a JSON array; None if it is not complete in the first bytes or no JSON value."""
    with open_unpacked(file, packed) as stream:
        text = stream.read(_LONGEST_LINE).decode("utf-8-sig", errors="replace")
    try:
        return json.JSONDecoder().raw_decode(text, re.search(r"\[\s*", text).end())[0]  # type: ignore[union-attr]
    except (ValueError, RecursionError):
        return None


def open_unpacked(file: Path | IO[bytes], packed: list[str] | tuple[str, ...]) -> IO[bytes]:
    """Open ``file`` for reading without its compressions, the outermost first; closing it closes the file.

    Reading raises PackedDamage where a compressed file is damaged or ends early.
    """
    stream: Any = file.open("rb") if isinstance(file, Path) else file
    for name in packed:
        stream = io.BufferedReader(_Unpacked(stream, name), _CHUNK)
    return stream


def _unpacker(name: str) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
    """Return what begins to unpack a stream of a compression, and the errors of damaged streams."""
    if name == "gz":
        return (lambda: zlib.decompressobj(wbits=31)), (zlib.error,)
    if name == "bz2":
        return bz2.BZ2Decompressor, (OSError, ValueError)
    if name == "xz":
        return (lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ)), (lzma.LZMAError,)
    import zstandard

    # Corpora are packed with windows of up to 2 GiB (zstd --long=31).
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj, (zstandard.ZstdError,)


class _Unpacked(io.RawIOBase):
    """Reads all streams of a compressed file, one after the other.

    The readers of the standard library and of zstandard stop without a word at the end of the first stream, complete
    or not, or before bytes that begin no other.
    """

    def __init__(self, raw: IO[bytes], name: str) -> None:
        self._raw, self._left, self._name = raw, b"", name
        self._begin, self._errors = _unpacker(name)
        self._stream = self._begin()
        self._inside = False

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        while not self._left:
            data = (self._stream.unused_data if self._stream.eof else b"") or self._raw.read(_CHUNK)
            if self._stream.eof:
                self._stream, self._inside = self._begin(), False
            while not self._inside and data.startswith(b"\0") and self._name in ("gz", "xz"):
                data = data.lstrip(b"\0") or self._raw.read(_CHUNK)  # padding between streams
            if not data:
                if self._inside:
                    raise PackedDamage(f"it ends inside a {self._name} stream")
                return 0
            self._inside = True
            try:
                self._left = self._stream.decompress(data)
            except self._errors as error:
                raise PackedDamage(str(error)) from error
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


class PackedDamage(Exception):
    """A compressed file is damaged or cut short."""
