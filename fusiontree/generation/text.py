"""Text of tokens that arrive one by one: full characters only, and no text that a stop string can still remove."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fusiontree.utils.errors import UserError

REPLACEMENT = "\ufffd"
"""Decoders write this character for bytes that do not form a character."""


class TextStream:
    """Turns one row's tokens into text that only grows.

    A character may need several tokens, and a stop string several characters. Text is returned once no later token can
    change it; the end of the row returns the rest. All returned text together is ``decode(tokens)`` up to the stop
    string that is complete first.

    Args:
        decode: returns the text of a list of tokens, with U+FFFD for bytes that it cannot decode.
        stop_strings: the text ends before the stop string that is complete first (of two, that which began first).
        context: last tokens of the prompt; some decoders drop a leading space at the start of a text.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop_strings: Sequence[str] = (),
        context: Sequence[int] = (),
    ) -> None:
        if any(not stop for stop in stop_strings):
            raise UserError("a stop string is empty; it would end every text at once")
        self._decode = decode
        self._stops = tuple(stop_strings)
        self._settled = [] if decode(list(context)).endswith(REPLACEMENT) else list(context)
        self._pending: list[int] = []  # tokens whose last character may be incomplete
        self._given = 0  # characters of the pending tokens' text that were returned or wait
        self._waiting = ""  # full characters that may begin a stop string
        self.text = ""
        """All returned text."""
        self.stopped = False
        """True once a stop string has appeared; later tokens are ignored."""

    def push(self, token: int) -> str:
        """Add a token; return the text that no later token can change (often empty)."""
        if self.stopped:
            return ""
        self._pending.append(token)
        text = self._pending_text()
        if text.endswith(REPLACEMENT):
            # An incomplete character is one or several U+FFFD at the end: byte-level decoders write one, byte-fallback
            # decoders one per byte, and for complete characters of bytes before it too.
            certain = max(self._given, len(text.rstrip(REPLACEMENT)))
            piece, self._given = text[self._given : certain], certain
        else:
            piece, self._given = text[self._given :], 0
            self._settled, self._pending = self._pending, []
        return self._release(piece)

    def finish(self) -> str:
        """End the row; return the withheld text."""
        if self.stopped:
            return ""
        piece, self._given = self._pending_text()[self._given :], 0
        self._settled, self._pending = self._settled + self._pending, []
        return self._release(piece, last=True)

    def _pending_text(self) -> str:
        return self._decode(self._settled + self._pending)[len(self._decode(self._settled)) :]

    def _release(self, text: str, last: bool = False) -> str:
        self._waiting += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._waiting.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain = self._waiting[: min(found)[1]]
        elif last:
            certain = self._waiting
        else:
            certain = self._waiting[: len(self._waiting) - self._possible_stop()]
        self._waiting = self._waiting[len(certain) :]
        self.text += certain
        return certain

    def _possible_stop(self) -> int:
        """Return the length of the longest end of the waiting text that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._waiting)), longest, -1):
                if self._waiting.endswith(stop[:size]):
                    longest = size
                    break
        return longest
