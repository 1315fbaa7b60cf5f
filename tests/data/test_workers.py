"""Threads that work ahead: results in the order of the questions, bounded, errors in their turn."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from fusiontree.data.workers import OrderedWorkers
from fusiontree.utils.threads import StoppableThread, Stopped, stop_wanted


def slow_square(number: int) -> int:
    time.sleep(random.Random(number).uniform(0, 0.003))
    return number * number


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("ahead", [1, 3, 10])
def test_answers_keep_the_order(workers: int, ahead: int) -> None:
    answers = OrderedWorkers(slow_square, iter(range(50)), workers=workers, ahead=ahead)
    assert list(answers) == [n * n for n in range(50)]
    answers.close()


@pytest.mark.parametrize(("workers", "ahead", "most"), [(0, 5, 1), (1, 5, 5), (4, 5, 5), (8, 2, 2)])
def test_no_more_is_asked_than_allowed(workers: int, ahead: int, most: int) -> None:
    asked = []

    def questions() -> Iterator[int]:
        for number in range(100):
            asked.append(number)
            yield number

    answers = OrderedWorkers(slow_square, questions(), workers=workers, ahead=ahead)
    for number in range(10):
        next(answers)
        assert len(asked) <= number + most
    answers.close()


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_an_error_comes_in_its_turn(workers: int) -> None:
    def answer(number: int) -> int:
        if number == 3:
            raise KeyError("three")
        return number

    answers = OrderedWorkers(answer, iter(range(9)), workers=workers, ahead=6)
    assert [next(answers) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(answers)
    answers.close()


def test_closing_ends_threads_that_wait() -> None:
    """As a worker waits for a network: it gives up when nobody wants its rows."""

    def wait_for_ever(number: int) -> int:
        while not stop_wanted():
            time.sleep(0.005)
        raise Stopped

    before = threading.active_count()
    answers = OrderedWorkers(wait_for_ever, iter(range(9)), workers=3, ahead=6)

    def consume() -> None:
        with contextlib.suppress(Stopped, CancelledError):
            next(answers)

    filler = threading.Thread(target=consume, daemon=True)
    filler.start()
    time.sleep(0.05)
    began = time.monotonic()
    answers.close()
    assert time.monotonic() - began < 1
    filler.join(1)
    assert threading.active_count() == before


def test_only_stoppable_threads_are_stopped() -> None:
    assert not stop_wanted()
    seen: list[bool] = []

    def work() -> None:
        seen.append(stop_wanted())
        thread.stop()
        seen.append(stop_wanted())
        raise Stopped

    thread = StoppableThread(work, "t")
    thread.start()
    thread.join()
    assert seen == [False, True]
    assert thread.daemon
