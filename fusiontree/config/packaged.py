"""Finds the configurations and maps of an installation, which are ``configs/`` of the clone."""

from __future__ import annotations

from pathlib import Path

from fusiontree.utils.errors import nearest


def packaged_folder() -> Path:
    """Return the folder with the YAML files: inside an installed package, beside the package in a clone."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"  # setup.py copies it there
    return installed if installed.is_dir() else package.parent / "configs"


def packaged_names(kind: str = "") -> list[str]:
    """Return the names that stand for a packaged file; ``kind`` is ``maps``, ``study``, or empty for configurations."""
    folder = packaged_folder() / kind
    names = (file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))
    return sorted(name for name in names if kind or not name.startswith(("maps/", "study/")))


def find_file(given: Path, kind: str = "") -> Path:
    """Return the packaged file if ``given`` is its name and no such file exists, else ``given`` unchanged."""
    known = given.as_posix() in packaged_names(kind) and not given.is_file()
    return packaged_folder() / kind / f"{given.as_posix()}.yaml" if known else given


def hint_for(given: Path, kind: str = "") -> str:
    """Return the end of an error about a missing file: a file with a similar name, and the packaged names."""
    names = packaged_names(kind)
    beside = [file.name for file in given.parent.glob("*.yaml")] if given.parent.is_dir() else []
    near = nearest(given.name, beside) or nearest(given.as_posix(), names)
    return f"{near}; packaged names are {', '.join(names)}" if names else near
