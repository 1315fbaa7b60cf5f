"""DeepSpeed's private members are used in the adapter's two modules alone, and other versions are refused."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fusiontree.engines.zero.deepspeed_adapter import SUPPORTED, check_version
from fusiontree.engines.zero.deepspeed_optimizer import STAGE_1_2_MEMBERS, STAGE_3_MEMBERS
from fusiontree.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ADAPTER = {"fusiontree/engines/zero/deepspeed_adapter.py", "fusiontree/engines/zero/deepspeed_optimizer.py"}
PATTERN = re.compile(r"ds_[a-z0-9_]+$|_?PartitionedParameterCoordinator")
MEMBERS = {*STAGE_3_MEMBERS, *STAGE_1_2_MEMBERS}


def violations(path: str, source: str) -> list[str]:
    """Return the places where a module other than the adapter uses a private member of a DeepSpeed object."""
    if path in ADAPTER:
        return []
    found = []
    for node in ast.walk(ast.parse(source)):
        name = None
        if isinstance(node, ast.Attribute):
            name = node.attr
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            private = name.startswith("_") and not name.startswith("__") and owner not in ("self", "cls", "torch")
            if private and path.startswith("fusiontree/engines/zero/"):
                found.append(f"{path}:{node.lineno} uses {name}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            name = node.value
        if name is not None and (name in MEMBERS or PATTERN.match(name)):
            found.append(f"{path}:{node.lineno} uses {name}")
    return found


def test_only_the_adapter_uses_private_members() -> None:
    found = []
    for folder in ("tools", "fusiontree"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if "convert" not in file.parts:  # reads and writes the names of DeepSpeed's files, not its objects
                found += violations(str(file.relative_to(ROOT)), file.read_text(encoding="utf-8"))
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "zero.averaged_gradients",
        "parameter.ds_tensor",
        'getattr(parameter, "ds_id")',
        "self._engine.optimizer._epilogue()",
        'setattr(zero, "update_lp_params", print)',
    ],
)
def test_the_scan_finds(code: str) -> None:
    assert violations("fusiontree/engines/zero/engine.py", code)


@pytest.mark.parametrize("version", ["0.19.8", "0.19.9", "0.19.8+cu130"])
def test_supported_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.19.7", "0.20.0", "0.20.0rc1", "1.0"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(UserError, match=re.escape(version)) as refused:
        check_version(version)
    assert "pip install 'deepspeed>=0.19.8,<0.20.0'" in str(refused.value)


def test_the_range_is_that_of_the_extra() -> None:
    low, high = (".".join(map(str, version)).removesuffix(".0") for version in SUPPORTED)
    assert f"deepspeed>={low},<{high}" in (ROOT / "setup.py").read_text(encoding="utf-8")
