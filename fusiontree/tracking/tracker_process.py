"""The process of an experiment tracker, which follows RUN/metrics.jsonl.

Training never waits for a tracker: its client runs in no training process and may hang, crash or ask for a password.
The local file is complete; the tracker reads it and sends its records.
Run as ``python -m fusiontree.tracking.tracker_process RUN OPTIONS-AS-JSON``; ends when its standard input is closed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusiontree.tracking.config import LoggingConfig
from fusiontree.tracking.json_lines import parse_line
from fusiontree.tracking.tensorboard_tracker import TensorboardTracker
from fusiontree.tracking.tracker import TRACKERS
from fusiontree.tracking.wandb_tracker import WandbTracker

__all__ = ["TRACKERS", "TensorboardTracker", "TrackerProcess", "WandbTracker", "flatten", "follow"]

_POLL_S = 1.0


class TrackerProcess:
    """Starts, watches and ends a tracker's process."""

    def __init__(
        self, name: str, config: LoggingConfig, run_dir: Path, values: dict[str, Any], after_step: int
    ) -> None:
        """Start to send the steps after ``after_step``.

        Args:
            name: of the tracker in ``TRACKERS``.
            config: the ``logging`` section.
            run_dir: the run folder.
            values: the whole configuration as plain values.
            after_step: step of the checkpoint that training starts from.

        Raises:
            UserError: the tracker's package is not installed.
        """
        kind = TRACKERS.get(name)
        self.name, self.log = name, f"tracker-{name}.log"
        options, self.note = kind.prepare(config, run_dir, values)
        module = sys.modules[kind.__module__]
        start = {
            "module": module.__name__,
            "file": module.__file__,  # a plugin's module may be a file outside the path
            "class": kind.__name__,
            "options": options,
            "after_step": after_step,
        }
        with (run_dir / self.log).open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fusiontree.tracking.tracker_process", str(run_dir), json.dumps(start)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a signal that stops training must not end the tracker
            )
        self._told = False

    def failure(self) -> str | None:
        """Return why the tracker ended by itself, once; None while it runs."""
        return self._ended_with(self.process.poll())

    def close(self, seconds: float) -> str | None:
        """Let the tracker send its last records within ``seconds``; return an error or None."""
        assert self.process.stdin
        try:
            self.process.stdin.close()
            return self._ended_with(self.process.wait(seconds) or None)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # its helpers too
            self.process.wait()
            return f"the tracker had not sent all after {seconds:.0f} s and was ended"
        except OSError as error:
            return str(error)

    def _ended_with(self, code: int | None) -> str | None:
        if code is None or self._told:
            return None
        self._told = True
        return f"the tracker ended with code {code}; see {self.log} in the run folder"


def follow(path: Path, after_step: int) -> Iterator[dict[str, Any] | None]:
    """Yield the records after ``after_step`` as they are appended, and None when there is nothing new.

    A run that goes back rewrites the file; steps that were yielded before are not yielded again.
    """
    inode, position, last = 0, 0, after_step
    kinds: set[str] = set()  # of the records of step ``last`` that were yielded
    while True:
        fresh: list[dict[str, Any]] = []
        if path.is_file():
            with path.open("rb") as file:
                now = os.fstat(file.fileno())
                if now.st_ino != inode or now.st_size < position:
                    inode, position = now.st_ino, 0
                file.seek(position)
                data = file.read()
                whole = data[: data.rfind(b"\n") + 1]
                position += len(whole)
                parsed = (parse_line(line) for line in whole.split(b"\n"))
                fresh = [record for record in parsed if record is not None]
        for record in fresh:
            kind = _kind(record)
            if record["step"] > last:
                last, kinds = record["step"], set()
            if record["step"] == last > after_step and kind not in kinds:
                kinds.add(kind)
                yield record
        yield None


def _kind(record: dict[str, Any]) -> str:
    """Return which of the records of one step this is: the step itself, a validation or an evaluation."""
    return "validation" if "validation_loss" in record else "evaluation" if "evaluation_s" in record else "step"


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested metrics under names joined by slashes, by which trackers group them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, list):
            flat |= {f"{prefix}{key}/{i}": v for i, v in enumerate(value)}
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def main() -> int:
    """Follow the metrics until standard input is closed and all is sent."""
    run_dir, start = Path(sys.argv[1]), json.loads(sys.argv[2])
    kind = getattr(_import(start["module"], start["file"]), start["class"])
    tracker = kind(start["options"], start["after_step"])
    closing = False
    for record in follow(run_dir / "metrics.jsonl", start["after_step"]):
        if record is not None:
            tracker.log(flatten(record), record["step"])
        elif closing:
            break
        else:
            closing = _input_closed()
    tracker.close()
    return 0


def _import(module: str, file: str) -> Any:
    """Import a module under its name, or from its file if it is not on the path."""
    if importlib.util.find_spec(module) is not None:
        return importlib.import_module(module)
    spec = importlib.util.spec_from_file_location(module, file)
    assert spec is not None and spec.loader is not None
    sys.modules[module] = imported = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imported)
    return imported


def _input_closed() -> bool:
    """Wait a moment; return whether the parent closed the pipe or is gone."""
    readable, _, _ = select.select([sys.stdin], [], [], _POLL_S)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    sys.exit(main())
