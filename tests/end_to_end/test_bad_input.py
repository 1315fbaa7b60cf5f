"""Wrong input of a user ends with one clear message and exit code 2, and overwrites nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fusiontree.train import main
from tests.end_to_end.runs import events, metrics, train, write_config


def refused(capsys: pytest.CaptureFixture[str], config: Path, *overrides: str) -> str:
    assert main(["--config", str(config), *overrides]) == 2
    return capsys.readouterr().err


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.max_step=3", ["training.max_step", "max_steps"]),
        ("model.num_heads=3", ["hidden_size 32", "num_heads 3"]),
        ("model.global_heads=7", ["global_heads 7"]),
        ("model.window_size=0", ["window_size"]),
        ("model.mamba.n_groups=3", ["n_groups 3"]),
        ("model.vocab_size=200", ["257 tokens", "vocab_size is 200"]),
        ("data.train=nowhere", ["'nowhere' does not exist", "fusiontree data build"]),
        ("training.seq_len=100000 model.max_position_embeddings=100000", ["no row of training.seq_len 100000"]),
        ("parallel.tp=2", ["1 processes do not divide by parallel.tp 2", "start a multiple of 2"]),
        ("parallel.shard_size=3", ["parallel.shard_size 3", "use one of [1]"]),
        ("parallel.shard_size=1 parallel.engine=ddp", ["parallel.shard_size is for engine fsdp2"]),
        ("training.device=cuda", ["training.device is cuda", "training.device=cpu"]),
        ("model.kernels.ssd=mamba_ssm", ["mamba_ssm"]),
        ("evaluation.interval=2 evaluation.lengths=[4]", ["a row of 4 tokens holds no needle"]),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path, override: str, parts: list[str]
) -> None:
    config = write_config(tmp_path, data)
    done = train(config, *override.split())
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    assert not checkpoints.exists() or not list(checkpoints.iterdir())


def test_the_check_finds_mistakes_in_tasks(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    assert main(["--config", str(config), "--check", "evaluation.interval=2", "evaluation.depths=[0.5]"]) == 0
    assert "depth 2.0" in refused(capsys, config, "--check", "evaluation.interval=2", "evaluation.depths=[2.0]")


def test_the_folder_of_another_run_is_left_alone(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, data)
    assert (
        train(config, "training.max_steps=2", "training.warmup_steps=0", "training.validation.interval=0").returncode
        == 0
    )
    before = snapshot(tmp_path / "run")
    message = refused(capsys, config, "model.num_layers=3", "training.seed=5")
    assert "model.num_layers: 2 in the folder, 3 now" in message
    assert "training.seed" in message
    assert snapshot(tmp_path / "run") == before


def test_an_empty_or_unfinished_dataset_is_named(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, data)
    assert "it holds the datasets ['train', 'validation']" in refused(capsys, config, f"data.train={data}", "--check")
    copy = tmp_path / "copy"
    shutil.copytree(data / "train", copy)
    (copy / "dataset.json").unlink()
    assert "not a complete dataset" in refused(capsys, config, f"data.train={copy}", "--check")
    info = json.loads((data / "train" / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps(info | {"shards": info["shards"][:1]}))
    assert "was changed after it was written" in refused(capsys, config, f"data.train={copy}", "--check")


def check_refuses(capsys: pytest.CaptureFixture[str], config: Path, *overrides: str) -> str:
    return refused(capsys, config, "--check", *overrides)


def test_check_opens_all_that_training_opens(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    assert "'nosuch' does not exist" in check_refuses(capsys, config, "data.validation=nosuch")
    assert "type of token source" in check_refuses(capsys, config, "data.train=[{path: x, weight: 1, type: y}]")
    assert "nothing" in check_refuses(capsys, config, "plugins=[nothing.py]")
    assert "mamba_ssm cannot run on cpu" in check_refuses(capsys, config, "model.kernels.ssd=mamba_ssm")
    copy = shutil.copytree(data / "train", tmp_path / "copy")
    last = max(copy.glob("*.tar"))
    last.write_bytes(last.read_bytes()[:-512])
    assert f"{last} has" in check_refuses(capsys, config, f"data.train={copy}")
    last.unlink()
    assert f"{last}: No such file" in check_refuses(capsys, config, f"data.train={copy}")
    assert main(["--config", str(config), "--check", f"data.train={copy}", "data.on_damage=skip"]) == 0
    validation = shutil.copytree(data / "validation", tmp_path / "validation")
    next(validation.glob("*.index")).unlink()
    assert ".index: No such file" in check_refuses(capsys, config, f"data.validation={validation}")
    first = sorted(p for p in (data / "train").glob("*.tar"))
    damaged = shutil.copytree(data / "train", tmp_path / "damaged")
    for tar in first:
        (damaged / tar.name).write_bytes(bytes(tar.stat().st_size))
    assert "shard-" in check_refuses(capsys, config, f"data.train={damaged}")
    assert not (tmp_path / "run").exists()


def test_check_knows_the_run_and_its_moved_data(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    config, run = write_config(tmp_path, data), tmp_path / "run"
    quick = ("training.warmup_steps=0", "training.validation.interval=0", "supervision.health_check=off")
    assert main(["--config", str(config), *quick, "training.max_steps=2"]) == 0
    moved = shutil.copytree(data / "train", tmp_path / "moved")
    again = ("--config", str(config), *quick, f"data.train={moved}", "training.max_steps=3")
    assert main([*again, "--check"]) == 0
    other = check_refuses(capsys, config, f"data.train={data / 'validation'}", "data.validation=null", *quick)
    assert "is another dataset or was rebuilt" in other
    assert main([*again]) == 0  # resumes where it was
    assert events(run)[-4:] == ["config_changed", "resume", "save", "finished"]
    assert metrics(run, "step") == [1, 2, 3]
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    before = snapshot(run)
    assert "step 2, 3 were saved" in refused(capsys, config, *quick, f"data.train={moved}", "--check")
    assert "step 2, 3 were saved" in refused(capsys, config, *quick, f"data.train={moved}")
    assert snapshot(run) == before


def test_check_says_ok_and_writes_nothing(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    assert main(["--config", str(config), "--check"]) == 0
    assert "ok" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_help_and_print_config(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    assert main(["--config", str(config), "--print-config", "model.num_layers=3"]) == 0
    assert "num_layers: 3" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "training.seq_len" in capsys.readouterr().out
