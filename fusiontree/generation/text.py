"""Text of tokens that arrive one by one: whole characters only, and nothing that may still be cut by a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fusiontree.utils.errors import UserError

REPLACEMENT = "\ufffd"
"""What decoders write for bytes that are no character (yet)."""


class TextStream:
    """Turns one row's tokens into text that only ever grows.

    A character may need several tokens, and a stop string several characters. Text is handed out once no later token
    can change it; the end of the row hands out the rest. Joined, the pieces are ``decode(tokens)`` cut before the
    stop string that is complete first.

    Args:
        decode: text of a list of tokens; undecodable bytes become U+FFFD.
        stop_strings: the text ends before the one that is complete first (of two, the one that began first).
        context: last tokens of the prompt; some decoders drop a leading space when nothing comes before it.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop_strings: Sequence[str] = (),
        context: Sequence[int] = (),
    ) -> None:
        if any(not stop for stop in stop_strings):
            raise UserError("a stop string is empty; it would end every text before it begins")
        self._decode = decode
        self._stops = tuple(stop_strings)
        self._settled = [] if decode(list(context)).endswith(REPLACEMENT) else list(context)
        self._pending: list[int] = []  # tokens whose last character may be unfinished
        self._given = 0  # characters of the pending tokens' text that were handed on
        self._waiting = ""  # whole characters that may be the beginning of a stop string
        self.text = ""
        """Handed out so far."""
        self.stopped = False
        """True once a stop string has appeared; later tokens are ignored."""

    def push(self, token: int) -> str:
        """Add one token; return the text that is now certain (often empty)."""
        if self.stopped:
            return ""
        self._pending.append(token)
        text = self._pending_text()
        if text.endswith(REPLACEMENT):  # an unfinished character is exactly one of these, at the end
            piece, self._given = text[self._given : -1], len(text) - 1
        else:
            piece, self._given = text[self._given :], 0
            self._settled, self._pending = self._pending, []
        return self._hand_out(piece)

    def finish(self) -> str:
        """No more tokens: return what was held back."""
        if self.stopped:
            return ""
        piece, self._given = self._pending_text()[self._given :], 0
        self._settled, self._pending = self._settled + self._pending, []
        return self._hand_out(piece, last=True)

    def _pending_text(self) -> str:
        return self._decode(self._settled + self._pending)[len(self._decode(self._settled)) :]

    def _hand_out(self, text: str, last: bool = False) -> str:
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
        """Length of the longest end of the waiting text with which a stop string begins."""
        longest = 0
        for stop in self._stops:
            for size in range(min(len(stop) - 1, len(self._waiting)), longest, -1):
                if self._waiting.endswith(stop[:size]):
                    longest = size
                    break
        return longest
