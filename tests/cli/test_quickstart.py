"""The quickstart's own output and its end; the programs that it starts are replaced by what they leave behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusiontree.cli import quickstart

CHILD_OUTPUT = {"data": "a table of lengths", "generate": "def tree(): pass", "plot": "runs/quickstart/loss.png"}


class Child:
    """Stands for a process: notes its command, writes the files that later steps read."""

    commands: list[list[str]] = []
    end: Callable[[list[str]], int] = staticmethod(lambda command: 0)

    def __init__(self, command: list[str], stdout: Any = None, **_: Any) -> None:
        self.command, self.captured = command[2:], stdout is not None
        self.commands.append(self.command)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def communicate(self) -> tuple[str | None, None]:
        self.returncode = self.end(self.command)
        words = self.command
        if "data" in words:
            folder = Path(words[-1]) / "train"
            folder.mkdir(parents=True)
            (folder / "dataset.json").write_text(json.dumps({"statistics": {"bigram_entropy_nats": 2.5}}))
        record = {"step": 280, "loss": 1.9, "tokens": 9e6, "tokens_per_s": 5e4}
        Path("runs/quickstart/metrics.jsonl").write_text(f"{json.dumps(record)}\n" + '{"validation_loss": 1.8}\n')
        text = CHILD_OUTPUT.get(words[1], "step 120/280")
        if not self.captured:
            print(text)
        return text if self.captured else None, None

    def wait(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Child]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fusiontree quickstart"])
    monkeypatch.setattr(quickstart.subprocess, "Popen", Child)
    monkeypatch.setattr(quickstart, "count_gpus", lambda: 0)
    monkeypatch.setattr(Child, "commands", [])
    return Child


def test_quiet_prints_results_only(capsys: pytest.CaptureFixture[str], children: type[Child]) -> None:
    assert quickstart.main(["--quiet"]) == 0
    quiet = capsys.readouterr().out
    assert "validation loss   1.800" in quiet and "def tree(): pass" in quiet
    assert not [line for line in quiet.splitlines() if line.startswith(("==", "$"))]
    assert "runs/quickstart/loss.png\n" not in quiet.partition("runs/quickstart/config.yaml")[0]
    assert "a table of lengths" not in quiet
    trained = [words for words in children.commands if "fusiontree.train" in words]
    assert len(trained) == 2 and all("--quiet" in words for words in trained)


def test_a_second_start_keeps_the_data_and_shows_commands(
    capsys: pytest.CaptureFixture[str], children: type[Child]
) -> None:
    assert quickstart.main([]) == 0
    assert "$ fusiontree data build" in capsys.readouterr().out
    assert quickstart.main([]) == 0
    loud = capsys.readouterr().out
    assert "== 2/5" in loud and "$ torchrun --standalone" in loud and "data exists" in loud
    assert sum("data" in words for words in children.commands) == 1
    assert not any("--quiet" in words for words in children.commands)


def test_a_failed_step_ends_with_its_exit_code(monkeypatch: pytest.MonkeyPatch, children: type[Child]) -> None:
    monkeypatch.setattr(Child, "end", staticmethod(lambda command: 70 if "fusiontree.train" in command else 0))
    with pytest.raises(SystemExit) as ended:
        quickstart.main(["--quiet"])
    assert ended.value.code == 70
    assert len(children.commands) == 2


def test_ctrl_c_waits_for_the_child_and_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited = []

    def interrupt(command: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Child, "end", staticmethod(interrupt))
    monkeypatch.setattr(Child, "wait", lambda self: waited.append(self.command))
    assert quickstart.main([]) == 130
    assert capsys.readouterr().err == "stopped; repeat the command to continue\n"
    assert len(waited) == 1
