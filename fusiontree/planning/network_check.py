"""Measures the network between every two nodes and names slow and dead links and nodes.

Rank 0 leads. It publishes rounds of node pairs in a key-value store; the ranks of both nodes of a pair join a process
group of their own, time an all-reduce and an all-gather, leave it, and report. In a round every node is in at most one
pair, so pairs do not disturb each other; after N-1 rounds every node has met every other. Each pair gets a
new process group, so that a dead link fails alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from statistics import median

import torch
import torch.distributed as dist

from fusiontree.parallel.collectives import ALL_GATHER
from fusiontree.parallel.layout import temporary_group
from fusiontree.utils.environment import ProcessPlace
from fusiontree.utils.errors import UserError

Pair = tuple[int, int]
_REPEATS = 5
_END = "end"


@dataclass(frozen=True)
class Measured:
    """One pair of nodes; the same node twice is the network inside it."""

    pair: Pair
    all_reduce_gb_per_s: float = 0.0
    """Rate of one rank's link in each direction: 2 (n-1)/n of the tensor's bytes per second."""
    all_gather_gb_per_s: float = 0.0
    """Rate of one rank's link in each direction: (n-1)/n of the gathered bytes per second."""
    error: str | None = None


def rounds(nodes: Sequence[int]) -> list[list[Pair]]:
    """Return rounds in which every node meets every other once and is in at most one pair per round."""
    ring: list[int | None] = [*nodes] if len(nodes) % 2 == 0 else [*nodes, None]
    half = len(ring) // 2
    result = []
    for _ in range(len(ring) - 1):
        pairs = zip(ring[:half], reversed(ring[half:]), strict=True)
        result.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        ring.insert(1, ring.pop())  # the first stays, the others go round
    return result


