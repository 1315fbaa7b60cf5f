"""Assembles ``hf_model/modeling_fusiontree.py`` from this folder's files and the definitions that they import.

    python -m fusiontree.convert.hf_source.assemble [--check]

A definition that is imported from FusionTree is copied together with the definitions that it uses; :class:`_Plain`
replaces the helpers of training in it.
"""

from __future__ import annotations

import argparse
import ast
import sys
from importlib.util import find_spec
from pathlib import Path

TARGET = Path(__file__).parents[1] / "hf_model" / "modeling_fusiontree.py"
HEADER = '''"""FusionTree language model for transformers, in one file of plain PyTorch (no kernels, any device).

Every layer reads the sequence twice in parallel, by a Mamba-2 mixer and by attention whose first heads see a window and
whose last heads see all earlier tokens; a gate mixes the two outputs per token and channel.

Shape legend: B rows, S new tokens, T cached and new tokens, C channels, K key/value heads or taps of a convolution, D
channels of an attention head, V vocabulary; H heads, G groups of B and C, R heads of a group, P channels of a head and
N size of the state of a Mamba-2 mixer; c scan chunks, Q tokens of a scan chunk.

Assembled by ``python -m fusiontree.convert.hf_source.assemble`` from these modules; change them and not this file:
{modules}
"""

from __future__ import annotations
'''


class Module:
    """Source, top-level definitions and imports of one module."""

    def __init__(self, name: str) -> None:
        spec = find_spec(name)
        assert spec is not None and spec.origin is not None, f"{name} does not exist"
        self.name = name
        self.source = Path(spec.origin).read_text(encoding="utf-8")
        self.body = ast.parse(self.source).body
        self.definitions: dict[str, ast.stmt] = {}
        self.imports: dict[str, tuple[str, str | None]] = {}
        """(module, name in it or None) of each imported name."""
        for node in self.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self.definitions[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.definitions[node.targets[0].id] = node
            elif isinstance(node, ast.Import):
                self.imports |= {alias.asname or alias.name: (alias.name, None) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                self.imports |= {alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names}


class _Plain(ast.NodeVisitor):
    """Finds the edits that make a definition of the training code independent of it.

    ``recomputed(f, x)`` becomes ``f(x)``, ``fused(f, ...)`` becomes ``f``, ``project(x, (a, b), ...)`` becomes
    ``a(x), b(x)``, ``ModelConfig`` becomes ``FusionTreeConfig``, and backend settings are dropped.
    """

    def __init__(self, lines: list[bytes]) -> None:
        self.lines = lines
        self.edits: list[tuple[ast.expr | ast.stmt, str | None]] = []

    def visit_Call(self, node: ast.Call) -> None:
        """Replace the three helpers."""
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name == "recomputed":
            formula, *inputs = (plain(argument, self.lines) for argument in node.args)
            self.edits.append((node, f"{formula}({', '.join(inputs)})"))
        elif name == "fused":
            self.edits.append((node, plain(node.args[0], self.lines)))
        elif name == "project":
            assert isinstance(node.args[1], ast.Tuple), "project() is copied only with a literal tuple of modules"
            x = plain(node.args[0], self.lines)
            self.edits.append((node, ", ".join(f"{plain(module, self.lines)}({x})" for module in node.args[1].elts)))
        else:
            self.generic_visit(node)

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
    """The definitions of the assembled file, each after the definitions that it uses."""

    def __init__(self) -> None:
        self.modules: dict[str, Module] = {}
        self.texts: dict[str, str] = {}
        self.origins: dict[str, str] = {}
        """Module of each definition."""
        self.imports: set[tuple[str, str | None, str]] = set()
        """(module, name in it or None, name in the file)."""

    def add(self, module_name: str, name: str) -> None:
        """Add a definition and the definitions that it uses.

        Raises:
            ValueError: two modules define different things under one name.
        """
        if self.origins.setdefault(name, module_name) != module_name:
            raise ValueError(f"both {module_name} and {self.origins[name]} define {name}; rename one of them")
        if name in self.texts:
            return
        module = self.module(module_name)
        text = plain(module.definitions[name], module.source.encode().split(b"\n"))
        self.texts[name] = text  # set before the recursion, which definitions that use each other would not end
        for used in [node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name) and node.id != name]:
            source, imported = module.imports.get(used, ("", None))
            if used == "FusionTreeConfig":
                self.imports.add((".configuration_fusiontree", used, used))
            elif used in module.definitions:
                self.add(module_name, used)
            elif source.startswith("fusiontree.") and imported:
                self.add(source, imported)
            elif source:
                self.imports.add((source, imported, used))
        self.texts[name] = self.texts.pop(name)

    def module(self, name: str) -> Module:
        """Return a module; reads each module once."""
        if name not in self.modules:
            self.modules[name] = Module(name)
        return self.modules[name]

    def text(self) -> str:
        """Return the file."""
        groups: tuple[dict[str, set[str]], ...] = ({}, {}, {})  # standard library, other packages, this folder
        for source, imported, name in self.imports:
            group = groups[2 if source.startswith(".") else source.split(".")[0] not in sys.stdlib_module_names]
            line = f"from {source} import " if imported else f"import {source}" + f" as {name}" * (name != source)
            group.setdefault(line, set()).update({imported} if imported else ())
        imports = "\n\n".join(
            "\n".join(line + ", ".join(sorted(names)) for line, names in sorted(group.items(), key=_import_order))
            for group in groups
        )
        text = HEADER.format(modules="\n".join(sorted(set(self.origins.values())))) + "\n" + imports + "\n\n"
        after_constant = True
        for definition in self.texts.values():
            constant = not definition.startswith(("def ", "class ", "@"))
            text += ("" if constant and after_constant else "\n\n") + definition + "\n"
            after_constant = constant
        return text


def _import_order(item: tuple[str, set[str]]) -> tuple[bool, str]:
    return item[0].startswith("from"), item[0].split()[1]


def assembled() -> str:
    """Return the text of the model file for exported folders."""
    assembly = Assembly()
    for part in ("layers", "causal_lm"):
        name = f"{__package__}.{part}"
        for definition in assembly.module(name).definitions:
            assembly.add(name, definition)
    return assembly.text()


def main(arguments: list[str] | None = None) -> int:
    """Write the model file, or compare it with its sources."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.assemble", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file is not current")
    if not parser.parse_args(arguments).check:
        TARGET.write_text(assembled(), encoding="utf-8")
    elif TARGET.read_text(encoding="utf-8") != assembled():
        print(f"{TARGET} is not current; run python -m {__package__}.assemble", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
