"""Settings of the checks on processes and nodes, and of restarts."""

from __future__ import annotations

from typing import Literal

from fusiontree.utils.settings import Section, setting


class SupervisionConfig(Section):
    """Health of nodes and ranks, time limits and restarts."""

    replica_check_interval: int = setting(
        1000, "Steps between comparisons of parameters that several ranks hold; 0 never.", unit="steps", ge=0
    )
    straggler_interval: int = setting(
        100, "Steps between comparisons of the ranks' speed; a slow one is named in events.jsonl; 0 never.", ge=0
    )
    straggler_factor: float = setting(
        1.5, "A rank is slow when it takes this many times the median time of the ranks.", gt=1
    )
    health_check: Literal["off", "warn", "stop"] = setting(
        "warn",
        "Measure every rank's device, link and disk at the start. Other versions of code or packages on a rank always "
        "stop the run; warn names slow ranks in events.jsonl, stop also ends the run.",
    )
    max_failed_starts: int = setting(
        5, "Starts in a row that may die without a new checkpoint before a start is refused; 0: no limit.", ge=0
    )
    restart_backoff_s: float = setting(
        10.0,
        "Wait before a start that follows two such failed starts; doubles with each further failure, up to 10 minutes.",
        unit="seconds",
        ge=0,
    )
    hang_timeout_s: float = setting(
        110.0,
        "A step that lasts longer ends the process, and its stacks are written to RUN/hangs; 0: no limit. For remote "
        "datasets, the time that retries of reading may take is added.",
        unit="seconds",
        ge=0,
    )
    slow_timeout_s: float = setting(
        1800.0,
        "hang_timeout_s for starting, the first step (kernels compile), validating, evaluating and saving.",
        unit="seconds",
        ge=0,
    )
