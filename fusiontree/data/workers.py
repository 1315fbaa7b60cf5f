"""Threads that work ahead of a consumer and return results in the order of the questions.

Threads rather than processes: reading a row is a few system calls, hashes and array copies, which release the GIL; and
a killed trainer leaves no processes behind.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Generic, TypeVar

from fusiontree.utils.threads import StoppableThread

Q = TypeVar("Q")
A = TypeVar("A")


class OrderedWorkers(Generic[Q, A]):
    """Answers a finite or infinite series of questions in order, some of them ahead of the consumer."""

    def __init__(self, answer: Callable[[Q], A], questions: Iterator[Q], *, workers: int, ahead: int) -> None:
        """Start the threads.

        Args:
            answer: function from a question to its answer, called in the threads.
            questions: iterated in the consumer's thread.
            workers: number of threads; 0 computes each answer in the consumer's thread when requested.
            ahead: maximum number of questions that are being answered or answered ahead of the consumer.
        """
        self._answer, self._questions = answer, questions
        self._ahead = ahead if workers else 1
        self._pending: deque[Future[A]] = deque()
        self._queue: queue.SimpleQueue[tuple[Q, Future[A]] | None] = queue.SimpleQueue()
        self._threads = [StoppableThread(self._work, f"data-{i}") for i in range(min(workers, ahead))]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            self._settle(*item)

    def _settle(self, question: Q, future: Future[A]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(self._answer(question))
        except BaseException as error:  # raised in the consumer, in order
            future.set_exception(error)

    def __iter__(self) -> OrderedWorkers[Q, A]:
        return self

    def __next__(self) -> A:
        """Return the next answer.

        Raises:
            StopIteration: no question is left.
            Exception: the exception that ``answer`` raised for this question.
        """
        while len(self._pending) < self._ahead:
            try:
                question = next(self._questions)
            except StopIteration:
                break
            future: Future[A] = Future()
            self._pending.append(future)
            if self._threads:
                self._queue.put((question, future))
            else:
                self._settle(question, future)
        if not self._pending:
            raise StopIteration
        return self._pending.popleft().result()

    def close(self, timeout_s: float = 5.0) -> None:
        """Drop pending questions and end the threads; a thread still in a read after ``timeout_s`` is abandoned."""
        for future in self._pending:
            future.cancel()
        self._pending.clear()
        for thread in self._threads:
            thread.stop()
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout_s)
        self._threads = []
