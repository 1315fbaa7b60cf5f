"""The Dockerfile: its instructions, the files and extras it names, and that its files make a complete package.

The image is not built here. What can be wrong without a build is checked against the repository.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.runs import ROOT, environment
from tests.test_install import setup_arguments

INSTRUCTIONS = {"ARG", "COPY", "ENV", "FROM", "RUN", "WORKDIR"}
PYTHON = "/usr/local/bin/fusiontree-python"


def instructions() -> list[tuple[str, str]]:
    """Return each instruction of the Dockerfile with its arguments; comments dropped, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, rest) for name, rest in pairs]


def copied() -> list[tuple[str, str]]:
    """Return source and target of each copied path."""
    pairs = []
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = rest.split()
            pairs += [(s, target if len(sources) == 1 and not target.endswith("/") else target + s) for s in sources]
    return pairs


def arguments() -> dict[str, str]:
    """Return the build arguments with their defaults."""
    return dict(rest.split("=", 1) for name, rest in instructions() if name == "ARG")


def test_instructions_are_known_and_in_order() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) <= INSTRUCTIONS
    assert names[:2] == ["ARG", "FROM"] and names.count("FROM") == 1
    assert dict(instructions())["FROM"] == "${BASE}"
    for name, rest in instructions():
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)
        if name in ("ENV", "ARG"):
            assert all(re.fullmatch(r"[A-Z_]+=\S*", word) for word in shlex.split(rest)), rest


def test_the_base_image_has_a_torch_that_the_package_accepts() -> None:
    from packaging.requirements import Requirement

    requirement = next(r for r in setup_arguments()["install_requires"] if r.startswith("torch"))
    version = re.fullmatch(r"pytorch/pytorch:([\d.]+)-cuda13\.\d+-cudnn\d+-devel", arguments()["BASE"])
    assert version and version[1] in Requirement(requirement).specifier


def test_extras_exist() -> None:
    wanted = set(arguments()["EXTRAS"].split(","))
    assert wanted <= set(setup_arguments()["extras_require"]) and {"cuda", "deepspeed"} <= wanted


def test_the_build_arguments_of_its_description_exist() -> None:
    described = re.findall(r"--build-arg (\w+)=", (ROOT / "Dockerfile").read_text())
    assert described and set(described) == set(arguments())


def test_copied_paths_exist_and_reach_the_build() -> None:
    first, *patterns = [
        line for line in (ROOT / ".dockerignore").read_text().split("\n") if line and not line.startswith("#")
    ]
    assert first == "*"
    kept = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    for source, _ in copied():
        assert (ROOT / source).exists(), source
        assert source in kept, f"{source} is left out by .dockerignore"
        assert not any(fnmatch.fnmatch(source, p) for p in patterns if not p.startswith("!"))
    assert kept == {source for source, _ in copied()}


def test_the_copied_files_make_the_package(tmp_path: Path) -> None:
    """Builds the package from the copied files alone: modules, the report's page and example configurations."""
    ignored = shutil.ignore_patterns("__pycache__")
    for source, target in copied():
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / target, ignore=ignored)
        else:
            shutil.copy(ROOT / source, tmp_path / target)
    command = [sys.executable, "setup.py", "--quiet", "build", "--build-base", "out"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120, capture_output=True)
    built = tmp_path / "out" / "lib" / "fusiontree"

    def files(folder: Path) -> set[Path]:
        return {p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.suffix not in (".pyc", "")}

    assert files(built) == files(ROOT / "fusiontree") | {Path("configs") / p for p in files(ROOT / "configs")}


def test_its_python_is_the_one_that_is_documented() -> None:
    run = " ".join(rest for name, rest in instructions() if name == "RUN")
    assert f"> {PYTHON}" in run and f"chmod 755 {PYTHON}" in run
    assert PYTHON in (ROOT / "docs/cluster.md").read_text() and PYTHON in (ROOT / "slurm/site.example.sh").read_text()


@pytest.mark.parametrize(
    "srun_args",
    [
        "--container-image=/images/a.sqsh --container-mounts=/shared:/shared",
        "apptainer exec --nv --bind /shared /a.sif",
    ],
    ids=["pyxis", "apptainer"],
)
def test_programs_of_a_job_run_in_the_container(tmp_path: Path, srun_args: str) -> None:
    """A python that this machine does not have is looked for inside the container, by every program of the job."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    values = {"FUSIONTREE_PYTHON": PYTHON, "SRUN_ARGS": srun_args, "PATH": f"{tmp_path}:{environment()['PATH']}"}
    values |= {"SLURM_JOB_ID": "1", "NNODES": "1", "PROCESSES": "1", "MASTER_ADDR": "localhost"}
    check = f"source {ROOT}/slurm/functions.sh && ask fusiontree.train --check"
    programs = {"--check": ["bash", "-c", check], "--config": [f"{ROOT}/launchers/srun.sh", "--config=a"]}
    for option, command in programs.items():
        done = subprocess.run(command, env=environment() | values, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert f"{srun_args} {PYTHON} -m fusiontree.train {option}" in done.stdout
