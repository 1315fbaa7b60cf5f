"""Settings that moved to another section keep their former names. Within a section, ``Section.renamed`` does this."""

from __future__ import annotations

import copy
from typing import Any

from fusiontree.utils.errors import UserError
from fusiontree.utils.settings import warn_of_former_name

MOVED: dict[str, str] = {
    **{f"training.adam_{key}": f"training.optimizer.{key}" for key in ("beta1", "beta2", "eps")},
    "training.eval_interval": "training.validation.interval",
    "training.eval_rows": "training.validation.rows",
    "training.spike_policy": "training.spikes.policy",
    "training.spike_window": "training.spikes.window",
    "training.spike_threshold": "training.spikes.threshold",
    "training.max_spikes": "training.spikes.max_in_a_row",
    "training.replica_check_interval": "supervision.replica_check_interval",
    "training.straggler_interval": "supervision.straggler_interval",
    "training.straggler_factor": "supervision.straggler_factor",
    "training.health_check": "supervision.health_check",
    "training.max_failed_starts": "supervision.max_failed_starts",
    "training.restart_backoff_s": "supervision.restart_backoff_s",
    "training.hang_timeout_s": "supervision.hang_timeout_s",
    "training.slow_timeout_s": "supervision.slow_timeout_s",
}
"""Former name -> name, both with their sections: ``training.adam_beta1`` -> ``training.optimizer.beta1``."""


def present_name(dotted: str) -> str:
    """Return the present name of a setting; a former name warns once per process."""
    if dotted not in MOVED:
        return dotted
    warn_of_former_name(dotted, MOVED[dotted])
    return MOVED[dotted]


def under_present_names(values: dict[str, Any], place: str) -> dict[str, Any]:
    """Return a copy of a whole configuration with settings under their present names.

    Args:
        values: sections by name, as in a YAML file or stored in a checkpoint.
        place: origin of the values, for errors.

    Raises:
        UserError: a setting is given under its former and its present name.
    """
    values = copy.deepcopy(values)
    for old in MOVED:
        *parents, key = old.split(".")
        section = _section(values, parents, create=False)
        if section is None or key not in section:
            continue
        *new_parents, new_key = present_name(old).split(".")
        target = _section(values, new_parents, create=True)
        if target is None or new_key in target:
            raise UserError(f"{place}: '{old}' is the former name of '{MOVED[old]}'; both are given; remove '{old}'")
        target[new_key] = section.pop(key)
    return values


def _section(values: dict[str, Any], parents: list[str], create: bool) -> dict[str, Any] | None:
    """Return the nested mapping at ``parents``; None if it is missing or no mapping."""
    for parent in parents:
        if create and values.get(parent) is None:
            values[parent] = {}
        inner = values.get(parent)
        if not isinstance(inner, dict):
            return None
        values = inner
    return values
