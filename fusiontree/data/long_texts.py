"""Encodes long texts in pieces, with the tokens of the whole text.

The tokenizers library needs about 200 bytes of memory per byte of text. Neighbouring pieces overlap; where both have
the same tokens at the same characters, one continues the other. If they never agree, larger pieces are tried.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

PIECE_BYTES = 1 << 18
"""Texts up to this size are encoded at once."""
_OVERLAP = 1 << 12
"""Bytes by which pieces overlap."""
_LINE_END = re.compile(rb"[!-~]\n(?=[!-~])")
_AGREE = 16
"""Tokens before and after a place that must be equal in both pieces."""


def encode_long(backend: Any, text: bytes) -> np.ndarray:
    """Return the tokens of a text, given as valid UTF-8, as the tokenizer ``backend`` encodes it at once."""
    scale = 1
    while PIECE_BYTES * scale < len(text):
        found = _in_pieces(backend, text, PIECE_BYTES * scale, _OVERLAP * scale)
        if found is not None:
            return found
        scale *= 4
    return _ids(backend.encode_batch_fast([text.decode("utf-8")], add_special_tokens=False)[0])


def _in_pieces(backend: Any, text: bytes, size: int, overlap: int) -> np.ndarray | None:
    """Return the tokens, or None if two neighbouring pieces do not agree anywhere in their overlap."""
    parts: list[np.ndarray] = []
    before, characters, begin = None, 0, 0
    for piece, shared in _pieces(text, size, overlap):
        after = backend.encode_batch([piece], add_special_tokens=False)[0]
        if before is not None:
            place = _common_place(before, characters - shared, after, shared)
            if place is None:
                return None
            parts.append(_ids(before)[begin : place[0]])
            begin = place[1]
        before, characters = after, len(piece)
    parts.append(_ids(before)[begin:])
    return np.concatenate(parts)


def _pieces(text: bytes, size: int, overlap: int) -> Iterator[tuple[str, int]]:
    """Yield each piece and the number of characters that it shares with the piece before."""
    begin, shared = 0, 0
    while True:
        end = _character_start(text, begin + size)
        yield text[begin:end].decode("utf-8"), shared
        if end == len(text):
            return
        begin = _character_start(text, end - overlap)
        shared = len(text[begin:end].decode("utf-8"))


def _character_start(text: bytes, place: int) -> int:
    """Return ``place`` or the next index at which a character starts; the length of the text beyond its end."""
    while place < len(text) and text[place] & 0xC0 == 0x80:
        place += 1
    return min(place, len(text))


def _ids(encoding: Any) -> np.ndarray:
    return np.frombuffer(array("I", encoding.ids), dtype=np.uint32)


def _common_place(left: Any, offset: int, right: Any, shared: int) -> tuple[int, int] | None:
    """Return indices of tokens in ``left`` and ``right`` from which both are the same, nearest to the overlap's middle.

    Args:
        left: encoding of a piece.
        offset: character of ``left`` at which the overlap begins.
        right: encoding of the next piece, which begins with the overlap.
        shared: characters of the overlap.
    """
    lefts = _spans(left, offset, offset + shared)
    rights = _spans(right, 0, shared)
    at = {start: index for index, (start, _, _) in reversed(list(enumerate(rights)))}
    found: list[tuple[int, int, int]] = []
    for index in range(_AGREE, len(lefts) - _AGREE):
        start = lefts[index][0]
        other = at.get(start)
        if other is None or other < _AGREE or lefts[index - 1][1] > start:
            continue
        if lefts[index - _AGREE : index + _AGREE] == rights[other - _AGREE : other + _AGREE]:
            found.append((abs(start - shared // 2), index, other))
    if not found:
        return None
    _, index, other = min(found)
    return len(left) - len(lefts) + index, other


def _spans(encoding: Any, begin: int, end: int) -> list[tuple[int, int, int]]:
    """Return start, end and id of the tokens from character ``begin`` on, up to ``end``, relative to ``begin``."""
    low, high = 0, len(encoding)
    while low < high:
        middle = (low + high) // 2
        if encoding.token_to_chars(middle)[0] < begin:
            low = middle + 1
        else:
            high = middle
    spans, ids = [], encoding.ids
    for index in range(low, len(encoding)):
        start, stop = encoding.token_to_chars(index)
        if start >= end:
            break
        spans.append((start - begin, stop - begin, ids[index]))
    return spans


def cut_at_lines(text: bytes) -> Iterator[bytes]:
    """Yield a text in pieces, each ending with a line end between two characters that are no white space.

    There a byte-level BPE divides the text anyway, so that training on the pieces gives the same tokenizer.
    """
    begin = 0
    while found := _LINE_END.search(text, begin + PIECE_BYTES):
        yield text[begin : found.end()]
        begin = found.end()
    yield text[begin:]


def count_dropped(backend: Any, text: bytes) -> int:
    """Return how many characters of ``text``, without white space, a BPE without unknown token leaves out."""
    whole = text.decode("utf-8")
    if backend.normalizer is not None:
        whole = backend.normalizer.normalize_str(whole)
    byte_level = backend.pre_tokenizer is not None and "ByteLevel" in repr(backend.pre_tokenizer)
    lost = 0
    for character in set(whole):
        symbols = _byte_symbols(character) if byte_level else character
        if not character.isspace() and any(backend.model.token_to_id(s) is None for s in symbols):
            lost += whole.count(character)
    return lost


def _byte_symbols(character: str) -> str:
    """Return the printable characters that stand for the bytes of ``character`` in byte-level tokenizers."""
    from tokenizers import pre_tokenizers

    return "".join(part for part, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(character))
