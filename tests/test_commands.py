"""Every option and override that our scripts, Makefile, README and messages pass to our programs is one they know.

Fault of the first prototype: a launch script passed options that its program had dropped. Here commands are read from
every file that holds some, and compared with the parser that answers each program's own ``--help``.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from fusiontree.cli import VERBS, find_verb
from fusiontree.cli import main as fusiontree

ROOT = Path(__file__).parent.parent
SHELL_PLACES = ["Makefile", ".ci/*", "*.md", *(f"{d}/**/*" for d in ("slurm", "launchers", "tools", "configs", "docs"))]
PYTHON_PLACES = [f"{d}/**/*.py" for d in ("fusiontree", "launchers", "slurm", "tools", "tests")]
END_OF_COMMAND = {"|", "||", "&&", ";", "&", ")", ">", ">>", "<", "2>", "2>&1", "do", "done", "then", "fi", "#"}
CONFIGURED = {f"fusiontree{mark}{name}" for name in ("train", "benchmark", "plan") for mark in ". "}

Call = tuple[str, list[str]]
"""A program (``fusiontree.train``, ``tools/plot_run.py``, ``fusiontree data build``) and the words passed to it."""


def program_of(word: str) -> str | None:
    """``fusiontree.train`` or ``tools/build_shards.py`` when the word names one of our programs."""
    if match := re.fullmatch(r"fusiontree\.\w+", word):
        return match.group()
    if match := re.search(r"(?:^|[/\"'=])((fusiontree|tools|launchers|slurm)/\w+\.py)$", word):
        path = match.group(1)
        return path[:-3].replace("/", ".") if path.startswith("fusiontree/") else path
    return None


def verb_at(words: list[str], start: int) -> str | None:
    """``fusiontree data build`` when these words are a call of the console command, known verb or not."""
    before, (name, *rest) = words[start - 1] if start else "", words[start:]
    begins = before in {"", "$", "time", "-m"} | END_OF_COMMAND
    if not begins or not rest or not re.fullmatch(r"(.*/bin/)?fusiontree(\.cli)?", name):
        return None
    if not re.fullmatch(r"[a-z]+", rest[0]):
        return None
    found = find_verb(rest)
    return f"fusiontree {found[0] if found else rest[0]}"


def calls_in_words(words: list[str]) -> list[Call]:
    """Every call among shell words."""
    calls = []
    for start, word in enumerate(words):
        verb, program = verb_at(words, start), program_of(word)
        before = words[start - 1] if start else ""
        by_module = before in {"-m", "--module"}
        by_path = "/" in word and re.search(r"python|torchrun|deepspeed|srun|PYTHON|executable", before)
        if verb is None and (program is None or not (by_module or by_path)):
            continue
        behind = start + (verb.count(" ") if verb else 0)
        passed = []
        for argument in words[behind + 1 :]:
            if argument in END_OF_COMMAND:
                break
            passed.append(argument.rstrip("]),.`'\";…"))
            if argument.endswith(";"):
                break
        calls.append((verb or str(program), passed))
    return calls


def calls_in_shell(text: str) -> list[Call]:
    calls = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if "fusiontree." not in line and "fusiontree " not in line and ".py" not in line:
            continue
        # Markdown code spans and shell substitutions end a command as a newline does
        for part in re.split(r"`|\$\(", line):
            lexer = shlex.shlex(part, posix=True, punctuation_chars="();|&<>")
            lexer.whitespace_split, lexer.commenters, lexer.quotes = True, "", ""
            calls += calls_in_words(list(lexer))
    return calls


def calls_in_python(text: str) -> list[Call]:
    """Calls written as lists, tuples or arguments (names of literal lists resolved), and those shown in strings."""
    tree = ast.parse(text)
    literals = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Tuple)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def words_of(node: ast.AST, inside: tuple[str, ...] = ()) -> list[str]:
        if isinstance(node, ast.List | ast.Tuple):
            return [word for item in node.elts for word in words_of(item, inside)]
        if isinstance(node, ast.Starred):
            return words_of(node.value, inside)
        if isinstance(node, ast.Name) and node.id in literals and node.id not in inside:
            return words_of(literals[node.id], (*inside, node.id))  # x = [*x, y] names itself
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [node.value]
        if isinstance(node, ast.JoinedStr):
            return ["".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)]
        # str(ROOT / "tools" / "plot_run.py"): what matters is the path at its end
        return [re.sub(r"['\") ]", "", ast.unparse(node))]

    calls = []
    for node in ast.walk(tree):
        if isinstance(node, ast.List | ast.Tuple):
            calls += calls_in_words(words_of(node))
        elif isinstance(node, ast.Call):
            calls += calls_in_words([word for argument in node.args for word in words_of(argument)])
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            calls += calls_in_shell(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values]
            calls += calls_in_shell("".join(parts))
    return calls


@functools.cache
def all_calls() -> list[tuple[str, Call]]:
    """``(file, call)`` for every call in the repository."""
    found = []
    for place in SHELL_PLACES:
        for path in sorted(ROOT.glob(place)):
            if path.is_file() and path.suffix not in {".py", ".pyc", ".png"}:
                found += [(str(path.relative_to(ROOT)), call) for call in calls_in_shell(path.read_text())]
    for place in PYTHON_PLACES:
        for path in sorted(ROOT.glob(place)):
            if path != Path(__file__):
                found += [(str(path.relative_to(ROOT)), call) for call in calls_in_python(path.read_text())]
    return found


def source_of(program: str) -> Path:
    if " " in program:
        verb = VERBS.get(program.removeprefix("fusiontree "))
        return source_of(verb.module) if verb else ROOT / program
    if program.endswith(".py"):
        return ROOT / program
    module = ROOT / program.replace(".", "/")
    return module / "__main__.py" if module.is_dir() else module.with_suffix(".py")


@functools.cache
def known_options(program: str) -> frozenset[str]:
    """The options of the argparse parsers that answer the program's ``--help``."""
    # A program that never parses would ignore --help and do its work here.
    source = source_of(program).read_text()
    parses = "ArgumentParser" in source or re.search(
        r"from fusiontree\.cli\.\w+ import .*\b(main|build_parser)\b", source
    )
    assert parses, f"{program} has no argument parser and is passed options"
    parsers: list[argparse.ArgumentParser] = []
    format_help = argparse.ArgumentParser.format_help

    def remember(parser: argparse.ArgumentParser) -> str:
        parsers.append(parser)
        return format_help(parser)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", [program, "--help"])
        patch.setattr(argparse.ArgumentParser, "format_help", remember)
        with pytest.raises(SystemExit) as ended:
            if " " in program:
                fusiontree([*program.split()[1:], "--help"])
            elif program.endswith(".py"):
                runpy.run_path(str(ROOT / program), run_name="__main__")
            else:
                patch.delitem(sys.modules, program, raising=False)  # runpy warns when it is imported already
                runpy.run_module(program, run_name="__main__", alter_sys=True)
    assert not ended.value.code, f"{program} --help exits with {ended.value.code}"
    assert parsers, f"{program} --help is not answered by argparse"
    options: set[str] = set()
    for parser in parsers:
        options |= set(parser._option_string_actions)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return frozenset(options)


