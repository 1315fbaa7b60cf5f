"""Results of a study as one small JSON object: all that the report needs, curves thinned."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusiontree.studying.config import StudyConfig
from fusiontree.studying.runs import Run
from fusiontree.tracking.curves import smooth
from fusiontree.tracking.records import read_records
from fusiontree.utils.errors import UserError

RESULTS, EVALUATION = "results.json", "evaluation.json"
DONE = "study.json"
"""File in a run's folder that says that its training is finished."""
_FORMAT = "fusiontree-study"
_COPIED = ("size", "arm", "seed", "searched", "parameters", "steps", "tokens")
"""Fields of a run that its entry repeats."""
_COMPLETE = ("waiting", "failed", "unfinished", "finished")
"""States of a run, the most complete last."""
_POINTS = 60
"""Points per curve, besides the validations."""
_LAST = 0.1
"""Fraction of a run's records whose mean loss is final where nothing was validated."""


def final_loss(run_dir: Path) -> float | None:
    """Return a run's last validation loss, else the mean training loss of its last tenth; None if there is neither."""
    records = read_records(run_dir / "metrics.jsonl")
    validations = [r["validation_loss"] for r in records if r.get("validation_loss") is not None]
    if validations:
        return float(validations[-1])
    losses = [r["lm_loss"] for r in records if r.get("lm_loss") is not None]
    last = losses[-max(1, round(_LAST * len(losses))) :]
    return math.fsum(last) / len(last) if last else None


def collect(
    study: StudyConfig,
    runs: Sequence[Run],
    folder: Path,
    is_finished: Callable[[Run], bool],
    failed: dict[str, str],
) -> dict[str, Any]:
    """Return the results of all runs that have started.

    Args:
        study: the study.
        runs: its runs.
        folder: of the study.
        is_finished: whether a run is finished.
        failed: name of a failed run -> reason.
    """
    entries = []
    for run in runs:
        path = folder / run.name
        entry = {
            **{name: getattr(run, name) for name in _COPIED},
            "name": run.name,
            "rate": None if run.rate is None else _rounded(run.rate),
            "flops_per_token": _rounded(run.flops_per_token, 8),
        }
        if run.rate is None or not (path / "metrics.jsonl").is_file():
            entries.append(entry | {"state": "failed" if run.name in failed else "waiting"})
            continue
        state = "finished" if is_finished(run) else "failed" if run.name in failed else "unfinished"
        trained = (path / DONE).is_file()
        entry |= {"state": state, "trained": trained, "final_loss": final_loss(path), "curve": curve(path)}
        if (path / EVALUATION).is_file():
            entry["evaluation"] = read_evaluation(path / EVALUATION)
        entries.append(entry)
    return {
        "format": _FORMAT,
        "study": study.model_dump(mode="json"),
        "failed": dict(failed),
        "runs": entries,
    }


def curve(run_dir: Path) -> dict[str, Any]:
    """Return a run's curves: tokens, seconds and smoothed loss of training steps; tokens and loss of validations.

    Seconds are those of the steps, without start, validation and checkpoints.
    """
    records = read_records(run_dir / "metrics.jsonl")
    train = [r for r in records if r.get("lm_loss") is not None and r.get("step_time_s") is not None]
    seconds, total = [], 0.0
    for r in train:
        total += r["step_time_s"] * r.get("averaged_steps", 1)
        seconds.append(total)
    losses = smooth([r["lm_loss"] for r in train])
    last, stride = len(train) - 1, max(1, -(-len(train) // _POINTS))
    chosen = [i for i in range(len(train)) if (last - i) % stride == 0]
    valid = [r for r in records if r.get("validation_loss") is not None]
    speeds = sorted(r["tokens_per_s"] for r in train if r.get("tokens_per_s"))
    return {
        "tokens": [train[i]["tokens"] for i in chosen],
        "seconds": [_rounded(seconds[i]) for i in chosen],
        "loss": [_rounded(losses[i]) for i in chosen],
        "validation_tokens": [r["tokens"] for r in valid],
        "validation_loss": [_rounded(r["validation_loss"], 6) for r in valid],
        "tokens_per_s": _rounded(speeds[len(speeds) // 2]) if speeds else None,
    }


def read_evaluation(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the records of each task of ``fusiontree evaluate --output``, numbers rounded."""
    results = json.loads(file.read_text())["results"]
    return {
        task: [{k: _rounded(v) if isinstance(v, float) else v for k, v in record.items()} for record in records]
        for task, records in results.items()
    }


def read_results(path: Path) -> dict[str, Any]:
    """Read a study's results.json.

    Raises:
        UserError: the file is missing, damaged or of something else.
    """
    file = path / RESULTS if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"'{file}' does not exist; give the results.json of a study, or its folder")
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"'{file}' is no JSON: {error}") from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise UserError(f"'{file}' holds no results of a study (format {_FORMAT})")
    return values


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the results of one study of which machines computed different runs; of a run the most complete entry.

    Raises:
        UserError: the parts are of studies with another reference or budget.
    """
    first, *others = parts
    study, runs = dict(first["study"]), {run["name"]: run for run in first["runs"]}
    failed = dict(first["failed"])
    for part in others:
        for name in ("reference", "equal"):
            if part["study"][name] != study[name]:
                raise UserError(
                    f"the results differ in {name}: {study[name]} and {part['study'][name]}; merge one study's"
                )
        for section in ("sizes", "arms"):
            study[section] = {**part["study"][section], **study[section]}
        failed |= part["failed"]
        for run in part["runs"]:
            known = runs.get(run["name"])
            if known is None or _COMPLETE.index(run["state"]) > _COMPLETE.index(known["state"]):
                runs[run["name"]] = run
    kept = {name: reason for name, reason in failed.items() if runs[name]["state"] == "failed"}
    return {**first, "study": study, "failed": kept, "runs": list(runs.values())}


def _rounded(value: float, digits: int = 5) -> float:
    return float(f"{value:.{digits}g}")
