"""Formulas in the model file of exported folders: current, free of FusionTree, and refused where names clash."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fusiontree.convert import hf_assemble as assemble


def test_the_committed_file_is_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert assemble.main(["--check"]) == 0, "run python -m fusiontree.convert.hf_assemble"
    stale = tmp_path / "modeling_fusiontree.py"
    stale.write_text(assemble.TARGET.read_text().replace("F.silu", "F.gelu"))
    monkeypatch.setattr(assemble, "TARGET", stale)
    assert assemble.main(["--check"]) == 1 and "is not current" in capsys.readouterr().err
    assert assemble.main([]) == 0 and assemble.main(["--check"]) == 0


def test_the_file_stands_alone_and_defines_every_base_before_its_use():
    known = {"object"}
    for node in ast.parse(assemble.assembled()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "fusiontree." not in ast.unparse(node)
            known |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef):
            assert {base.id for base in node.bases if isinstance(base, ast.Name)} <= known, node.name
            known.add(node.name)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("return recomputed(F.gelu, self.up(x))", "return F.gelu(self.up(x))"),
        ("swiglu = fused(_swiglu, self.backend, x.device.type)", "swiglu = _swiglu"),
        ("a, b = project(x, (self.up, self.skip), joint=self.fused)", "a, b = self.up(x), self.skip(x)"),
        ("y = recomputed(fused(f, b, c), fused(g, b, c)(é))  # why", "y = f(g(é))  # why"),
        (
            "def f(config: ModelConfig):\n    self.backend = 1\n    return 2",
            "def f(config: FusionTreeConfig):\n    return 2",
        ),
    ],
)
def test_helpers_of_training_become_plain_calls(code: str, expected: str):
    assert assemble.plain(ast.parse(code).body[0], code.encode().split(b"\n")) == expected


def test_equal_names_of_different_things_are_refused():
    assembly = assemble.Assembly()
    assembly.add("fusiontree.ops.conv.reference", "one_token")
    assembly.origins["rms_norm"] = "fusiontree.ops.conv.reference"
    with pytest.raises(ValueError, match="define rms_norm; rename one of them"):
        assembly.add("fusiontree.ops.norm.reference", "rms_norm")
