"""Divides a corpus into training and validation documents, before anything is tokenized.

A document's split depends on the hash of its text and the seed alone. If that leaves a split without documents, one
document is moved there; if none is small enough, the end of the longest document is the split.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator

from fusiontree.data.build.corpus import Document
from fusiontree.data.build.options import BuildOptions
from fusiontree.utils.errors import UserError
from fusiontree.utils.hashing import stable_hash

_DIGEST_BYTES = 16


def digest_of(document: Document) -> bytes:
    """Return the hash of a document's content."""
    return hashlib.blake2b(document.content, digest_size=_DIGEST_BYTES).digest()


class Split:
    """Assigns documents to the folders of a build."""

    def __init__(self, options: BuildOptions) -> None:
        """Assign by hash alone; see :func:`plan_split`."""
        self._options = options
        self.moved: tuple[bytes, str] | None = None
        """Digest of a document that is assigned to the named split whatever its hash."""
        self.divided: tuple[bytes, float] | None = None
        """Digest of a document of which this fraction, at its end, is the validation split."""

    def name(self, digest: bytes) -> str:
        """Return the split of a document that is not divided."""
        splits = self._options.splits
        if len(splits) == 1:
            return splits[0]
        if self.moved is not None and self.moved[0] == digest:
            return self.moved[1]
        draw = stable_hash("split", self._options.seed, digest.hex()) / 2**64
        return "validation" if draw < self._options.validation_fraction else "train"

    def parts(self, document: Document, digest: bytes) -> Iterator[tuple[str, Document]]:
        """Yield the document with its split, or both parts of the divided document."""
        if self.divided is None or self.divided[0] != digest:
            yield self.name(digest), document
            return
        place = dividing_place(document, self.divided[1])
        yield "train", document._replace(content=document.content[:place])
        yield "validation", document._replace(content=document.content[place:], source=f"{document.source} (end)")


def plan_split(options: BuildOptions, documents: Iterable[Document], report: Callable[[str], object]) -> Split:
    """Return the split of a corpus of which every folder gets documents.

    Reads documents until both splits have one, which for a large corpus is soon.

    Args:
        options: of the build.
        documents: of the corpus.
        report: called with a line if the hashes alone left a split empty.

    Raises:
        UserError: the corpus has no text, or too little for two splits.
    """
    split = Split(options)
    if len(options.splits) == 1:
        return split
    sizes, digests, names = array("q"), bytearray(), set()
    longest = Document(b"", "")
    for document in documents:
        if not document.content:
            continue
        digest = digest_of(document)
        names.add(split.name(digest))
        if len(names) == len(options.splits):
            return split
        sizes.append(len(document.content))
        digests += digest
        longest = max(longest, document, key=lambda d: len(d.content))
    if not sizes:
        raise UserError("the inputs hold no text; nothing was built")
    empty = "train" if "validation" in names else "validation"
    fraction = options.validation_fraction
    total, wanted = sum(sizes), (fraction if empty == "validation" else 1 - fraction) * sum(sizes)
    best = min(range(len(sizes)), key=lambda i: (abs(sizes[i] - wanted), i))
    found = bytes(digests[_DIGEST_BYTES * best : _DIGEST_BYTES * (best + 1)])
    copies = sum(digests[i : i + _DIGEST_BYTES] == found for i in range(0, len(digests), _DIGEST_BYTES))
    if copies < len(sizes) and 2 * sizes[best] * copies <= total:
        split.moved = found, empty
        report(f"no document falls into '{empty}' by its hash; one of {sizes[best]:,} bytes is moved there")
        return split
    split.divided = digest_of(longest), fraction
    place = dividing_place(longest, fraction)
    size = len(longest.content)
    if not 0 < place < size:
        raise UserError(
            f"the inputs hold too little text for --validation-fraction {fraction}: their longest document, "
            f"{longest.source}, has {size} bytes; give more text, or leave out --validation-fraction"
        )
    report(f"no document falls into '{empty}' by its hash; {longest.source} is divided at byte {place:,} of {size:,}")
    return split


def dividing_place(document: Document, fraction: float) -> int:
    """Return the byte at which the last ``fraction`` of a document begins, or up to twice as much, after a line end."""
    content, size = document.content, len(document.content)
    if document.is_tokens:
        return 4 * min(max(1, size // 4 - round(size // 4 * fraction)), size // 4 - 1)
    place = min(max(1, size - round(size * fraction)), size - 1)
    line = content.rfind(b"\n", max(0, 2 * place - size), place) + 1
    if line:
        return line
    while place > 0 and content[place] & 0xC0 == 0x80:
        place -= 1
    return place
