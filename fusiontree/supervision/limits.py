"""The time limits of a run, derived from each other: what is retried is not ended meanwhile by the watchdog, and the
watchdog, which names the rank, ends a hang before the communication library does.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusiontree.config.root import Config

_LIBRARY_S = 1800.0
_MARGIN_S = 60.0
_NEVER_S = 7 * 86_400.0


@dataclass(frozen=True)
class TimeLimits:
    """Seconds that sections of the training loop may last; 0 sets no limit."""

    step_s: float
    """Any section of a step, on every rank: while one rank retries to read, the others wait for it in a collective."""
    slow_s: float
    """Starting, the first step, validating, evaluating, saving."""
    collective_s: float
    """A collective operation, before the communication library fails it."""


def time_limits(config: Config) -> TimeLimits:
    """Return the limits of a run."""
    supervision, data = config.supervision, config.data
    retries_s = data.longest_read_s if data.is_remote else 0.0  # waits for a local disk are shorter, see limit_notes
    step_s = supervision.hang_timeout_s and supervision.hang_timeout_s + retries_s
    slow_s = supervision.slow_timeout_s and supervision.slow_timeout_s + retries_s
    endless = not step_s or not slow_s
    return TimeLimits(step_s, slow_s, _NEVER_S if endless else max(_LIBRARY_S, step_s + _MARGIN_S, slow_s + _MARGIN_S))


def limit_notes(config: Config) -> list[str]:
    """Return a sentence for each pair of limits of which one makes the other one useless."""
    supervision, data = config.supervision, config.data
    notes = []
    hang_s, slow_s = supervision.hang_timeout_s, supervision.slow_timeout_s
    if hang_s and not data.is_remote and data.longest_read_s >= hang_s:
        notes.append(
            f"reading from a failing disk is retried for up to {data.longest_read_s:.0f} s (data.fetch_attempts, "
            f"data.fetch_wait_s), and supervision.hang_timeout_s ends the run after {hang_s:g} s"
        )
    if slow_s and hang_s > slow_s:
        notes.append(
            f"supervision.slow_timeout_s {slow_s:g} is less than supervision.hang_timeout_s {hang_s:g}: validating or "
            f"saving may take less time than a step"
        )
    if hang_s and data.is_remote:
        notes.append(
            f"a hang ends the run after {hang_s + data.longest_read_s:.0f} s: supervision.hang_timeout_s, and up to "
            f"{data.longest_read_s:.0f} s in which reading remote data is retried (data.fetch_attempts x "
            f"data.fetch_stall_s, and waits)"
        )
    return notes
