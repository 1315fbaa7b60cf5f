"""Needles in sentences: one, one among others, several values of a key, several keys, and needles in real text."""

from __future__ import annotations

from fusiontree.evaluation.sentence_tasks import SentenceRow, SentenceTask, single_values, spread_depths
from fusiontree.evaluation.sentences import NUMBERS, Question, Tokens, Writer, fill, hide, room_for
from fusiontree.evaluation.tasks import Setup


class SingleNeedle(SentenceTask):
    """One needle in sentences that say nothing; wrong answers are numbers that the row does not hold."""

    name, by_depth = "needle_single", True

    def row(self, setup: Setup, writer: Writer, length: int, depth: float) -> SentenceRow:
        """Return the row."""
        (key,), values = writer.words(1), writer.numbers(setup.config.distractors + 1)
        question = Question(writer.code_of(key), single_values(writer, values))
        needles = [writer.needle(key, values[0])]
        units = fill(writer.noise(), room_for(length, question, needles, self.name))
        return SentenceRow(hide(units, needles, [depth]), question, NUMBERS)


class MultiKeyNeedle(SentenceTask):
    """One needle among others with other keys, whose values are the wrong answers."""

    name, by_depth = "needle_multikey", True

    def row(self, setup: Setup, writer: Writer, length: int, depth: float) -> SentenceRow:
        """Return the row."""
        count = max(setup.config.needles, setup.config.distractors + 1)
        keys, values = writer.words(count), writer.numbers(count)
        answers = single_values(writer, values[: setup.config.distractors + 1])
        question = Question(writer.code_of(keys[0]), answers)
        needles = [writer.needle(key, value) for key, value in zip(keys, values, strict=True)]
        units = self.haystack(setup, writer, room_for(length, question, needles, self.name))
        depths = [depth, *(writer.random.random() for _ in keys[1:])]
        return SentenceRow(hide(units, needles, depths), question, NUMBERS)

    def haystack(self, setup: Setup, writer: Writer, room: int) -> list[Tokens]:
        """Return pieces of ``room`` tokens, between which needles may stand."""
        return fill(writer.noise(), room)


class TextNeedle(MultiKeyNeedle):
    """The same in real text: needles stand between lines of a dataset's documents or of text files."""

    name = "needle_text"

    def haystack(self, setup: Setup, writer: Writer, room: int) -> list[Tokens]:
        """Return lines of the text of ``room`` tokens."""
        text = setup.long_text
        return text.lines(text.take(writer.random.random(), room))


class MultiValueNeedle(SentenceTask):
    """Several values of one key, asked for in the order of the row; other keys have the wrong answers."""

    name = "needle_multivalue"

    def row(self, setup: Setup, writer: Writer, length: int, depth: float) -> SentenceRow:
        """Return the row."""
        each, choices = setup.config.needles, setup.config.distractors + 1
        keys, values = writer.words(choices), writer.numbers(each * choices)
        lists = [values[choice * each : (choice + 1) * each] for choice in range(choices)]
        answers = [[(writer.listing(values_of_key), True)] for values_of_key in lists]
        question = Question(writer.encode(f"\nThe codes of {keys[0]}, from first to last, are"), answers)
        needles, depths = [], []
        for key, values_of_key in zip(keys, lists, strict=True):
            needles += [writer.needle(key, value) for value in values_of_key]
            depths += spread_depths(writer, each)
        units = fill(writer.noise(), room_for(length, question, needles, self.name))
        return SentenceRow(hide(units, needles, depths), question, float(NUMBERS) ** each)


class MultiQueryNeedle(SentenceTask):
    """Several keys, all asked for one after the other; a wrong answer gives each key the value of another."""

    name = "needle_multiquery"

    def row(self, setup: Setup, writer: Writer, length: int, depth: float) -> SentenceRow:
        """Return the row."""
        count = max(setup.config.needles, setup.config.distractors + 1)
        keys, values = writer.words(count), writer.numbers(count)
        needles = [writer.needle(key, value) for key, value in zip(keys, values, strict=True)]
        asked = writer.random.sample(range(count), count)
        answers = []
        for shift in range(setup.config.distractors + 1):
            answer: list[tuple[Tokens, bool]] = []
            for place, number in enumerate(asked):
                if place:
                    answer += [(writer.encode("."), False), (writer.code_of(keys[number]), False)]
                answer.append((writer.encode(" " + values[(number + shift) % count]), True))
            answers.append(answer)
        question = Question(writer.code_of(keys[asked[0]]), answers)
        units = fill(writer.noise(), room_for(length, question, needles, self.name))
        depths = [writer.random.random() for _ in needles]
        return SentenceRow(hide(units, needles, depths), question, float(NUMBERS) ** count)
