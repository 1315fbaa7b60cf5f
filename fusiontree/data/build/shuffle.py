"""Shuffles the documents of a corpus of any size: writes them to buckets by key, then sorts bucket by bucket.

A document's key is a hash of seed and document number, so the order depends on neither buckets nor restarts.

    FOLDER/bucket-000    documents with keys in one range, in order of arrival
    FOLDER/state.json    files that are completely in the buckets, and the lengths of the buckets at that time
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np

from fusiontree.data.build.content import PACKED_SUFFIXES
from fusiontree.data.build.corpus import Corpus, Document
from fusiontree.data.build.progress import BuildProgress
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import atomic_write, fsync_directory
from fusiontree.utils.hashing import stable_hash

_HEADER = struct.Struct("<QQI?")
"""Key, bytes of content, bytes of source, whether the content is tokens."""
_MOST_BUCKETS = 256
"""All buckets are open at once. A larger corpus gets larger buckets; only a bucket's keys are kept in memory."""
_BUCKET_BYTES = 64 << 20
_PACKED = 6
"""Assumed compression ratio of compressed text, to choose the number of buckets."""


class ShuffledCorpus:
    """A corpus in the order of its documents' keys."""

    def __init__(
        self, corpus: Corpus, folder: Path, seed: int, *, bucket_bytes: int = _BUCKET_BYTES, save_bytes: int = 1 << 30
    ) -> None:
        """Prepare.

        Args:
            corpus: to shuffle.
            folder: for the buckets; needs as much disk space as the text.
            seed: determines the order.
            bucket_bytes: approximate bytes of text per bucket; does not change the order.
            save_bytes: bytes between two saves of the state: about the maximum that is read again after a kill.
        """
        self.corpus, self.folder, self.seed, self._save_bytes = corpus, folder, seed, save_bytes
        packed = any(file.suffix in (*PACKED_SUFFIXES, ".parquet") for file in corpus.files)
        self._text_bytes = corpus.bytes * (_PACKED if packed else 1)
        self.buckets = max(1, min(_MOST_BUCKETS, self._text_bytes // bucket_bytes))
        self.bytes = 0
        """Total bytes of the buckets."""
        self.bytes_read = 0
        """Bytes of the buckets that the latest iteration has read."""

    def fill(self, progress: BuildProgress) -> None:
        """Write the documents to the buckets, unless already done; continue where a killed process stopped.

        Args:
            progress: receives the bytes of the corpus that were read.

        Raises:
            UserError: the disk has not enough space, or a document cannot be read.
        """
        state = self._saved_state()
        if state["files"] < len(self.corpus.files):
            self._check_room(sum(state["sizes"]))
            self._fill_on(state, progress)
            progress.end()
            state = self._saved_state()
        self.bytes = sum(state["sizes"])

    def _fill_on(self, state: dict[str, Any], progress: BuildProgress) -> None:
        number, saved = state["documents"], sum(state["sizes"])
        written = saved
        self.corpus.restart(state["files"])
        progress.add(self.corpus.bytes_read, skipped=True)
        with ExitStack() as stack:
            buckets = [stack.enter_context(self._path(b).open("ab", 1 << 18)) for b in range(self.buckets)]
            for bucket, size in zip(buckets, state["sizes"], strict=True):
                bucket.truncate(size)  # drop unsaved writes of a killed process
                bucket.seek(size)
            for done, file in enumerate(self.corpus.files[state["files"] :], state["files"] + 1):
                for content, source, is_tokens in self.corpus.documents_of(file):
                    key = stable_hash("document", self.seed, number)
                    number += 1
                    name = source.encode("utf-8")
                    header = _HEADER.pack(key, len(content), len(name), is_tokens)
                    buckets[key * self.buckets >> 64].write(b"".join((header, name, content)))
                    written += len(header) + len(name) + len(content)
                    progress.reached(self.corpus.bytes_read)
                if written - saved >= self._save_bytes or done == len(self.corpus.files):
                    saved = written
                    self._save(buckets, done, number)

    def _save(self, buckets: Sequence[IO[bytes]], files: int, documents: int) -> None:
        for bucket in buckets:
            bucket.flush()
            os.fsync(bucket.fileno())
        fsync_directory(self.folder)
        sizes = [bucket.tell() for bucket in buckets]
        values = {"corpus": self._identity(), "files": files, "documents": documents, "sizes": sizes}
        with atomic_write(self._state) as file:
            json.dump(values, file)

    def _saved_state(self) -> dict[str, Any]:
        """Return the saved state of the buckets; buckets of another corpus are removed."""
        if self._state.exists():
            state = json.loads(self._state.read_text())
            if state["corpus"] == self._identity():
                return state
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return {"files": 0, "documents": 0, "sizes": [0] * self.buckets}

    def _identity(self) -> str:
        """Hash of everything that determines the buckets."""
        options = self.corpus.options
        separator = [] if options.separator is None else [options.separator]
        state = hashlib.sha256(json.dumps([self.seed, self.buckets, options.text_key, *separator]).encode())
        for file in self.corpus.files:
            stat = file.stat()
            state.update(os.fsencode(file) + struct.pack("<qq", stat.st_size, stat.st_mtime_ns))
        return state.hexdigest()

    def _check_room(self, have: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if self._text_bytes - have > free:
            raise UserError(
                f"shuffling writes all documents to '{self.folder}' first, about {self._text_bytes / 1e9:.1f} GB, and "
                f"{free / 1e9:.1f} GB are free there; name an --output with more space, or leave out --shuffle"
            )

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents in shuffled order; call :meth:`fill` before."""
        self.bytes_read = 0
        for bucket in range(self.buckets):
            with self._path(bucket).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                if not size:
                    continue
                # The system evicts pages of the file when memory is needed; only keys and offsets are kept.
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    yield from self._sorted(content)

    def _sorted(self, content: mmap.mmap) -> Iterator[Document]:
        keys, places, place = array("Q"), array("q"), 0
        while place < len(content):
            key, size, name_size, _ = _HEADER.unpack_from(content, place)
            keys.append(key)
            places.append(place)
            place += _HEADER.size + name_size + size
        order = np.argsort(np.asarray(keys, np.uint64), kind="stable")
        starts = np.asarray(places, np.int64)
        for start in starts[order]:
            _, size, name_size, is_tokens = _HEADER.unpack_from(content, start)
            name = int(start) + _HEADER.size
            text = name + name_size
            source = content[name:text].decode("utf-8")
            self.bytes_read += _HEADER.size + name_size + size
            yield Document(content[text : text + size], source, is_tokens)

    def _path(self, bucket: int) -> Path:
        return self.folder / f"bucket-{bucket:03d}"

    @property
    def _state(self) -> Path:
        return self.folder / "state.json"
