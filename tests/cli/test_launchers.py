"""Launchers answer questions about a run in one process, without starting ranks."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.runs import ROOT, environment


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "srun"])
@pytest.mark.parametrize(("option", "shown"), [("--help", "usage: "), ("--print-config", "num_layers: 5")])
def test_launchers_answer_without_ranks(launcher: str, option: str, shown: str) -> None:
    command = [str(ROOT / "launchers" / f"{launcher}.sh"), "--config", "quickstart", "model.num_layers=5", option]
    env = environment() | {"FUSIONTREE_PYTHON": sys.executable}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    assert ("FUSIONTREE_PYTHON" in done.stdout) == (option == "--help")  # the launcher's own variables


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "srun"])
def test_a_python_that_does_not_exist_is_not_replaced(launcher: str) -> None:
    env = environment() | {"FUSIONTREE_PYTHON": "/nowhere/python"}
    command = [str(ROOT / "launchers" / f"{launcher}.sh"), "--config", "quickstart", "--print-run-dir"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "/nowhere/python" in done.stderr


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "srun"])
def test_a_python_without_the_packages_is_named(launcher: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "launchers", tmp_path / "launchers")
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')  # without site-packages
    (programs / "python3").chmod(0o755)
    env = environment() | {"PATH": f"{programs}:/usr/bin:/bin"}
    env.pop("FUSIONTREE_PYTHON", None)
    command = [str(tmp_path / "launchers" / f"{launcher}.sh"), "--config", "quickstart", "--print-run-dir"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {programs}/python3 lacks the packages")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("tool", ["quickstart", "fault_campaign"])
def test_tools_called_by_their_path_answer_help_from_any_folder(tool: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), "--help"]
    env = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    assert list(tmp_path.iterdir()) == []
