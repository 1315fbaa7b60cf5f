"""Runs that start from another run's weights (``checkpoint.init_from``), with the real programs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fusiontree.checkpoint.reader import CheckpointReader
from fusiontree.data.tokenizers import ByteTokenizer
from fusiontree.tracking.records import read_records
from fusiontree.train import main
from tests.data.datasets import documents, write
from tests.end_to_end.runs import metrics, train, write_config

pytestmark = pytest.mark.xdist_group("training")


@pytest.fixture(scope="module")
def source(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seven steps."""
    folder = tmp_path_factory.mktemp("source")
    done = train(write_config(folder, data, "source"), "training.max_steps=7")
    assert done.returncode == 0, done.stderr
    return folder / "source"


def command(data: Path, source: Path, folder: Path, *overrides: str) -> list[str]:
    """Return the command line of a run that starts from ``source``."""
    config = write_config(folder, data, "new")
    return ["--config", str(config), f"checkpoint.init_from={source}", *overrides]


def refusal(argv: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Return the error of ``--check``."""
    assert main([*argv, "--check"]) == 2
    return capfd.readouterr().err


def test_a_run_starts_from_the_weights_with_other_rows_and_batches(source: Path, data: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 the run's first checkpoint has the source's weights, and fresh states."""
    _, config, *rest = command(data, source, tmp_path)
    others = ["training.seq_len=32", "training.global_batch_size=4", "training.seed=3", "training.learning_rate=0.0"]
    done = train(Path(config), *rest, *others, "training.max_steps=2", "training.warmup_steps=0")
    assert done.returncode == 0, done.stderr
    newest = source / "checkpoints" / "step-00000007"
    assert f"starts from the weights of {newest}; step, data and schedule start anew\n" in done.stdout
    run = tmp_path / "new"
    start = read_records(run / "events.jsonl")[0]
    assert start["init_from"] == {"folder": str(newest), "step": 7, "optimizer": False}
    old, new = CheckpointReader(newest), CheckpointReader(run / "checkpoints" / "step-00000002")
    for name in old.tensors:
        assert bool((old.read(name) == new.read(name)).all()) == name.startswith("model."), name
    assert json.loads((new.folder / "state.json").read_text())["tokens"] == metrics(run, "tokens")[-1] < 300

    shutil.move(source, source.with_name("moved"))  # a resume does not read it again
    try:
        done = train(Path(config), *rest, *others, "training.max_steps=3", "training.warmup_steps=0")
    finally:
        shutil.move(source.with_name("moved"), source)
    assert done.returncode == 0, done.stderr
    assert "starts from" not in done.stdout
    assert [event["event"] for event in read_records(run / "events.jsonl")].count("start") == 1


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero3"])
def test_with_the_optimizer_a_run_starts_alike_on_any_layout(
    source: Path, data: Path, tmp_path: Path, engine: str
) -> None:
    """Same seed and data from step 0, with weights and moments of the source."""
    losses = []
    for processes, name, used in ((0, "one", "ddp"), (2, "two", engine)):
        config = write_config(tmp_path, data, name)
        given = (f"checkpoint.init_from={source}", "checkpoint.init_optimizer=true", f"parallel.engine={used}")
        done = train(config, *given, "training.max_steps=3", "training.warmup_steps=0", processes=processes)
        assert done.returncode == 0, done.stderr
        assert "starts from the weights and optimizer state of" in done.stdout
        losses.append(metrics(tmp_path / name))
        state = json.loads((tmp_path / name / "checkpoints" / "step-00000003" / "state.json").read_text())
        assert state["engine"]["optimizer_step"] == 10  # the moments' bias correction goes on
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][0] < metrics(source)[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.hidden_size=64"], "model.hidden_size is 32 there and 64 in this run"),
        (["model.num_heads=8", "model.num_kv_heads=4"], "model.num_heads is 4 there and 8"),  # equal shapes
        (["model.global_heads=0"], "model.global_heads is 2 there and 0"),
        (["model.vocab_size=300"], "model.vocab_size is 264 there and 300"),
        (["model.layer_pattern=FM"], "model.layer_pattern is None there and 'FM'"),
        (["model.mamba.n_groups=2"], "model.mamba.n_groups is 1 there and 2"),
        (["model.srte_encoding=none"], "model.srte_encoding is 'sincos' there and 'none'"),
    ],
)
def test_another_model_is_refused_by_name(
    source: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: list[str], words: str
) -> None:
    error = refusal(command(data, source, tmp_path, *changes), capfd)
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "new").exists()


