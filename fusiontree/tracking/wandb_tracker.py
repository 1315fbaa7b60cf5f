"""The wandb tracker: a process of its own that follows RUN/metrics.jsonl.

Whatever the client or its server does (hang, crash, wait for a password), training never waits for it: nothing of
wandb runs in a training process. The local file is the truth; the tracker reads it and sends what it can.
Run as ``python -m fusiontree.tracking.wandb_tracker RUN OPTIONS-AS-JSON``; it ends when its standard input is closed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fusiontree.tracking.config import WandbConfig
from fusiontree.utils.environment import wandb_server
from fusiontree.utils.errors import UserError

LOG = "wandb-mirror.log"
_REACH_S = 5.0
_FINISH_S = 60.0
"""How long the end of a run waits for the tracker to send its rest."""
_POLL_S = 1.0


class WandbTracker:
    """Starts, watches and ends the tracker's process."""

    def __init__(self, process: subprocess.Popen[bytes], mode: str, note: str | None) -> None:
        """Hold a running tracker; ``note`` is what the start has to say to the user."""
        self.process, self.mode, self.note = process, mode, note
        self._told = False

    @classmethod
    def start(cls, config: WandbConfig, run_dir: Path, values: dict[str, Any], after_step: int) -> WandbTracker | None:
        """Start tracking the steps after ``after_step``; None when the tracker is disabled.

        An ``online`` tracker whose server does not answer becomes ``offline`` at once: wandb itself would find out
        slowly, and may hang.

        Raises:
            UserError: it is configured and wandb is not installed.
        """
        if config.mode == "disabled":
            return None
        if importlib.util.find_spec("wandb") is None:
            raise UserError(
                f"logging.wandb.mode is {config.mode}, but wandb is not installed; pip install 'fusiontree[wandb]' "
                f"or set logging.wandb.mode=disabled"
            )
        mode, note = config.mode, None
        if mode == "online":
            problem = unreachable(wandb_server(), _REACH_S)
            if problem:
                mode = "offline"
                note = (
                    f"the wandb server {wandb_server()} cannot be reached ({problem}); metrics go to {run_dir}/wandb, "
                    f"send them later with 'wandb sync'"
                )
        identity = run_dir.resolve().name
        options = {
            "after_step": after_step,
            "init": {
                "project": config.project,
                "entity": config.entity,
                "name": config.name or identity,
                "id": identity,
                "resume": "allow",
                "mode": mode,
                "dir": str(run_dir.resolve()),
                "config": values,
            },
        }
        with (run_dir / LOG).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "fusiontree.tracking.wandb_tracker", str(run_dir), json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the signals that stop training are not for it
            )
        return cls(process, mode, note)

    def failure(self) -> str | None:
        """Return why the tracker ended by itself, once; None while it runs."""
        code = self.process.poll()
        if code is None or self._told:
            return None
        self._told = True
        return f"the tracker ended with code {code}; see {LOG} in the run folder"

    def close(self, seconds: float = _FINISH_S) -> str | None:
        """Let the tracker send its rest, for so long; return what went wrong."""
        assert self.process.stdin
        try:
            self.process.stdin.close()
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # its helpers too
            self.process.wait()
            return f"the tracker had not sent all after {seconds:.0f} s and was ended"
        except OSError as error:
            return str(error)
        return f"the tracker ended with code {code}; see {LOG} in the run folder" if code and not self._told else None


def unreachable(address: str, seconds: float) -> str | None:
    """Return why ``address`` gives no HTTP answer within some seconds, or None when it gives one of any kind."""
    try:
        with urllib.request.urlopen(address, timeout=seconds):
            return None
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))


def follow(path: Path, after_step: int) -> Iterator[dict[str, Any] | None]:
    """Yield the records behind ``after_step`` as they are appended, and None when there is nothing new.

    A run that goes back rewrites the file; steps that were yielded before are not yielded again.
    """
    inode, position, last = 0, 0, after_step
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
                fresh = [json.loads(line) for line in whole.splitlines() if line]
        for record in fresh:
            if record["step"] > last or (record["step"] == last and "validation_loss" in record):
                last = record["step"]
                yield record
        yield None


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return nested metrics under names joined by slashes, as wandb groups them."""
    flat: dict[str, float] = {}
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
    import wandb

    run_dir, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    run = wandb.init(**options["init"])
    closing = False
    for record in follow(run_dir / "metrics.jsonl", options["after_step"]):
        if record is not None:
            run.log(flatten(record), step=record["step"])
        elif closing:
            break
        else:
            closing = _input_closed()
    run.finish()
    return 0


def _input_closed() -> bool:
    """Wait a moment; return whether the parent closed the pipe or is gone."""
    readable, _, _ = select.select([sys.stdin], [], [], _POLL_S)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    sys.exit(main())
