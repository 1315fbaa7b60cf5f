"""The id of a run in experiment trackers, kept in RUN/experiment.json: two runs never share one, and a moved run keeps
its own.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
from pathlib import Path

from fusiontree.utils.files import write_json

log = logging.getLogger(__name__)

FILE = "experiment.json"


def experiment_id(run_dir: Path) -> str:
    """Return the run's id, on the main rank; make and keep one if there is none.

    The copy of a run folder gets an id of its own while the original exists. A run of an earlier version, whose id was
    the folder's name, keeps that.
    """
    place = str(run_dir.resolve())
    known = _read(run_dir)
    if known and (known["run_dir"] == place or _read(Path(known["run_dir"])) != known):
        identity = known["id"]
    elif not known and (run_dir / "wandb").is_dir():
        identity = run_dir.resolve().name
    else:
        identity = f"{re.sub(r'[^A-Za-z0-9_.-]', '-', run_dir.resolve().name)[:80]}-{secrets.token_hex(4)}"
    values = {"id": identity, "run_dir": place}
    if values != known:
        try:
            write_json(run_dir / FILE, values)
        except OSError as error:
            log.warning("%s cannot be written (%s): the next start will have another id", run_dir / FILE, error)
    return identity


def _read(run_dir: Path) -> dict[str, str] | None:
    try:
        values = json.loads((run_dir / FILE).read_text(encoding="utf-8"))
        return {"id": str(values["id"]), "run_dir": str(values["run_dir"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s): experiment trackers get a new run", run_dir / FILE, error)
        return None
