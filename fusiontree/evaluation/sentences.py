"""Writes the sentences of retrieval tasks with any tokenizer: made-up words, numbers, needles, noise, questions.

A row is put together from separately encoded pieces, so that its length in tokens, the place of a needle and the tokens
of an answer are exact, and a question has the same tokens as the needle that answers it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from fusiontree.data.tokenizers import Tokenizer
from fusiontree.utils.errors import UserError
from fusiontree.utils.hashing import stable_hash

Tokens = tuple[int, ...]

NOISE = (
    " The mill stands by the river.",
    " Rain fell on the roof all night.",
    " A path leads from the gate to the hill.",
    " Most of the bread was sold before noon.",
    " The old clock in the hall is slow.",
    " Two boats were tied to the pier.",
    " Nobody had opened the window that day.",
    " Wind moved the leaves across the yard.",
)
"""Sentences of a haystack that says nothing."""
DIGITS = 6
NUMBERS = 9 * 10 ** (DIGITS - 1)
"""Count of the numbers that :meth:`Writer.numbers` draws from."""
_TRIES = 10_000


@dataclass(frozen=True)
class Question:
    """The end of a row: a question, and answers of equal length, of which the first is right.

    Each answer is a list of pieces and whether they are scored.
    """

    prompt: Tokens
    answers: list[list[tuple[Tokens, bool]]]

    def __post_init__(self) -> None:
        assert len({sum(len(piece) for piece, _ in answer) for answer in self.answers}) == 1

    @property
    def length(self) -> int:
        """Tokens of the prompt and one answer."""
        return len(self.prompt) + sum(len(piece) for piece, _ in self.answers[0])


class Writer:
    """Draws words and numbers for one row and encodes them."""

    def __init__(self, encode: Callable[[str], Tokens], *seed: int | str) -> None:
        """Start from a seed; equal seeds write equal rows with the same :func:`encoder`."""
        self.encode = encode
        self.random = random.Random(stable_hash("writer", *seed))
        self._used: set[str] = set()

    def words(self, count: int) -> list[str]:
        """Return new made-up words whose tokens, after a space, are equally many.

        Raises:
            UserError: the tokenizer does not give enough of them.
        """

        def draw() -> str:
            return "".join(self.random.choice("bdfgklmnprstvz") + self.random.choice("aeiou") for _ in range(3))

        return self._alike(count, draw)

    def numbers(self, count: int) -> list[str]:
        """Return new numbers of six digits whose tokens, after a space, are equally many.

        Raises:
            UserError: the tokenizer does not give enough of them.
        """
        return self._alike(count, lambda: str(self.random.randrange(10 ** (DIGITS - 1), 10**DIGITS)))

    def _alike(self, count: int, draw: Callable[[], str]) -> list[str]:
        found: dict[int, list[str]] = {}
        for _ in range(_TRIES + count):
            text = draw()
            if text in self._used:
                continue
            self._used.add(text)
            alike = found.setdefault(len(self.encode(" " + text)), [])
            alike.append(text)
            if len(alike) == count:
                return alike
        raise UserError(
            f"the tokenizer gives no {count} made-up words or numbers of equally many tokens; ask for fewer needles, "
            f"distractors or shorter rows"
        )

    def joined(self, *pieces: str) -> Tokens:
        """Return the tokens of pieces, each encoded by itself."""
        return tuple(token for piece in pieces for token in self.encode(piece))

    def needle(self, key: str, value: str) -> Tokens:
        """Return the sentence that tells the code of ``key``, on a line of its own."""
        return (*self.code_of(key), *self.joined(" " + value, ".\n"))

    def code_of(self, key: str) -> Tokens:
        """Return the needle up to its value, which is also the question for it."""
        return self.encode(f"\nThe code of {key} is")

    def listing(self, items: Sequence[str]) -> Tokens:
        """Return items separated by commas."""
        first, *others = items
        return self.joined(" " + first, *(piece for item in others for piece in (",", " " + item)))

    def noise(self) -> Iterator[Tokens]:
        """Yield sentences without end."""
        while True:
            yield from (self.encode(sentence) for sentence in NOISE)


def encoder(tokenizer: Tokenizer) -> Callable[[str], Tokens]:
    """Return a tokenizer's encoding of short texts, which remembers recent ones."""

    @lru_cache(maxsize=65536)
    def encode(text: str) -> Tokens:
        return tuple(tokenizer.encode(text))

    return encode


def fill(units: Iterator[Tokens], room: int) -> list[Tokens]:
    """Return units of exactly ``room`` tokens together; the first is the end of one that does not fit."""
    found: list[Tokens] = []
    left = room
    while left:
        unit = next(units)
        if len(unit) > left:
            found.insert(0, unit[-left:])
            break
        found.append(unit)
        left -= len(unit)
    return found


def hide(units: list[Tokens], needles: Sequence[Tokens], depths: Sequence[float]) -> list[int]:
    """Return the tokens of ``units`` with needles between them, each at its share of the units' tokens."""
    total = sum(map(len, units))
    waiting = sorted(zip(depths, range(len(needles)), strict=True))
    tokens: list[int] = []
    passed = 0
    for unit in [*units, ()]:
        # Before the unit in which the depth lies; depth 1 comes after all units.
        while waiting and round(waiting[0][0] * total) < passed + max(1, len(unit)):
            tokens += needles[waiting.pop(0)[1]]
        tokens += unit
        passed += len(unit)
    assert not waiting
    return tokens


def room_for(length: int, question: Question, needles: Sequence[Tokens], task: str) -> int:
    """Return how many tokens of a row of ``length`` (and its last label) remain for the haystack.

    Raises:
        UserError: none remain.
    """
    needed = question.length + sum(map(len, needles))
    if length + 1 < needed:
        raise UserError(f"a row of {length} tokens does not hold the sentences of task {task}, which need {needed - 1}")
    return length + 1 - needed