def test_settings_that_leave_weights_their_meaning_are_named_and_allowed(
    source: Path, data: Path, tmp_path: Path
) -> None:
    _, config, *rest = command(data, source, tmp_path, "model.window_size=24", "training.max_steps=1")
    done = train(Path(config), *rest, "training.warmup_steps=0")
    assert done.returncode == 0, done.stderr
    assert "start anew; model.window_size is 12 there and 24 in this run\n" in done.stdout
    start = read_records(tmp_path / "new" / "events.jsonl")[0]
    assert start["init_from"]["differences"] == ["model.window_size is 12 there and 24 in this run"]


def test_what_cannot_be_a_source_is_refused(
    source: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = command(data, source, tmp_path)
    for place, words in ((tmp_path, "holds no complete checkpoint"), (source / "nowhere", "does not exist")):
        assert words in refusal([*argv, f"checkpoint.init_from={place}"], capfd)
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    folder = copy / "checkpoints" / "step-00000007"
    whole = (folder / "state.json").read_bytes()
    for damaged in (whole + b" ", b"[]", b"\xff", whole[:-9]):
        (folder / "state.json").write_bytes(damaged)
        error = refusal([*argv, f"checkpoint.init_from={copy}"], capfd)
        assert "checkpoint.init_from: " in error
        assert "name another checkpoint" in error
        assert "Traceback" not in error


def test_damaged_weights_stop_every_rank_with_one_line(source: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "copy")
    folder = tmp_path / "copy" / "checkpoints" / "step-00000007"
    file = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    _, config, *rest = command(data, folder, tmp_path)
    done = train(Path(config), *rest, "training.max_steps=2", "training.warmup_steps=0")
    assert done.returncode == 2
    assert "name another checkpoint" in done.stderr
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_a_run_with_checkpoints_refuses_a_new_source(
    source: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(source.parent, data, "source")
    argv = ["--config", str(config), f"checkpoint.init_from={tmp_path}"]
    error = refusal(argv, capfd)
    assert "has checkpoints, the newest of step 7" in error
    assert "needs another run_dir" in error
    error = refusal(["--config", str(config), "training.seq_len=32"], capfd)
    assert "start a new run from its weights: another run_dir and checkpoint.init_from=RUN" in error


@pytest.mark.slow
def test_a_run_goes_on_with_another_mixture_and_says_so(data: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "noise", [documents(40, seed=9)], ByteTokenizer.info)
    config, old = write_config(tmp_path, data), f"{{path: {data / 'train'}, weight: 1.0}}"
    assert train(config, "training.exit_at_step=3").returncode == 0
    done = train(config, f"data.train=[{old}, {{path: {other}, weight: 3.0}}]", "training.exit_at_step=6")
    assert done.returncode == 0, done.stderr
    line = f"the mixture changes after step 3: dataset 1 '{other}' with weight 3.0 is new\n"
    assert line in done.stdout
    run = tmp_path / "run"
    (event,) = (e for e in read_records(run / "events.jsonl") if e["event"] == "mixture_changed")
    assert (event["step"], event["row"], event["changes"]) == (3, 24, [line.split(": ")[1].rstrip()])
    state = json.loads((run / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["data"]["mixture"] == [[0, [1.0]], [24, [1.0, 3.0]]]
    done = train(config, "training.exit_at_step=8")
    assert done.returncode == 2
    assert "data.train had 2 datasets and has 1" in done.stderr
    assert "checkpoint.init_from=RUN" in done.stderr