def options_among(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]


def test_a_list_that_extends_itself_ends() -> None:
    assert calls_in_python("x = ['a']\nx = [*x, 'b']\nrun(*x)") == []


def test_every_command_names_a_program_that_exists():
    missing = [f"{file}: {program}" for file, (program, _) in all_calls() if not source_of(program).exists()]
    assert not missing


PROGRAMS = sorted(
    {program for _, (program, words) in all_calls() if options_among(words) and source_of(program).exists()}
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_passed_to_a_program_is_known_to_it(program):
    known = known_options(program)
    unknown = [
        f"{file} passes {option}"
        for file, (called, words) in all_calls()
        if called == program
        for option in options_among(words)
        if option not in known
    ]
    assert not unknown, f"{program} does not know: {unknown}"


def test_every_override_and_config_file_named_in_a_command_exists():
    from fusiontree.config.load import _all_keys

    known = set(_all_keys())
    wrong = []
    for file, (program, words) in all_calls():
        if program not in CONFIGURED or file.startswith("tests/"):  # tests pass wrong keys on purpose
            continue
        for word in words:
            key = re.match(r"([A-Za-z_]\w*(?:\.\w+)*)=", word)
            of_plugin = bool(key and key.group(1).startswith("model.mixers."))  # a plugin declares these settings
            if key and not of_plugin and key.group(1) not in known and key.group(1) != "section.key":
                wrong.append(f"{file}: {word}")
            if re.fullmatch(r"configs/[\w/]+\.yaml", word) and not (ROOT / word).exists():
                wrong.append(f"{file}: {word}")
    assert not wrong


def test_calls_are_found_where_people_write_them():
    shell = (
        "run:\n\t$(PYTHON) -m fusiontree.train --config configs/a.yaml \\\n\t  --resume training.seed=1 && echo --no\n"
        "torchrun --nproc-per-node=2 -m fusiontree.train --print-config | tee --append x\n"
        "fusiontree data build --input a && .venv/bin/fusiontree train --check\n"
        "Use the fusiontree command `fusiontree trian -x` or `pip install fusiontree now`.\n"
        "Then `python tools/build_shards.py --input=a -o b` and (python -m fusiontree.generate --prompt it).\n"
    )
    assert calls_in_shell(shell) == [
        ("fusiontree.train", ["--config", "configs/a.yaml", "--resume", "training.seed=1"]),
        ("fusiontree.train", ["--print-config"]),
        ("fusiontree data build", ["--input", "a"]),
        ("fusiontree train", ["--check"]),
        ("fusiontree trian", ["-x"]),
        ("tools/build_shards.py", ["--input=a", "-o", "b"]),
        ("fusiontree.generate", ["--prompt", "it"]),
    ]
    python = """
launch = [torchrun, "-m"]
train = [*launch, "fusiontree.train", "--config", config]
run(*train, "--print-config")
run([sys.executable, "-m", "fusiontree.plan", "--gpus", str(8), *more, "--json"])
run(python, str(ROOT / "tools" / "plot_run.py"), "--reference", "x")
names = ("fusiontree.train",)
print(f"Try next:\\n  python -m fusiontree.generate --checkpoint {run_dir} --prompt 'class '\\n")
"""
    found = [(program, options_among(words)) for program, words in calls_in_python(python)]
    assert set(map(str, found)) >= {
        "('fusiontree.train', ['--config', '--print-config'])",
        "('fusiontree.plan', ['--gpus', '--json'])",
        "('tools/plot_run.py', ['--reference'])",
        "('fusiontree.generate', ['--checkpoint', '--prompt'])",
    }
