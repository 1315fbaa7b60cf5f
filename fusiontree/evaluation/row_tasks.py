"""Tasks whose answer is spread over the row: chains of assignments, and the commonest words of a list."""

from __future__ import annotations

import math

from fusiontree.evaluation.sentence_tasks import SentenceRow, SentenceTask, single_values, spread_depths
from fusiontree.evaluation.sentences import Question, Writer, fill, hide, room_for
from fusiontree.evaluation.tasks import Setup
from fusiontree.utils.errors import UserError


class VariableTracking(SentenceTask):
    """Chains of assignments; asks for all variables that have a value. Other chains have the wrong answers."""

    name = "variable_tracking"

    def row(self, setup: Setup, writer: Writer, length: int, depth: float) -> SentenceRow:
        """Return the row."""
        size, choices = setup.config.hops + 1, setup.config.distractors + 1
        names, values = writer.words(size * choices), writer.numbers(choices)
        chains = [names[choice * size : (choice + 1) * size] for choice in range(choices)]
        needles, depths = [], []
        for chain, value in zip(chains, values, strict=True):
            for name, source in zip(chain, [value, *chain], strict=False):
                needles.append(
                    (*writer.encode(f"\nSet {name} to"), *writer.encode(" " + source), *writer.encode(".\n"))
                )
            depths += spread_depths(writer, size)
        answers = [[(writer.listing(chain), True)] for chain in chains]
        question = Question(writer.joined("\nThe variables that are", " " + values[0], " are"), answers)
        units = fill(writer.noise(), room_for(length, question, needles, self.name))
        return SentenceRow(hide(units, needles, depths), question, math.perm(len(names), size))


class CommonWords(SentenceTask):
    """A list of words of which one occurs ten times as often as any other; these are the wrong answers."""

    name = "common_words"

    def row(self, setup: Setup, writer: Writer, length: int, depth: float) -> SentenceRow:
        """Return the row."""
        choices = setup.config.distractors + 1
        words = writer.words(max(choices, 100))
        answers = single_values(writer, words[:choices])
        question = Question(writer.encode("\nThe word that occurs most often is"), answers)
        room = room_for(length, question, [], self.name)
        count = room // len(writer.encode(" " + words[0]))
        times = max(2, count // 10)
        rarely = max(1, times // 10)
        others = [word for word in words[1:] for _ in range(rarely)][: max(0, count - times)]
        if len(others) < max(1, choices - 1):
            raise UserError(f"a row of {length} tokens is too short for the list of task {self.name}")
        sequence = [words[0]] * (count - len(others)) + others
        return SentenceRow(_list_of(writer, sequence, room), question, len(set(sequence)))


class FrequentWords(SentenceTask):
    """A list of words by Zipf's law, asked for its three most frequent; rarer ones are the wrong answers."""

    name = "frequent_words"

    def row(self, setup: Setup, writer: Writer, length: int, depth: float) -> SentenceRow:
        """Return the row."""
        choices = setup.config.distractors + 1
        words = writer.words(max(3 * choices, 24))
        lists = [words[3 * choice : 3 * choice + 3] for choice in range(choices)]
        question = Question(
            writer.encode("\nThe three words that occur most often, from first to third, are"),
            [[(writer.listing(three), True)] for three in lists],
        )
        room = room_for(length, question, [], self.name)
        count = room // len(writer.encode(" " + words[0]))
        shares_of_words = [1 / (rank + 1) ** 2 for rank in range(len(words))]
        times = [max(1, int(count * share / sum(shares_of_words))) for share in shares_of_words]
        times[0] += count - sum(times)
        if not times[0] > times[1] > times[2] > times[3]:
            raise UserError(f"a row of {length} tokens is too short for the list of task {self.name}")
        sequence = [word for word, number in zip(words, times, strict=True) for _ in range(number)]
        return SentenceRow(_list_of(writer, sequence, room), question, math.perm(len(words), 3))


def _list_of(writer: Writer, sequence: list[str], room: int) -> list[int]:
    """Return the words in random order as exactly ``room`` tokens; the first may be the end of a noise sentence."""
    writer.random.shuffle(sequence)
    tokens = [token for word in sequence for token in writer.encode(" " + word)]
    lead = [token for unit in fill(writer.noise(), room - len(tokens)) for token in unit]
    return lead + tokens
