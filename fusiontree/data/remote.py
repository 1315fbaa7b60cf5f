"""Files of datasets that are not on a local disk: object stores and HTTP through fsspec, or a command's output.

A failure to reach a place is no damage of the data: it is tried again with growing waits, and then ends the run. Only
a file that is plainly not there, or has the wrong content, is damage.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import select
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fusiontree.utils.errors import UserError, nearest
from fusiontree.utils.threads import Stopped, stop_wanted

log = logging.getLogger(__name__)

T = TypeVar("T")
_LONGEST_WAIT_S = 60.0
_STALL_S = 120.0
"""A transfer that brings nothing for so long has failed."""
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
_PACKAGES |= {"http": "aiohttp", "https": "aiohttp", "az": "adlfs", "abfs": "adlfs"}


class FileMissing(Exception):
    """A remote folder answers, and has no such file."""


class RemoteFolder(Protocol):
    """A place that holds a dataset's files."""

    url: str

    def download(self, name: str, target: Path) -> None:
        """Write the file ``name`` to ``target``, once, without trying again.

        Raises:
            FileMissing: the place has no such file.
            UserError: the place refuses us, so that trying again is no use.
            Exception: anything else that went wrong on the way.
        """
        ...


@dataclass(frozen=True)
class Retries:
    """How often to try, and how long to wait in between."""

    attempts: int
    wait_s: float

    def wait(self, attempt: int) -> None:
        """Wait after failed attempt number ``attempt`` (the first is 1); others' waits differ, so they spread.

        Raises:
            Stopped: the thread was told to end.
        """
        seconds = min(_LONGEST_WAIT_S, self.wait_s * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if stop_wanted():
                raise Stopped
            time.sleep(min(left, 0.1))

    def run(self, action: Callable[[], T], what: str) -> T:
        """Return what ``action`` returns.

        Raises:
            UserError: it failed in every attempt; ``what`` names it.
            FileMissing, Stopped: at once.
        """
        for attempt in range(1, self.attempts + 1):
            if stop_wanted():
                raise Stopped
            try:
                return action()
            except (FileMissing, UserError, Stopped):
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
                if attempt == self.attempts:
                    raise UserError(
                        f"{what} failed {attempt} times, the last time with {reason}; check the place and the network, "
                        f"or raise data.fetch_attempts"
                    ) from error
                log.warning("%s: attempt %d of %d failed (%s)", what, attempt, self.attempts, reason)
            self.wait(attempt)
        raise AssertionError("a loop over at least one attempt ends inside")


def is_remote(path: str) -> bool:
    """Return whether a dataset's path is a URL or a command, and not a folder."""
    return path.startswith("pipe:") or (
        re.match(r"[a-zA-Z][\w+.-]*://", path) is not None and not path.startswith("file://")
    )


def local_folder(path: str) -> Path:
    """Return the folder that a path which is not remote names."""
    return Path(path.removeprefix("file://")).expanduser()


def open_remote(path: str, options: dict[str, Any], allow_pipe: bool) -> RemoteFolder:
    """Return the remote folder at ``path``; nothing is read yet.

    Raises:
        UserError: no such protocol, its package is missing, or commands are not allowed.
    """
    if not path.startswith("pipe:"):
        return FsspecFolder(path, options)
    if not allow_pipe:
        raise UserError(f"'{path}' runs a shell command; set data.allow_pipe to true if you trust it")
    return CommandFolder(path)


class FsspecFolder:
    """A folder behind any protocol that fsspec knows."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        """Prepare; see :func:`open_remote`."""
        import fsspec

        self.url = url.rstrip("/")
        protocol = url.split("://", 1)[0]
        if protocol in ("http", "https"):
            options = {"client_kwargs": _http_timeouts(), **options}
        try:
            self._files = fsspec.filesystem(protocol, **options)
        except ImportError as error:
            known = f"; pip install {_PACKAGES[protocol]}" if protocol in _PACKAGES else ""
            raise UserError(f"'{url}' needs a package that is not here ({error}){known}") from error
        except ValueError as error:
            near = nearest(protocol, fsspec.available_protocols())
            raise UserError(f"'{url}': protocol '{protocol}' is unknown{near} ({error})") from error

    def download(self, name: str, target: Path) -> None:
        """See :class:`RemoteFolder`."""
        url = f"{self.url}/{name}"
        try:
            self._files.get_file(url, str(target))
        except FileNotFoundError as error:
            raise FileMissing(url) from error
        except PermissionError as error:
            raise UserError(f"{url}: access is refused ({error}); check the credentials") from error
        except Exception as error:
            if getattr(error, "status", None) in (401, 403):
                raise UserError(f"{url}: access is refused ({error}); check the credentials") from error
            raise


def _http_timeouts() -> dict[str, Any]:
    try:
        import aiohttp
    except ImportError:
        return {}  # fsspec says that it is missing
    # The default ends a transfer after five minutes, however well it goes.
    return {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30.0, sock_read=_STALL_S)}


# A watcher in the background waits for the end of standard input, which is the end of the trainer, and kills the
# command's whole process group; the command itself reads nothing.
_GUARD = "exec 3<&0 </dev/null; (read _ <&3; kill -9 0) >/dev/null 2>&1 & exec 3<&-\n"


class CommandFolder:
    """``pipe:COMMAND``: the output of a shell command, ``{name}`` in it replaced by the file's name."""

    def __init__(self, url: str) -> None:
        """Prepare; see :func:`open_remote`."""
        if "{name}" not in url:
            raise UserError(f"'{url}' does not say where a file's name goes; write {{name}} there")
        self.url = url
        self._command = url.removeprefix("pipe:")

    def download(self, name: str, target: Path) -> None:
        """See :class:`RemoteFolder`. A command that fails or falls silent is killed and is an OSError."""
        command = self._command.replace("{name}", shlex.quote(name))
        ours, theirs = os.pipe()  # its end with us closes with us, however we end
        with tempfile.TemporaryFile() as messages, target.open("wb") as output:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD + command],
                stdin=ours,
                stdout=subprocess.PIPE,
                stderr=messages,
                start_new_session=True,
            )
            assert process.stdout is not None
            try:
                while True:
                    if not select.select([process.stdout], [], [], _STALL_S)[0]:
                        raise OSError(f"'{command}' brought nothing for {_STALL_S:.0f} s")
                    data = process.stdout.read1(1 << 20)  # type: ignore[attr-defined]
                    if not data:
                        break
                    output.write(data)
                code = process.wait(_STALL_S)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                process.stdout.close()
                os.close(ours)
                os.close(theirs)
            if code:
                messages.seek(0)
                said = messages.read()[-500:].decode(errors="replace").strip()
                raise OSError(f"'{command}' ended with exit code {code}: {said}")
