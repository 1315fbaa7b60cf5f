"""Files of remote datasets: object stores and HTTP through fsspec, or a command's output.

A network failure is not data damage: the access is retried with growing waits; if all attempts fail, the run ends. Only
a file that is definitely missing or has wrong content counts as damage.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
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

from fusiontree.data.config import LONGEST_WAIT_S
from fusiontree.utils.errors import UserError, nearest
from fusiontree.utils.threads import Stopped, stop_wanted

log = logging.getLogger(__name__)

T = TypeVar("T")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}
_PACKAGES |= {"http": "aiohttp", "https": "aiohttp", "az": "adlfs", "abfs": "adlfs"}


class FileMissing(Exception):
    """The remote folder responds but does not contain the file."""


class RemoteFolder(Protocol):
    """A remote location of a dataset's files."""

    url: str

    def download(self, name: str, target: Path) -> None:
        """Download the file ``name`` to ``target``, without retries.

        Raises:
            FileMissing: the folder does not contain the file.
            UserError: access is denied, so that retries are useless.
            Exception: any other failure.
        """
        ...


@dataclass(frozen=True)
class Retries:
    """Number of attempts and waits between them."""

    attempts: int
    wait_s: float

    def wait(self, attempt: int) -> None:
        """Wait after failed attempt number ``attempt`` (the first is 1); waits are randomized per process.

        Raises:
            Stopped: the thread was told to end.
        """
        seconds = min(LONGEST_WAIT_S, self.wait_s * 2.0 ** min(attempt - 1, 64)) * random.uniform(0.5, 1.0)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if stop_wanted():
                raise Stopped
            time.sleep(min(left, 0.1))

    def run(self, action: Callable[[], T], what: str) -> T:
        """Return the result of ``action``, with retries.

        Raises:
            UserError: every attempt failed; the message begins with ``what``.
            FileMissing, Stopped: not retried.
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
                        f"{what} failed {attempt} times, the last time with {reason}; check the address and the "
                        f"network, or raise data.fetch_attempts"
                    ) from error
                log.warning("%s: attempt %d of %d failed (%s)", what, attempt, self.attempts, reason)
            self.wait(attempt)
        raise AssertionError("a loop over at least one attempt ends inside")


def local_folder(path: str) -> Path:
    """Return the folder of a path that is not remote."""
    return Path(path.removeprefix("file://")).expanduser()


def open_remote(path: str, options: dict[str, Any], allow_pipe: bool, stall_s: float = 60.0) -> RemoteFolder:
    """Return the remote folder at ``path``, without reading anything; a transfer silent for ``stall_s`` has failed.

    Raises:
        UserError: the protocol is unknown, its package is missing, or commands are not allowed.
    """
    if not path.startswith("pipe:"):
        return FsspecFolder(path, options, stall_s)
    if not allow_pipe:
        raise UserError(f"'{path}' runs a shell command; set data.allow_pipe to true if you trust it")
    return CommandFolder(path, stall_s)


class FsspecFolder:
    """A folder behind any protocol that fsspec knows."""

    def __init__(self, url: str, options: dict[str, Any], stall_s: float = 60.0) -> None:
        """Prepare; see :func:`open_remote`."""
        import fsspec

        self.url = url.rstrip("/")
        protocol = url.split("://", 1)[0]
        if protocol in ("http", "https"):
            options = {"client_kwargs": _http_timeouts(stall_s), **options}
        try:
            self._files = fsspec.filesystem(protocol, **options)
        except ImportError as error:
            known = f"; pip install {_PACKAGES[protocol]}" if protocol in _PACKAGES else ""
            raise UserError(f"'{url}' needs a package that is not installed ({error}){known}") from error
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
        except Exception as error:
            if isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403):
                raise UserError(f"{url}: access is refused ({error}); check the credentials") from error
            raise


def _http_timeouts(stall_s: float) -> dict[str, Any]:
    try:
        import aiohttp
    except ImportError:
        return {}  # fsspec reports the missing package
    # aiohttp's default ends every transfer after five minutes, even if it makes progress.
    return {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=min(30.0, stall_s), sock_read=stall_s)}


# A background process waits until standard input closes, which happens when the trainer ends, and then kills the
# command's process group. The command's standard input is empty.
_GUARD = "exec 3<&0 </dev/null; (read _ <&3; kill -9 0) >/dev/null 2>&1 & exec 3<&-\n"


class CommandFolder:
    """``pipe:COMMAND``: the output of a shell command, ``{name}`` in it replaced by the file's name."""

    def __init__(self, url: str, stall_s: float = 60.0) -> None:
        """Prepare; see :func:`open_remote`."""
        if "{name}" not in url:
            raise UserError(f"'{url}' does not contain {{name}}; write {{name}} where the command takes a file's name")
        self.url = url
        self._command, self._stall_s = url.removeprefix("pipe:"), stall_s

    def download(self, name: str, target: Path) -> None:
        """See :class:`RemoteFolder`. A command that fails or stalls is killed and raises OSError."""
        command = self._command.replace("{name}", shlex.quote(name))
        ours, theirs = os.pipe()  # the write end closes when this process ends, for any reason
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
                    if not select.select([process.stdout], [], [], self._stall_s)[0]:
                        raise OSError(f"'{command}' sent no data for {self._stall_s:.0f} s")
                    data = process.stdout.read1(1 << 20)  # type: ignore[attr-defined]
                    if not data:
                        break
                    output.write(data)
                code = process.wait(self._stall_s)
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