class Preflight:
    """This process's part in the test; every process of the job constructs a Preflight and calls :meth:`run`."""

    def __init__(
        self,
        place: ProcessPlace,
        device: torch.device,
        store: dist.Store,
        name: str,
        *,
        size_bytes: int,
        pair_timeout_s: float,
        join_timeout_s: float,
        budget_s: float,
    ) -> None:
        """Prepare.

        Args:
            place: this process among all; nodes have ``local_world_size`` ranks each, neighbours in rank.
            device: where the tensors lie.
            store: reached by all processes.
            name: this host's, for the report.
            size_bytes: of the reduced tensor, and of the gathered one.
            pair_timeout_s: of one attempt to connect and of one collective.
            join_timeout_s: after which a rank that has not come counts as dead.
            budget_s: after which no new round begins.
        """
        self.place, self.device, self.store, self.name = place, device, store, name
        self.node = place.rank // place.local_world_size
        self.size_bytes = size_bytes
        self.pair_timeout_s, self.join_timeout_s, self.budget_s = pair_timeout_s, join_timeout_s, budget_s
        self.names: dict[int, str] = {}
        """Host names of the nodes whose ranks all came; known to rank 0."""

    def run(self) -> tuple[list[Measured], list[int], int] | None:
        """Take part to the end.

        Returns:
            On rank 0 the measurements, the nodes that never came or fell silent, and the rounds that the budget left
            out; None on the others.
        """
        self.store.set(f"here/{self.place.rank}", self.name)
        if self.place.is_main:
            return self._lead()
        number = 0
        while True:
            told = self._wait(f"round/{number}", self.join_timeout_s + self.budget_s + 6 * self.pair_timeout_s)
            if told is None:
                raise UserError(f"node {self.node} ({self.name}): rank 0 no longer answers")
            if told == _END:
                return None
            self._take_part(number, [(a, b) for a, b in json.loads(told)])
            number += 1

    def _lead(self) -> tuple[list[Measured], list[int], int]:
        began = time.monotonic()
        size = self.place.local_world_size
        lost = []
        for node in range(self.place.world_size // size):
            came = [self._wait_until(f"here/{rank}", began + self.join_timeout_s) for rank in self._ranks(node)]
            if all(came):
                self.names[node] = str(came[0])
            else:
                lost.append(node)
        alive = list(self.names)
        schedule = rounds(alive)
        if size > 1:
            schedule.insert(0, [(node, node) for node in alive])
        measured: list[Measured] = []
        number = left_out = 0
        began = time.monotonic()
        for planned in schedule:
            pairs = [pair for pair in planned if not set(pair) & set(lost)]
            if time.monotonic() - began > self.budget_s:
                left_out += 1
                continue
            self.store.set(f"round/{number}", json.dumps(pairs))
            until = time.monotonic() + 5 * self.pair_timeout_s + 5  # gloo tries four times to connect
            self._take_part(number, pairs)
            for pair in pairs:
                found, silent = self._collect(number, pair, until)
                measured.append(found)
                lost += [node for node in silent if node not in lost]
            number += 1
        self.store.set(f"round/{number}", _END)
        return measured, lost, left_out

    def _collect(self, number: int, pair: Pair, until: float) -> tuple[Measured, list[int]]:
        """Return the measurement of a pair's slowest rank, and the nodes that report nothing."""
        texts = {
            rank: self._wait_until(f"done/{number}/{rank}", until) for node in set(pair) for rank in self._ranks(node)
        }
        silent = sorted({rank // self.place.local_world_size for rank, text in texts.items() if text is None})
        if silent:
            names = ", ".join(self.names[node] for node in silent)
            return Measured(pair, error=f"no word from {names}"), silent
        found = [json.loads(text) for text in texts.values() if text is not None]
        errors = [one["error"] for one in found if one["error"]]
        if errors:
            return Measured(pair, error=errors[0]), []
        return Measured(
            pair,
            all_reduce_gb_per_s=min(one["all_reduce_gb_per_s"] for one in found),
            all_gather_gb_per_s=min(one["all_gather_gb_per_s"] for one in found),
        ), []

    def _take_part(self, number: int, pairs: Sequence[Pair]) -> None:
        mine = next((pair for pair in pairs if self.node in pair), None)
        if mine is None:
            return
        try:
            found = self._measure(number, mine)
        except Exception as error:  # a dead link must not end the test of the others
            first_line = next(iter(str(error).splitlines()), "")
            found = Measured(mine, error=f"{type(error).__name__}: {first_line[:200]}".rstrip(": "))
        self.store.set(f"done/{number}/{self.place.rank}", json.dumps(asdict(found)))

    def _measure(self, number: int, pair: Pair) -> Measured:
        ranks = [rank for node in sorted(set(pair)) for rank in self._ranks(node)]
        n = len(ranks)
        store = dist.PrefixStore(f"group/{number}/{pair[0]}-{pair[1]}", self.store)
        with temporary_group(self.device, store, ranks.index(self.place.rank), n, self.pair_timeout_s):
            whole = torch.zeros(self.size_bytes // 4 // n * n, device=self.device)
            part = whole[: whole.numel() // n].clone()
            reduce_s = self._fastest(lambda: dist.all_reduce(whole))
            gather_s = self._fastest(lambda: getattr(dist, ALL_GATHER)(whole, part))
        moved = whole.numel() * 4 * (n - 1) / n / 1e9
        return Measured(pair, round(2 * moved / reduce_s, 4), round(moved / gather_s, 4))

    def _fastest(self, work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(_REPEATS + 1):  # the first opens connections
            began = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            best = min(best, time.perf_counter() - began)
        return best

    def _ranks(self, node: int) -> range:
        size = self.place.local_world_size
        return range(node * size, (node + 1) * size)

    def _wait_until(self, key: str, until: float) -> str | None:
        return self._wait(key, max(until - time.monotonic(), 0.01))

    def _wait(self, key: str, seconds: float) -> str | None:
        """Return a key's text, or None when it does not come in time."""
        try:
            self.store.wait([key], timedelta(seconds=seconds))
        except RuntimeError:  # DistStoreError and DistNetworkError derive from it
            return None
        return self.store.get(key).decode()


def judge(
    measured: Sequence[Measured], lost: Sequence[int], names: dict[int, str], slow_below: float = 0.5
) -> list[str]:
    """Return the problems, one sentence each: silent nodes, dead links, slow nodes, slow links.

    A link is slow if its rate is below ``slow_below`` times the median of the nodes' best rates. A node is blamed
    instead of its links if most of them are slow or dead.
    """
    problems = [f"node {node} ({names.get(node, 'never came')}) does not answer" for node in sorted(lost)]
    between = [m for m in measured if m.pair[0] != m.pair[1] and not set(m.pair) & set(lost)]
    inside = [m for m in measured if m.pair[0] == m.pair[1] and not set(m.pair) & set(lost)]

    def name(node: int) -> str:
        return f"node {node} ({names.get(node, '?')})"

    for group in (inside, between):
        # A sound link's rate: the median of the nodes' best, as one of four nodes, being slow, spoils half the links.
        best_of: dict[int, float] = {}
        for m in group:
            for node in m.pair:
                best_of[node] = max(best_of.get(node, 0.0), m.all_reduce_gb_per_s)
        middle = median(best_of.values()) if best_of else 0.0
        bad = {m.pair: m for m in group if m.error or m.all_reduce_gb_per_s < slow_below * middle}
        blamed = []
        if group is between:
            nodes = {node for m in group for node in m.pair}
            for node in sorted(nodes):
                links = [m.pair for m in group if node in m.pair]
                if len(links) > 1 and sum(pair in bad for pair in links) > len(links) / 2:
                    blamed.append(node)
                    worst = [bad[pair] for pair in links if pair in bad]
                    best = max(m.all_reduce_gb_per_s for m in worst)
                    dead = all(m.error for m in worst)
                    what = "reaches no other node" if dead else f"is slow to all others: at most {best:g} GB/s"
                    problems.append(f"{name(node)} {what}, where a sound link has {middle:g} GB/s")
        for pair, m in bad.items():
            if set(pair) & set(blamed):
                continue
            where = f"inside {name(pair[0])}" if pair[0] == pair[1] else f"between {name(pair[0])} and {name(pair[1])}"
            rate = f"slow, {m.all_reduce_gb_per_s:g} GB/s where a sound one has {middle:g}"
            problems.append(f"the link {where} is {'dead: ' + m.error if m.error else rate}")
    return problems
