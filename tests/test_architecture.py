"""The import rules: which room may import which, read from the source, function-local imports included."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "fusiontree"

# room -> rooms it may import besides itself
ROOMS: dict[str, set[str]] = {
    "utils": set(),
    "ops": {"utils"},
    "optim": {"ops", "utils"},
    "data": {"utils"},
    "models": {"ops", "utils"},
    "parallel": {"data.batch", "models", "ops", "utils"},
    "engines": {"data.batch", "models", "optim", "parallel", "utils"},
    "checkpoint": {"models", "parallel", "utils"},
    "convert": {"checkpoint", "models", "ops", "optim", "parallel", "utils"},  # ops: formulas of the assembled export
    "tracking": {"utils"},
    "supervision": {"engines.base", "tracking", "utils"},
    "training": {"engines.base", "data", "checkpoint", "supervision", "tracking", "utils"},
    "planning": {"parallel", "models", "engines.base", "utils"},
    "generation": {"models", "checkpoint", "utils"},
    "evaluation": {"parallel", "models", "ops", "generation", "data", "checkpoint", "tracking", "utils"},
    "benchmarking": {"training", "supervision", "engines.base", "data", "models", "ops", "utils"},
    "pruning": {"checkpoint", "convert", "data", "models", "parallel", "tracking", "utils"},
    "config": {"utils"},
    "studying": {"config", "models", "planning", "tracking", "utils"},
}
"""Besides these, every room may import any room's config.py, config/root.py (these sections together) and
config/moved.py: they import only utils."""
ROOMS["cli"] = set(ROOMS)  # beside it, only entry points import cli
# third-party package -> folders whose files may import it
RESERVED: dict[str, set[str]] = {
    "deepspeed": {"engines", "convert"},
    "megatron": {"convert", "data"},
    "mamba_ssm": {"ops"},
    "causal_conv1d": {"ops"},
    "flash_attn": {"ops"},
    "fla": {"ops"},
    "triton": {"ops"},
    "wandb": {"tracking"},
    "tensorboard": {"tracking"},
    "tqdm": {"tracking"},
    "pyarrow": {"data"},
    "lm_eval": {"evaluation", "cli"},
}
# Files that are copied into exported folders, where they stand beside each other without us.
EXPORTED = ROOT / "convert" / "hf_model"
EXPORTS_MAY_IMPORT = {
    "__future__",
    "collections",
    "copy",
    "math",
    "sys",
    "typing",
    "torch",
    "transformers",
    "configuration_fusiontree",
}
NO_DISTRIBUTED = {"models", "ops", "data", "generation"}
SOURCES = sorted(ROOT.rglob("*.py"))


def imported_modules(tree: ast.AST, relative: bool = False) -> list[tuple[str, int]]:
    """Return every imported module with its line; ``from a import b`` counts as ``a.b``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert relative or node.level == 0, f"relative import in line {node.lineno}; write the whole name"
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def room_of(path: Path) -> str | None:
    """The room a file lies in; None for entry points beside the rooms."""
    parts = path.relative_to(ROOT).parts
    return parts[0] if len(parts) > 1 else None


def violations(path: Path, text: str) -> list[str]:
    """Every broken import rule of one file."""
    room = room_of(path)
    problems = []
    folder = path.relative_to(ROOT).parent.as_posix()
    for module, line in imported_modules(ast.parse(text), relative=path.parent == EXPORTED):
        where = f"{path.relative_to(ROOT.parent)}:{line} imports {module}"
        top, *rest = module.split(".")
        if top in RESERVED and not any(f"{folder}/".startswith(f"{place}/") for place in RESERVED[top]):
            problems.append(f"{where}: only {sorted(RESERVED[top])} may")
        if module.startswith("torch.distributed") and room in NO_DISTRIBUTED:
            problems.append(f"{where}: {room} knows no other process")
        if path.parent == EXPORTED and top not in EXPORTS_MAY_IMPORT:
            problems.append(f"{where}: exports stand alone")
        if top != "fusiontree" or room is None:
            continue
        target = rest[0] if rest else ""
        if target not in ROOMS and rest and (ROOT / f"{target}.py").exists():
            problems.append(f"{where}: nothing imports an entry point")
            continue
        if target in ("", room, "__version__"):
            continue
        if rest[1:2] == ["config"] or rest[:2] in (["config", "moved"], ["config", "root"]):
            continue
        allowed = ROOMS[room]
        if target not in allowed and ".".join(rest[:2]) not in allowed:
            problems.append(f"{where}: {room} may import {sorted(allowed)}")
    return problems


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_rules(path: Path) -> None:
    assert not violations(path, path.read_text())


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("models/x.py", "def f():\n    import torch.distributed as dist"),
        ("models/x.py", "from fusiontree.parallel.layout import Layout"),
        ("training/x.py", "from fusiontree.engines.torch_engine import TorchEngine"),
        ("data/x.py", "from fusiontree.models.model import FusionTreeModel"),
        ("supervision/x.py", "from fusiontree.training.loop import Trainer"),
        ("tracking/x.py", "from fusiontree.supervision.watchdog import Watchdog"),
        ("parallel/x.py", "import deepspeed"),
        ("checkpoint/x.py", "import deepspeed"),
        ("convert/hf_model/x.py", "from fusiontree.utils.errors import UserError"),
        ("models/x.py", "from flash_attn import flash_attn_func"),
        ("engines/x.py", "from fusiontree.train import main"),
        ("training/x.py", "from fusiontree.cli.program import run_program"),
        ("config/x.py", "from fusiontree.models.model import FusionTreeModel"),
    ],
)
def test_rules_bite(place: str, code: str) -> None:
    assert violations(ROOT / place, code)


def test_every_folder_is_a_known_room() -> None:
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert folders <= ROOMS.keys()


def test_environment_is_read_in_one_place() -> None:
    readers = [p for p in SOURCES if "os.environ" in p.read_text() or "getenv" in p.read_text()]
    assert [p.relative_to(ROOT).as_posix() for p in readers] == ["utils/environment.py"]


def test_process_groups_are_made_in_one_place() -> None:
    makers = ("init_process_group", "new_group", "init_device_mesh")
    found = {p.relative_to(ROOT).as_posix() for p in SOURCES if any(f"{m}(" in p.read_text() for m in makers)}
    assert found <= {"parallel/layout.py"}


@pytest.mark.parametrize(
    "done", ["import fusiontree.config.load", "import fusiontree.cli; fusiontree.cli.main(['--help'])"]
)
def test_what_must_be_quick_needs_no_torch(done: str) -> None:
    import subprocess
    import sys

    code = f"import sys; {done}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("op", sorted(p.name for p in (ROOT / "ops").iterdir() if (p / "__init__.py").exists()))
def test_every_op_has_a_reference_and_a_gradient_test(op: str) -> None:
    assert (ROOT / "ops" / op / "reference.py").is_file()
    tests = list((ROOT.parent / "tests" / "ops").glob(f"test_{op}*.py"))
    assert tests, f"no tests/ops/test_{op}*.py"
    text = "".join(t.read_text() for t in tests)
    assert "grad" in text
