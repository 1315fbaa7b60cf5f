"""The pinned CPU environment installs from the package index alone, on every supported Python.

Fault of a former version: the pins went together with a wheel of torch that only one machine had. With the torch that
everybody else downloads they could not be installed. Here uv resolves them from the index's metadata: it reads no local
folder of wheels and no installed package, and downloads no wheel.
"""

from __future__ import annotations

import functools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ".ci/constraints-cpu.txt"
SOURCE_ONLY = "deepspeed"  # is published without wheels; everything else must have one


def setup_arguments() -> dict[str, Any]:
    """Return the arguments that setup.py gives to ``setuptools.setup``."""
    with patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return setup.call_args.kwargs


@functools.cache
def index_variables() -> dict[str, str]:
    """Return variables that send uv to the index that pip uses here; PyPI where none is configured."""
    listing = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    settings = dict(re.findall(r"(?m)^(\S+?)='(.*)'$", listing))
    names = {"index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE"}
    sections = ("global", "install", ":env:")  # the later one wins, as in pip
    return {
        variable: settings[f"{section}.{name}"]
        for name, variable in names.items()
        for section in sections
        if f"{section}.{name}" in settings
    }


def resolve(requirements: list[str], *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Print the versions that would be installed for ``requirements``."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-config", "--no-python-downloads"]
    ours = {k: v for k, v in os.environ.items() if k != "UV_FIND_LINKS"}
    return subprocess.run(
        [*command, "--no-header", "--no-annotate", *options, "-"],
        input="\n".join(requirements),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=index_variables() | ours | variables,
    )


def development_requirements() -> list[str]:
    """Return what ``pip install '.[dev]'`` asks for, read from setup.py as it is now."""
    given = setup_arguments()
    return given["install_requires"] + given["extras_require"]["dev"]


@pytest.fixture(scope="module")
def index() -> None:
    """Skip where no package index answers."""
    answer = resolve(["packaging"], "--no-deps", "--refresh", UV_HTTP_TIMEOUT="15", UV_HTTP_RETRIES="1")
    if answer.returncode:
        pytest.skip(f"no package index answers, so constraints cannot be resolved: {answer.stderr.strip()}")


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize(
    ("python", "machine"), [("3.11", "x86_64"), ("3.12", "x86_64"), ("3.13", "x86_64"), ("3.13", "aarch64")]
)
def test_constraints_resolve_on_the_index_and_pin_every_package(python: str, machine: str) -> None:
    resolved = resolve(
        development_requirements(),
        *["--constraint", CONSTRAINTS, "--only-binary", ":all:", "--no-binary", SOURCE_ONLY],
        *["--python-version", python, "--python-platform", f"{machine}-manylinux_2_28"],
    )
    place = f"{CONSTRAINTS} on Python {python}, Linux, {machine}"
    assert not resolved.returncode, f"{place} cannot be installed; run `make constraints`:\n{resolved.stderr}"
    versions = [line.partition(" ;")[0] for line in resolved.stdout.splitlines()]
    pins = {line.partition(" ;")[0] for line in (ROOT / CONSTRAINTS).read_text().splitlines()}
    loose = sorted(set(versions) - pins)
    assert versions and not loose, f"{place} leaves versions open: {loose}; run `make constraints`"
