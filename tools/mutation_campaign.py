"""Many small mistakes in the code: does a fast test see each of them?

    python -m tools.mutation_campaign --out DIR

tools/mutations.yaml lists the mistakes: a file, a text that occurs in it once, the text in its place, and the tests of
the room that should fail. Each mistake is made in a scratch copy of the tree, where these tests run under a time limit.
A mistake that no test sees survives; the list gives a reason for each one that is meant to. At the end the tests that
failed or hung run once on the unchanged copy, since a test that fails there has seen nothing.

Results go to DIR/results.jsonl, one line per mistake, and DIR/report.md. The same command resumes: a mistake runs again
only if its entry, its file or its tests have changed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
MUTATIONS = Path(__file__).with_name("mutations.yaml")
OURS = ("tests", "tools", "fusiontree")
PRELOADED = ("numpy", "pydantic", "pytest", "torch.distributed.checkpoint", "torch.distributed.fsdp")
"""Packages that nearly every test imports: imported once, and inherited by the process of each mutation."""
VERDICTS = {0: "survived", 1: "killed", None: "timeout"}
"""By pytest's exit code; None where the time limit ended it. Any other code means that no test ran."""


@dataclass(frozen=True)
class Mutation:
    """A mistake in the source, and the tests that should see it."""

    name: str
    file: str
    old: str
    """Occurs in the file once."""
    new: str
    tests: tuple[str, ...]
    """Files or node ids of pytest."""
    survives: str | None = None
    """Reason why no fast test needs to see it, or None."""

    @property
    def room(self) -> str:
        """Folder of the file under ``fusiontree``."""
        return Path(self.file).parts[1]

    def applied(self, root: Path) -> str:
        """Return the text of the file with the mistake.

        Raises:
            ValueError: the old text does not occur once.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"mutation '{self.name}': its old text occurs {count} times in {self.file}, not once")
        return text.replace(self.old, self.new)

    def digest(self, root: Path) -> str:
        """Return a hash of the entry, its file and its tests; a result holds for this hash."""
        files = [self.file, *dict.fromkeys(test.partition("::")[0] for test in self.tests)]
        parts = [json.dumps(asdict(self)).encode(), *((root / file).read_bytes() for file in files)]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def load_mutations(path: Path = MUTATIONS) -> list[Mutation]:
    """Return the mutations of a file, in its order."""
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [Mutation(**{**entry, "tests": tuple(entry["tests"].split())}) for entry in entries]


def copy_tree(root: Path, target: Path) -> None:
    """Copy the files of the project, without hidden and built ones."""
    unneeded = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
    results = {"build", "dist", "data", "runs"}  # at the top alone: a package is called data, and one build

    def left_out(folder: str, names: list[str]) -> set[str]:
        return unneeded(folder, names) | (results & set(names) if Path(folder) == root else set())

    shutil.copytree(root, target, ignore=left_out)


def run_tests(tree: Path, tests: Sequence[str], limit_s: float, *, stop_at_first: bool = True) -> dict[str, Any]:
    """Run tests of a copy in a process of their own; return verdict, failed tests, seconds, and the end of the output.

    Args:
        tree: the copy.
        tests: files or node ids.
        limit_s: seconds after which the process and its children are killed.
        stop_at_first: end with the first failure.
    """
    with tempfile.TemporaryDirectory(prefix="mutation-") as scratch:
        log = Path(scratch) / "log.txt"
        options = ["-q", "-p", "no:cacheprovider", "-rfE", "--tb=line", f"--basetemp={scratch}/tmp"]
        named = all("::" in test for test in tests)  # a test that is named runs even if it is slow
        options += ["-m", "not gpu" if named else "not slow and not gpu", *(["-x"] if stop_at_first else [])]
        began = time.monotonic()
        process = multiprocessing.get_context("fork").Process(target=_pytest, args=(tree, [*options, *tests], log))
        process.start()
        process.join(limit_s)
        timed_out = process.is_alive()
        assert process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also children that a failed test left
        process.join()
        seconds = time.monotonic() - began
        output = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    verdict = VERDICTS.get(None if timed_out else process.exitcode, "broken")
    failed = re.findall(r"^(?:FAILED|ERROR) (tests/.*?)(?: - .*)?$", output, re.MULTILINE)
    return {"verdict": verdict, "failed": failed, "seconds": round(seconds, 1), "output": output[-1500:]}


def _pytest(tree: Path, arguments: list[str], log: Path) -> None:
    """Run pytest on the modules of ``tree``; the packages of others are those of the parent."""
    os.setsid()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)  # a caller may have replaced them
    os.chdir(tree)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, tree))]
    sys.dont_write_bytecode = True  # equal size and time would hide the next mutation
    os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    import pytest

    code = int(pytest.main(arguments))
    sys.stdout.flush()
    os._exit(code)


class Campaign:
    """Runs mutations and keeps their results in a folder."""

    def __init__(self, out: Path, limit_s: float, root: Path = ROOT) -> None:
        """Read the results of earlier starts, if there are any; copy the tree."""
        self.out, self.limit_s, self.root = out, limit_s, root
        self.results_file = out / "results.jsonl"
        out.mkdir(parents=True, exist_ok=True)
        lines = self.results_file.read_text().splitlines() if self.results_file.is_file() else []
        self.known: dict[str, dict[str, Any]] = {line["digest"]: line for line in map(json.loads, lines)}
        self.tree = out.resolve() / "tree"
        shutil.rmtree(self.tree, ignore_errors=True)
        copy_tree(root, self.tree)

    def run(self, mutations: Sequence[Mutation]) -> list[dict[str, Any]]:
        """Run those whose result is not known; return the results of all, confirmed, in order."""
        digests = {mutation.name: mutation.digest(self.root) for mutation in mutations}
        pending = [mutation for mutation in mutations if digests[mutation.name] not in self.known]
        print(f"{len(mutations)} mutations, {len(mutations) - len(pending)} of them with a known result", flush=True)
        began = time.monotonic()
        for number, mutation in enumerate(pending, 1):
            result = {"digest": digests[mutation.name], "name": mutation.name, **self._one(mutation)}
            self._keep(result)
            per_minute = 60 * number / (time.monotonic() - began)
            by = f" by {result['failed'][0]}" if result["failed"] else ""
            print(
                f"[{number}/{len(pending)}] {result['verdict']}: {mutation.name}{by} ({result['seconds']} s); "
                f"{per_minute:.1f} a minute, {(len(pending) - number) / per_minute:.0f} minutes left",
                flush=True,
            )
        self._confirm([(mutation, self.known[digests[mutation.name]]) for mutation in mutations])
        return [self.known[digest] for digest in digests.values()]

    def _one(self, mutation: Mutation) -> dict[str, Any]:
        target = self.tree / mutation.file
        right = target.read_text(encoding="utf-8")
        target.write_text(mutation.applied(self.tree), encoding="utf-8")
        try:
            return run_tests(self.tree, mutation.tests, self.limit_s)
        finally:
            target.write_text(right, encoding="utf-8")

    def _confirm(self, results: Sequence[tuple[Mutation, dict[str, Any]]]) -> None:
        """Run what failed or hung on the unchanged tree; where it does so there, too, its mutation was not seen."""
        new = [(mutation, r) for mutation, r in results if verdict_is_seen(r["verdict"]) and not r.get("confirmed")]
        for mutation, result in new:
            if result["verdict"] == "timeout":
                found = run_tests(self.tree, mutation.tests, self.limit_s)
                self._note_confirmed(result, found, found["verdict"] == "survived")
        killed = [result for _, result in new if result["verdict"] == "killed"]
        tests = list(dict.fromkeys(test for result in killed for test in result["failed"]))
        if not tests:
            return
        print(f"running the {len(tests)} failed tests on the unchanged tree", flush=True)
        found = run_tests(self.tree, tests, self.limit_s * len(tests), stop_at_first=False)
        for result in killed:
            sound = found["verdict"] in ("survived", "killed") and not set(result["failed"]) & set(found["failed"])
            self._note_confirmed(result, found, sound)

    def _note_confirmed(self, result: dict[str, Any], found: dict[str, Any], sound: bool) -> None:
        self._keep(result | ({"confirmed": True} if sound else {"verdict": "unusable", "output": found["output"]}))

    def _keep(self, result: dict[str, Any]) -> None:
        self.known[result["digest"]] = result
        with self.results_file.open("a") as file:
            file.write(json.dumps(result) + "\n")


def report(mutations: Sequence[Mutation], results: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """Return a table in Markdown, and the names of mutations that need work.

    These are survivors without a reason, mutations with a reason that a test kills, and those that could not be run.
    """
    lines = ["| room | mutation | verdict | seen by, or reason |", "|---|---|---|---|"]
    wrong = []
    for mutation, result in sorted(zip(mutations, results, strict=True), key=lambda pair: pair[0].room):
        verdict, seen = result["verdict"], verdict_is_seen(result["verdict"])
        if seen == bool(mutation.survives) or verdict in ("broken", "unusable"):
            wrong.append(f"{mutation.name}: {verdict}")
        by = result["failed"][0] if result["failed"] else (mutation.survives or "")
        lines.append(f"| {mutation.room} | {mutation.name} | {verdict} | {by} |")
    return "\n".join(lines) + "\n", wrong


def verdict_is_seen(verdict: str) -> bool:
    """Return True if a test saw the mistake; a test that hangs for its sake saw it."""
    return verdict in ("killed", "timeout")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Make many small mistakes in the code and run the tests of each.")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of results; resumes if it exists"
    )
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="time of a mutation's tests")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="mutations with one of these texts in room or name")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; exit code 0 if all is as the list says, 1 otherwise."""
    args = build_parser().parse_args(argv)
    mutations = load_mutations()
    if args.only:
        mutations = [m for m in mutations if any(text in f"{m.room} {m.name}" for text in args.only)]
    try:
        for mutation in mutations:
            mutation.applied(ROOT)
    except (OSError, ValueError) as error:
        print(f"error: {error}; adapt {MUTATIONS.name}", file=sys.stderr)
        return 2
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for package in PRELOADED:
        importlib.import_module(package)
    results = Campaign(args.out, args.limit).run(mutations)
    table, wrong = report(mutations, results)
    (args.out / "report.md").write_text(table, encoding="utf-8")
    survivors = [r["name"] for r in results if r["verdict"] == "survived"]
    print(f"{len(survivors)} of {len(results)} mutations survived" + "".join(f"\n  {name}" for name in survivors))
    if wrong:
        print("not as the list says:" + "".join(f"\n  {line}" for line in wrong))
    print(f"results: {args.out / 'results.jsonl'}, table: {args.out / 'report.md'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
