"""The list of tools/mutation_campaign.py fits the code, and the campaign tells seen mistakes from others."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tools.mutation_campaign import ROOT, Campaign, Mutation, copy_tree, load_mutations, main, report

MUTATIONS = load_mutations()
ROOMS = ("training", "engines", "parallel", "data", "checkpoint", "models")


def test_every_mutation_applies_to_the_code_as_it_is() -> None:
    """If one does not, its file has changed: write the mistake anew in tools/mutations.yaml."""
    for mutation in MUTATIONS:
        text = mutation.applied(ROOT)
        assert text != (ROOT / mutation.file).read_text(encoding="utf-8"), mutation.name
        compile(text, mutation.file, "exec")


def test_the_tests_of_every_mutation_exist() -> None:
    for mutation in MUTATIONS:
        assert mutation.tests, mutation.name
        for test in mutation.tests:
            file, _, name = test.partition("::")
            text = (ROOT / file).read_text(encoding="utf-8")
            assert not name or f"def {name.partition('[')[0]}(" in text, f"{mutation.name}: {test}"


def test_there_are_many_in_every_room_and_few_that_may_survive() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS) >= 60
    rooms = Counter(mutation.room for mutation in MUTATIONS)
    assert all(rooms[room] >= 10 for room in ROOMS), rooms
    assert sum(mutation.survives is not None for mutation in MUTATIONS) <= len(MUTATIONS) // 10


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project of one function and three tests."""
    root = tmp_path / "project"
    (root / "fusiontree" / "training").mkdir(parents=True)
    (root / "fusiontree" / "training" / "rate.py").write_text("def rate(step):\n    return 2 * step\n")
    (root / "tests").mkdir()
    (root / "tests" / "test_rate.py").write_text(
        "import time\n"
        "from fusiontree.training.rate import rate\n\n\n"
        "def test_double():\n    assert rate(3) == 6\n\n\n"
        "def test_sign():\n    assert rate(3) > 0\n\n\n"
        "def test_patience():\n    time.sleep(60 if rate(3) > 6 else 0)\n\n\n"
        "def test_that_always_fails():\n    assert False\n"
    )
    return root


TRIPLED = Mutation("tripled", "fusiontree/training/rate.py", "2 * step", "3 * step", ("tests/test_rate.py::test_sign",))


def verdicts(out: Path, tree: Path, *mutations: Mutation, limit_s: float = 60.0) -> list[str]:
    return [result["verdict"] for result in Campaign(out, limit_s, tree).run(mutations)]


def test_verdicts(tree: Path, tmp_path: Path) -> None:
    seen = replace(TRIPLED, name="seen", tests=("tests/test_rate.py::test_sign", "tests/test_rate.py::test_double"))
    no_test = replace(TRIPLED, name="no test", tests=("tests/test_rate.py::test_none",))
    no_proof = replace(TRIPLED, name="no proof", tests=("tests/test_rate.py::test_that_always_fails",))
    found = verdicts(tmp_path / "out", tree, TRIPLED, seen, no_test, no_proof)
    assert found == ["survived", "killed", "broken", "unusable"]
    assert (tree / "fusiontree/training/rate.py").read_text() == "def rate(step):\n    return 2 * step\n"
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert next(line["failed"] for line in lines if line["name"] == "seen") == ["tests/test_rate.py::test_double"]


@pytest.mark.slow
def test_a_test_that_hangs_is_ended_and_has_seen_the_mistake(tree: Path, tmp_path: Path) -> None:
    slow = replace(TRIPLED, tests=("tests/test_rate.py::test_patience",))
    assert verdicts(tmp_path / "out", tree, slow, limit_s=12.0) == ["timeout"]


@pytest.mark.slow
def test_a_second_start_runs_only_what_has_changed(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verdicts(tmp_path / "out", tree, TRIPLED) == ["survived"]
    assert verdicts(tmp_path / "out", tree, TRIPLED) == ["survived"]
    assert "1 mutations, 1 of them with a known result" in capsys.readouterr().out
    test = tree / "tests" / "test_rate.py"
    test.write_text(test.read_text().replace("rate(3) > 0", "rate(3) == 6"))
    assert verdicts(tmp_path / "out", tree, TRIPLED) == ["killed"]


def test_the_report_names_what_is_not_as_the_list_says() -> None:
    expected = replace(TRIPLED, name="expected", survives="it changes nothing")
    results = [{"verdict": verdict, "failed": []} for verdict in ("survived", "survived", "killed", "broken")]
    mutations = [TRIPLED, expected, expected, replace(TRIPLED, name="lost")]
    table, wrong = report(mutations, results)
    assert wrong == ["tripled: survived", "expected: killed", "lost: broken"]
    assert "| training | expected | survived | it changes nothing |" in table


def test_an_old_text_that_is_gone_is_named(tree: Path) -> None:
    gone = replace(TRIPLED, old="4 * step")
    with pytest.raises(ValueError, match="'tripled': its old text occurs 0 times"):
        gone.applied(tree)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "--out DIR" in capsys.readouterr().out


def test_the_copy_has_every_module(tmp_path: Path) -> None:
    (tmp_path / "from" / "fusiontree" / "data" / "build").mkdir(parents=True)
    (tmp_path / "from" / "fusiontree" / "data" / "build" / "a.py").touch()
    (tmp_path / "from" / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "from" / ".git").mkdir()
    copy_tree(tmp_path / "from", tmp_path / "to")
    assert (tmp_path / "to" / "fusiontree" / "data" / "build" / "a.py").exists()
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["fusiontree"]
