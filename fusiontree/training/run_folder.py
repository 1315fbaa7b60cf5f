"""The folder of a run: made once, resumed by the same configuration, never shared by two different runs."""

from __future__ import annotations

import functools
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fusiontree.checkpoint.folders import STATE, complete_checkpoints, folder_step
from fusiontree.checkpoint.model_settings import different_settings
from fusiontree.supervision.run_lock import GUARD, RUN_LOCK
from fusiontree.tracking.console import NOTICE, Console
from fusiontree.tracking.records import Records, read_records
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import atomic_write

if TYPE_CHECKING:
    from fusiontree.data.state import Order

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
NEW_RUN = "start a new run from its weights: another run_dir and checkpoint.init_from=RUN"

# What makes two configurations the same run: the model, and these settings of training. The rest (layout, speed,
# logging, the length of training) may change when a run is resumed, because the losses do not depend on it or because
# changing it is the point. The datasets are compared by their content, see check_same_data: they may move.
_OF_TRAINING = ("curriculum", "gate_margin", "gate_target", "global_batch_size", "seed", "seq_len")


def check_run_folder(run_dir: Path, values: dict[str, Any]) -> None:
    """Check that ``run_dir`` is new, empty, or the folder of this very run; writes nothing.

    Raises:
        UserError: it holds another run (the message names the settings that differ) or other files, or cannot be
            written to.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run_dir '{run_dir}' is a file; name a folder")
    existing = next(p for p in (run_dir, *run_dir.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run_dir '{run_dir}': nothing can be written to '{existing}'; name another run_dir")
    saved_file = run_dir / CONFIG
    if not saved_file.is_file():
        known = ("data", "logs", RUN_LOCK, GUARD)
        others = sorted(p.name for p in run_dir.iterdir() if p.name not in known) if run_dir.is_dir() else []
        if others:
            shown = ", ".join(others[:4]) + (" …" if len(others) > 4 else "")
            raise UserError(
                f"run_dir '{run_dir}' holds {shown} but no {CONFIG}, so it is no run to resume; name another folder"
            )
        return
    before = _saved_values(run_dir)
    _check_initial(run_dir, before, values)
    differing = different_settings(before.get("model", {}), values.get("model", {}))
    if was := before.get("training"):
        now = values.get("training", {})
        differing += [(f"training.{k}", was.get(k), now.get(k)) for k in _OF_TRAINING if was.get(k) != now.get(k)]
    if differing:
        lines = "\n".join(f"  {name}: {old!r} in the folder, {new!r} now" for name, old, new in differing)
        raise UserError(
            f"run_dir '{run_dir}' belongs to another run:\n{lines}\n"
            f"set these back to resume it, or {NEW_RUN}; nothing was written"
        )


def _check_initial(run_dir: Path, before: dict[str, Any], values: dict[str, Any]) -> None:
    """Refuse a new ``checkpoint.init_from`` for a run that has checkpoints, which would not read it."""
    now = (values.get("checkpoint") or {}).get("init_from")
    was = (before.get("checkpoint") or {}).get("init_from")
    if now in (None, was) or not (saved := complete_checkpoints(run_dir / "checkpoints")):
        return
    raise UserError(
        f"run_dir '{run_dir}' has checkpoints, the newest of step {folder_step(saved[-1])}, so the run goes on from "
        f"there; checkpoint.init_from '{now}' (was {was!r}) needs another run_dir. Remove it to resume"
    )


def check_same_data(run_dir: Path, values: dict[str, Any], order: Order) -> None:
    """Check that the opened datasets are those of the run, wherever they are now; writes nothing.

    Args:
        run_dir: the run folder.
        values: the configuration as plain values.
        order: of the rows of the opened datasets.

    Raises:
        UserError: the newest checkpoint continues in other datasets; or the run has no checkpoint and began with
            other datasets.
    """
    from fusiontree.checkpoint.load import read_state
    from fusiontree.checkpoint.manifest import CheckpointDamage
    from fusiontree.data.state import DataState

    for folder in reversed(complete_checkpoints(run_dir / "checkpoints")):
        try:
            state = read_state(folder)
        except CheckpointDamage:
            continue  # the resume goes back to an older one, too
        if state.get("data") is not None:
            DataState().load_state_dict(state["data"], order)
        return
    before = _saved_values(run_dir).get("data", {}).get("train")
    now = values["data"]["train"]
    if before in (None, now):
        return
    begun = [event.get("data") for event in read_records(run_dir / "events.jsonl") if event["event"] == "start"]
    if begun[-1:] != [order.fingerprint]:
        raise UserError(
            f"run_dir '{run_dir}' belongs to another run:\n  data.train: {before!r} in the folder, {now!r} now, with "
            f"other tokens\nset this back to resume it, or name another run_dir; nothing was written"
        )


def write_config(run_dir: Path, text: str) -> dict[str, tuple[Any, Any]]:
    """Write the resolved configuration, keeping an earlier and different one beside it.

    Returns:
        Dotted name -> (value before, value now) of every setting that both have and that changed.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / CONFIG
    before = _saved_values(run_dir) if file.exists() else {}
    if file.exists() and file.read_bytes() != text.encode():
        number = 1
        while (aside := run_dir / f"config.before-{number}.yaml").exists():
            number += 1
        file.rename(aside)
    with atomic_write(file) as out:
        out.write(text)
    return _changes(before, yaml.safe_load(text) or {})


def report_changes(records: Records, console: Console, changes: dict[str, tuple[Any, Any]]) -> None:
    """Record and show the settings that changed since the last start, as :func:`write_config` returned them."""
    if changes:
        records.event("config_changed", changes={name: list(pair) for name, pair in changes.items()})
        shown = [
            name if isinstance(old, list | dict) or isinstance(new, list | dict) else f"{name} {old} -> {new}"
            for name, (old, new) in changes.items()
        ]
        more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        console.say(f"changed since the last start: {', '.join(shown[:8])}{more}", NOTICE)


def _saved_values(run_dir: Path) -> dict[str, Any]:
    """Return the configuration in the folder; if it is damaged, warn and return the newest checkpoint's, or nothing."""
    file = run_dir / CONFIG
    if not file.exists():
        return {}
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        values = error
    if isinstance(values, dict) and all(isinstance(values.get(name), dict) for name in ("model", "training", "data")):
        return values
    reason = " ".join(str(values).split())[:200] if isinstance(values, Exception) else "it holds no run's settings"
    _warn(f"{file} is damaged ({reason}); it is kept beside the new one, and that of the newest checkpoint counts")
    for folder in reversed(complete_checkpoints(run_dir / "checkpoints")):
        try:
            return dict(json.loads((folder / STATE).read_text(encoding="utf-8"))["config"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged checkpoint
    return {}


@functools.cache
def _warn(message: str) -> None:
    log.warning("%s", message)


def _changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    changed: dict[str, tuple[Any, Any]] = {}
    for key in before.keys() & now.keys():
        old, new, name = before[key], now[key], f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            changed |= _changes(old, new, f"{name}.")
        elif old != new:
            changed[name] = (old, new)
    return dict(sorted(changed.items()))
