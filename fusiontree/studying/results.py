"""Results of a study as one small JSON object: all that the report needs, curves thinned."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fusiontree.studying.config import StudyConfig
from fusiontree.studying.results_file import ResultsFile
from fusiontree.studying.runs import Run
from fusiontree.tracking.curves import smooth
from fusiontree.tracking.records import read_records
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import atomic_write, read_text, write_json

RESULTS, EVALUATION = "results.json", "evaluation.json"
DONE = "study.json"
"""File in a run's folder that says that its training is finished."""
_FORMAT = "fusiontree-study"
_MEND = "take an undamaged copy, or start the study again on its folder, which writes the file anew"
_COPIED = ("size", "arm", "seed", "searched", "parameters", "steps", "tokens")
"""Fields of a run that its entry repeats."""
_COMPLETE = ("waiting", "failed", "unfinished", "finished")
"""States of a run, the most complete last."""
_POINTS = 60
"""Points per curve, besides the validations."""
_LAST = 0.1
"""Fraction of a run's records whose mean loss is final where nothing was validated."""


def final_loss(run_dir: Path) -> float | None:
    """Return a run's last validation loss, else the mean training loss of its last tenth.

    None if there is neither, or if the last one is not finite: an earlier loss says nothing about a run that diverged.
    """
    records = read_records(run_dir / "metrics.jsonl")
    validations = [r["validation_loss"] for r in records if "validation_loss" in r]
    losses = [r["lm_loss"] for r in records if "lm_loss" in r]
    last = validations[-1:] or losses[-max(1, round(_LAST * len(losses))) :]
    if not last or last[-1] is None:
        return None
    finite = [loss for loss in last if loss is not None]
    return math.fsum(finite) / len(finite)


def mark_trained(run: Run, folder: Path, seconds: float, runs_per_gpu: int) -> None:
    """Write into the run's folder that its training is finished, with what, and how many runs shared its GPU."""
    write_json(folder / run.name / DONE, {**_identity(run), "seconds": round(seconds, 1), "runs_per_gpu": runs_per_gpu})


def is_trained(run: Run, folder: Path) -> bool:
    """Whether the run's training in the study's ``folder`` is finished, with the study's present settings."""
    return run.rate is not None and (folder / run.name / DONE).is_file() and not trained_differently(run, folder)


def trained_differently(run: Run, folder: Path) -> str:
    """Return how a finished run differs from what the study asks for by now, or an empty string."""
    done = _finished_with(run, folder)
    for name, value in _identity(run).items():
        if value is not None and name in done and not math.isclose(done[name], value, rel_tol=1e-6):
            return (
                f"trained with {name} {done[name]:g}, and the study asks for {value:g}; delete the folder "
                f"'{folder / run.name}', or give another --out"
            )
    return ""


def _finished_with(run: Run, folder: Path) -> dict[str, Any]:
    """Return what :func:`mark_trained` wrote, empty if it is missing or damaged."""
    try:
        done = json.loads((folder / run.name / DONE).read_text())
    except (OSError, ValueError):
        return {}
    return done if isinstance(done, dict) else {}


def _identity(run: Run) -> dict[str, float | None]:
    return {"steps": run.steps, "rate": run.rate, "parameters": run.parameters, "tokens": run.tokens}


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
        entry |= {
            "state": state,
            "trained": is_trained(run, folder),
            "final_loss": final_loss(path),
            "runs_per_gpu": _finished_with(run, folder).get("runs_per_gpu", 1),
            "curve": curve(path),
        }
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
        values = json.loads(read_text(file))
    except ValueError as error:
        raise UserError(f"'{file}' is no JSON: {error}; {_MEND}") from error
    if not isinstance(values, dict) or values.get("format") != _FORMAT:
        raise UserError(f"'{file}' holds no results of a study (format {_FORMAT}); give the results.json of one")
    try:
        ResultsFile.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        found = "" if problem["type"] in ("missing", "value_error") else f" is {problem['input']!r:.80}"
        message = problem["msg"].removeprefix("Value error, ")
        raise UserError(f"'{file}': {place}{found}{': ' if place else ''}{message}; {_MEND}") from None
    return values


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write a results.json, a line for each run, so that differences of versions show runs."""
    head = json.dumps({key: value for key, value in results.items() if key != "runs"})
    with atomic_write(path) as file:
        file.write(f'{head[:-1]},\n"runs": [\n' + ",\n".join(map(json.dumps, results["runs"])) + "\n]}\n")


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the results of one study of which machines computed different runs; of a run the most complete entry.

    A run that another part has with another learning rate than the first part's stays as the first part has it.

    Raises:
        UserError: the parts are of studies with another reference, budget, learning rates, models or arms.
    """
    first, *others = parts
    study, runs = dict(first["study"]), {run["name"]: run for run in first["runs"]}
    failed = dict(first["failed"])
    for part in others:
        _check_same_study({"study": study, "runs": runs.values()}, part)
        for section in ("sizes", "arms"):
            study[section] = {**part["study"][section], **study[section]}
        failed |= part["failed"]
        for run in part["runs"]:
            known = runs.get(run["name"])
            if known is None or (
                _COMPLETE.index(run["state"]) > _COMPLETE.index(known["state"])
                and same_rate(run["rate"], known["rate"])
            ):
                runs[run["name"]] = run
    kept = {
        run["name"]: failed[run["name"]] for run in runs.values() if run["state"] == "failed" and run["name"] in failed
    }
    return {**first, "study": study, "failed": kept, "runs": list(runs.values())}


def same_rate(one: float | None, other: float | None) -> bool:
    """Whether two learning rates, one perhaps rounded, are the same; None is one that is not known by now."""
    return one is None or other is None or math.isclose(one, other, rel_tol=1e-3)


def _check_same_study(known: dict[str, Any], part: dict[str, Any]) -> None:
    """Raise UserError if a part's numbers may not stand in one table with those known: another study or budget."""
    pairs = [
        (name, known["study"][name], part["study"][name])
        for name in ("reference", "equal", "learning_rates", "rate_exponent")
    ]
    for arm in known["study"]["arms"].keys() & part["study"]["arms"].keys():
        one, other = (values["study"]["arms"][arm] for values in (known, part))
        names = (one.keys() | other.keys()) - {"note", "sizes"}
        pairs += [(f"{name} of arm {arm}", one.get(name), other.get(name)) for name in sorted(names)]
        for size in known["study"]["sizes"].keys() & part["study"]["sizes"].keys():
            pairs.append((f"sizes.{size} of arm {arm}", *(setup.get("sizes", {}).get(size) for setup in (one, other))))
    of_arm = {(run["size"], run["arm"]): run for run in known["runs"]}
    for run in (run for run in part["runs"] if run["state"] != "waiting"):  # one that never began measured nothing
        if (same := of_arm.get((run["size"], run["arm"]))) is not None:
            names = ("parameters", "steps", "tokens", "flops_per_token")
            pairs += [(f"{name} of {run['size']}/{run['arm']}", same[name], run[name]) for name in names]
    for name, one, other in pairs:
        if one != other:
            raise UserError(
                f"the results differ in {name}: {one} and {other}; merge results of one study and budget, or leave "
                f"one file out"
            )


def _rounded(value: float, digits: int = 5) -> float:
    return float(f"{value:.{digits}g}")
