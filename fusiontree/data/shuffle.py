"""The documents of a corpus of any size in a random order: written to buckets by key, then sorted bucket by bucket.

A document's key is a hash of seed and number, so the order depends on neither buckets nor restarts.

    FOLDER/bucket-000    documents whose keys lie in one range, as they came
    FOLDER/state.json    which files are in the buckets for good, and how long the buckets were then
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

from fusiontree.data.corpus import Corpus, Document
from fusiontree.data.progress import Progress
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import atomic_write, fsync_directory
from fusiontree.utils.hashing import stable_hash

_HEADER = struct.Struct("<QQI?")
"""Key, bytes of content, bytes of source, whether the content is tokens."""
_MOST_BUCKETS = 256
"""All are open at once. A corpus that needs more gets larger ones, of which only the keys are kept in memory."""
_BUCKET_BYTES = 64 << 20
_PACKED = 6
"""What compressed text is taken to grow by, to choose the number of buckets."""


class ShuffledCorpus:
    """A corpus in the order of its documents' keys."""

    def __init__(
        self, corpus: Corpus, folder: Path, seed: int, *, bucket_bytes: int = _BUCKET_BYTES, save_bytes: int = 1 << 30
    ) -> None:
        """Prepare.

        Args:
            corpus: what to shuffle.
            folder: where to keep the documents meanwhile; it takes as much room as their text.
            seed: decides the order.
            bucket_bytes: text of a bucket, as far as that can be foreseen; does not change the order.
            save_bytes: how much is read again, at most about, after a kill.
        """
        self.corpus, self.folder, self.seed, self._save_bytes = corpus, folder, seed, save_bytes
        packed = any(file.suffix in (".gz", ".zst") for file in corpus.files)
        self._text_bytes = corpus.bytes * (_PACKED if packed else 1)
        self.buckets = max(1, min(_MOST_BUCKETS, self._text_bytes // bucket_bytes))
        self.bytes = 0
        """What the buckets hold."""
        self.bytes_read = 0
        """Of the buckets, by the latest iteration."""

    def fill(self, progress: Progress) -> None:
        """Write the documents to the buckets, unless that was done; go on where a killed process was.

        Args:
            progress: told how much of the corpus is read.

        Raises:
            UserError: the disk has no room, or a document cannot be read.
        """
        state = self._saved_state()
        if state["files"] < len(self.corpus.files):
            self._check_room(sum(state["sizes"]))
            self._fill_on(state, progress)
            progress.end()
            state = self._saved_state()
        self.bytes = sum(state["sizes"])

    def _fill_on(self, state: dict[str, Any], progress: Progress) -> None:
        number, saved = state["documents"], sum(state["sizes"])
        written = saved
        self.corpus.restart(state["files"])
        progress.add(self.corpus.bytes_read, skipped=True)
        with ExitStack() as stack:
            buckets = [stack.enter_context(self._path(b).open("ab", 1 << 18)) for b in range(self.buckets)]
            for bucket, size in zip(buckets, state["sizes"], strict=True):
                bucket.truncate(size)  # behind it is what a killed process wrote
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
        """Return how far the buckets were filled; of another corpus, they are removed."""
        if self._state.exists():
            state = json.loads(self._state.read_text())
            if state["corpus"] == self._identity():
                return state
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return {"files": 0, "documents": 0, "sizes": [0] * self.buckets}

    def _identity(self) -> str:
        """Hash of all that the buckets depend on."""
        state = hashlib.sha256(json.dumps([self.seed, self.buckets, self.corpus.options.text_key]).encode())
        for file in self.corpus.files:
            stat = file.stat()
            state.update(os.fsencode(file) + struct.pack("<qq", stat.st_size, stat.st_mtime_ns))
        return state.hexdigest()

    def _check_room(self, have: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if self._text_bytes - have > free:
            raise UserError(
                f"shuffling writes all documents to '{self.folder}' first, about {self._text_bytes / 1e9:.1f} GB, and "
                f"{free / 1e9:.1f} GB are free there; name an --output with more room, or do without --shuffle"
            )

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents; :meth:`fill` comes first."""
        self.bytes_read = 0
        for bucket in range(self.buckets):
            with self._path(bucket).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                if not size:
                    continue
                # Pages of the file leave the memory as others are wanted; only keys and places are kept.
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
