"""Copies formulas of the trained model into ``hf_model/modeling_fusiontree.py``, the model file of exported folders.

    python -m fusiontree.convert.hf_assemble [--check]

The rest of that file is a shell around the formulas: decoding cache, layers and transformers' classes. A definition is
copied together with the definitions that it uses; :class:`_Plain` replaces the helpers of training in it.
"""

from __future__ import annotations

import argparse
import ast
import sys
from importlib.util import find_spec
from pathlib import Path

TARGET = Path(__file__).parent / "hf_model" / "modeling_fusiontree.py"
COPIED = {
    "fusiontree.ops.norm.reference": ("rms_norm", "gated_rms_norm"),
    "fusiontree.ops.conv.reference": ("shifted_products",),
    "fusiontree.ops.ssd.reference": ("scan_segments",),
    "fusiontree.ops.gated_delta.chunked": ("gated_delta_segments",),
    "fusiontree.ops.gated_delta.formulas": ("decay_and_beta", "norm_then_gate", "unit_length"),
    "fusiontree.ops.rotary.reference": ("rotary_tables", "apply_rotary"),
    "fusiontree.ops.attention.reference": ("visible_keys",),
    "fusiontree.ops.attention.sdpa": ("sdpa",),
    "fusiontree.ops.gate.reference": ("mix",),
    "fusiontree.models.srte": ("sincos_encoding",),
    "fusiontree.models.gate": ("Alignment", "BranchNorm", "FusionGate", "even_mix"),
    "fusiontree.models.block": ("MLP",),
}
"""Definitions that the shell uses, per module."""
REFERENCES = ("rms_norm", "gelu_product", "add_product")
"""Operations of which the formula in their module ``reference`` is copied."""
BEGIN = "# ---- Copied by python -m fusiontree.convert.hf_assemble; change the named modules instead. ----\n"
END = "# ---- End of the copied definitions. ----\n"


class Module:
    """Source, top-level definitions and imports of one module."""

    def __init__(self, name: str) -> None:
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None, f"{name} does not exist"
        self.lines = Path(spec.origin).read_bytes().split(b"\n")
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, str] = {}
        """Module of each name that is imported with ``from``."""
        for node in ast.parse(b"\n".join(self.lines)).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.definitions[node.targets[0].id] = node
            elif isinstance(node, ast.ImportFrom):
                self.imports |= {alias.name: str(node.module) for alias in node.names}


class _Plain(ast.NodeVisitor):
    """Finds the edits that make a definition of the training code independent of it.

    ``recomputed(f, x)`` becomes ``f(x)``, ``fused(f, ...)`` becomes ``f``, ``project(x, (a, b), ...)`` becomes
    ``a(x), b(x)``, with ``x`` as the last if it is passed on, or ``[module(x) for module in modules]`` if there is no
    literal tuple; ``ModelConfig`` becomes ``FusionTreeConfig``, and settings of kernels are dropped.
    """

    def __init__(self, lines: list[bytes]) -> None:
        self.lines = lines
        self.edits: list[tuple[ast.expr | ast.stmt, str | None]] = []

    def visit_Call(self, node: ast.Call) -> None:
        """Replace the helpers."""
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name == "recomputed":
            formula, *inputs = (plain(argument, self.lines) for argument in node.args)
            self.edits.append((node, f"{formula}({', '.join(inputs)})"))
        elif name == "fused":
            self.edits.append((node, plain(node.args[0], self.lines)))
        elif name == "project":
            self.edits.append((node, self._projected(*node.args, passes="passes" in [k.arg for k in node.keywords])))
        elif name in REFERENCES:
            inputs = [plain(argument, self.lines) for argument in node.args]
            self.edits.append((node, f"{name}({', '.join(inputs)})"))
        else:
            self.generic_visit(node)

    def _projected(self, x_node: ast.expr, modules: ast.expr, *, passes: bool) -> str:
        x = plain(x_node, self.lines)
        if not isinstance(modules, ast.Tuple):
            assert not passes, "project(passes=True) is copied only with a literal tuple of modules"
            return f"[module({x}) for module in {plain(modules, self.lines)}]"
        return ", ".join([*(f"{plain(module, self.lines)}({x})" for module in modules.elts), *([x] if passes else [])])

    def visit_Assign(self, node: ast.Assign) -> None:
        """Drop backend settings."""
        target = node.targets[0]
        if getattr(target, "attr", getattr(target, "id", "")) in ("backend", "fused_projections"):
            self.edits.append((node, None))
        else:
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        """Replace the type of the configuration."""
        if node.id == "ModelConfig":
            self.edits.append((node, "FusionTreeConfig"))


