"""The folder of a run: made once, resumed by the same configuration, never shared by two different runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from fusiontree.supervision.run_lock import GUARD, RUN_LOCK
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import atomic_write

CONFIG = "config.yaml"

# What makes two configurations the same run. The rest (layout, speed, logging, the length of training) may change
# when a run is resumed, because the losses do not depend on it or because changing it is the point.
_IDENTITY = (
    ("model", None),
    ("training", ("seed", "seq_len", "global_batch_size", "curriculum", "gate_target", "gate_margin")),
    ("data", ("train",)),
)


def _identity(values: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for section, keys in _IDENTITY:
        for key, value in values.get(section, {}).items():
            if (keys is None or key in keys) and key != "kernels":
                fields[f"{section}.{key}"] = value
    return fields


def check_run_folder(run_dir: Path, values: dict[str, Any]) -> None:
    """Check that ``run_dir`` is new, empty, or the folder of this very run; writes nothing.

    Raises:
        UserError: it holds another run (the differing fields are named), files that are no run's, or cannot be
            written.
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
    saved, wanted = _identity(yaml.safe_load(saved_file.read_text(encoding="utf-8"))), _identity(values)
    differing = [k for k in sorted(saved.keys() | wanted.keys()) if saved.get(k) != wanted.get(k)]
    if differing:
        lines = "\n".join(f"  {k}: {saved.get(k)!r} in the folder, {wanted.get(k)!r} now" for k in differing)
        raise UserError(
            f"run_dir '{run_dir}' belongs to another run:\n{lines}\n"
            f"name another run_dir, or set these back to resume it; nothing was written"
        )


def write_config(run_dir: Path, text: str) -> None:
    """Write the resolved configuration, keeping an earlier and different one beside it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    file = run_dir / CONFIG
    if file.is_file() and file.read_text(encoding="utf-8") != text:
        number = sum(1 for _ in run_dir.glob("config.before-*.yaml"))
        file.rename(run_dir / f"config.before-{number + 1}.yaml")
    with atomic_write(file) as out:
        out.write(text)