def plain(node: ast.expr | ast.stmt, lines: list[bytes]) -> str:
    """Return the source text of ``node`` with the edits of :class:`_Plain`."""
    visitor = _Plain(lines)
    visitor.visit(node)
    first, column, last, end = _range(node)
    text = [*lines[first : last + 1]]
    text[-1] = text[-1] if isinstance(node, ast.stmt) else text[-1][:end]  # with the comment behind a statement
    for part, new in sorted(visitor.edits, key=lambda edit: _range(edit[0]), reverse=True):
        begin, left, until, right = _range(part)
        begin, until = begin - first, until - first
        if new is None:
            blank = begin and until + 1 < len(text) and not text[begin - 1].strip() and not text[until + 1].strip()
            text[begin : until + 1 + int(bool(blank))] = []
        else:
            text[begin : until + 1] = [text[begin][:left] + new.encode() + text[until][right:]]
    text[0] = text[0][column:]
    return b"\n".join(text).decode()


def _range(node: ast.expr | ast.stmt) -> tuple[int, int, int, int]:
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    assert node.end_lineno is not None and node.end_col_offset is not None
    return first - 1, node.col_offset, node.end_lineno - 1, node.end_col_offset


class Assembly:
    """Copied definitions, each after the definitions that it uses."""

    def __init__(self) -> None:
        self.modules: dict[str, Module] = {}
        self.texts: dict[str, str] = {}
        self.origins: dict[str, str] = {}
        """Module of each definition."""

    def add(self, module_name: str, name: str) -> None:
        """Add a definition and the definitions that it uses.

        Raises:
            ValueError: two modules define different things under one name.
        """
        if self.origins.setdefault(name, module_name) != module_name:
            raise ValueError(f"both {module_name} and {self.origins[name]} define {name}; rename one of them")
        if name in self.texts:
            return
        if module_name not in self.modules:
            self.modules[module_name] = Module(module_name)
        module = self.modules[module_name]
        text = plain(module.definitions[name], module.lines)
        self.texts[name] = text  # set before the recursion, which definitions that use each other would not end
        for used in [node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name) and node.id != name]:
            if used in module.definitions:
                self.add(module_name, used)
            elif module.imports.get(used, "").startswith("fusiontree."):
                self.add(module.imports[used] + (".reference" if used in REFERENCES else ""), used)
        self.texts[name] = self.texts.pop(name)

    def section(self) -> str:
        """Return the section of the model file between :data:`BEGIN` and :data:`END`."""
        text = BEGIN
        for name, definition in self.texts.items():
            text += f"\n\n# {self.origins[name]}\n{definition}\n"
        return text + "\n\n" + END


def assembled() -> str:
    """Return the text of the model file with its section of copied definitions renewed."""
    assembly = Assembly()
    for module, names in COPIED.items():
        for name in names:
            assembly.add(module, name)
    before, _, rest = TARGET.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{TARGET} lacks the lines that begin and end its copied definitions"
    return before + assembly.section() + after


def main(arguments: list[str] | None = None) -> int:
    """Renew the copied definitions in the model file, or compare them with their modules."""
    parser = argparse.ArgumentParser(prog="python -m fusiontree.convert.hf_assemble", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file is not current")
    if not parser.parse_args(arguments).check:
        TARGET.write_text(assembled(), encoding="utf-8")
    elif TARGET.read_text(encoding="utf-8") != assembled():
        print(f"{TARGET} is not current; run python -m fusiontree.convert.hf_assemble", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
