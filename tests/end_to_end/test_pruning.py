"""The path of docs/deploy.md with the real programs: train, analyze, prune, heal with the source as teacher, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fusiontree.checkpoint.load import load_model
from fusiontree.checkpoint.reader import CheckpointReader
from fusiontree.cli import main
from tests.end_to_end.runs import events, metrics, train
from tools import compare_pruning

pytestmark = pytest.mark.xdist_group("training")

SHORT = (
    "training.seq_len=64",
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    "training.warmup_steps=2",
)
FEW = ("--rows", "2", "--batch-size", "2")


@pytest.fixture(scope="module")
def source(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few steps of the quickstart's model."""
    run = tmp_path_factory.mktemp("source") / "run"
    paths = [f"run_dir={run}", f"data.train={data / 'train'}", f"data.validation={data / 'validation'}"]
    options = ["training.max_steps=8", "training.validation.interval=0", "logging.log_interval=1"]
    done = train(Path("quickstart"), *paths, *SHORT, *options)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def pruned(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of 70% of the parameters."""
    folder = tmp_path_factory.mktemp("pruned") / "new"
    assert main(["checkpoint", "prune", str(source), str(folder), "--target", "0.7", *FEW]) == 0
    return folder


def test_the_analysis_names_every_part(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, output = tmp_path / "parts.png", tmp_path / "parts.json"
    options = ["--plot", str(picture), "--output", str(output), "--top", "5"]
    assert main(["checkpoint", "analyze", str(source), *FEW, *options]) == 0
    shown = capsys.readouterr().out
    assert "(5 of 104, cheapest removal first)" in shown and picture.stat().st_size > 10_000
    values = json.loads(output.read_text())
    kinds = [part["kind"] for part in values["parts"]]
    # per layer: itself, two branches, 2 local and 1 global key/value heads, 12 state space heads, 8 parts of the MLP
    assert {kind: kinds.count(kind) // 4 for kind in kinds} == {
        "layer": 1,
        "branch": 2,
        "local": 2,
        "global": 1,
        "mamba": 12,
        "mlp": 8,
    }
    assert len(values["gates"]) == 4 and values["loss"] > 1


@pytest.mark.slow
def test_a_pruned_run_heals_and_resumes(source: Path, pruned: Path, tmp_path: Path) -> None:
    sizes = [sum(p.numel() for p in load_model(run)[0].parameters()) for run in (source, pruned)]
    assert 0.66 < sizes[1] / sizes[0] <= 0.7
    undisturbed = shutil.copytree(pruned, tmp_path / "undisturbed")
    teacher = [f"training.teacher={source}", "training.teacher_weight=0.8", "training.warmup_steps=0"]
    options = [*teacher, "training.max_steps=8", "training.exit_at_step=null"]
    done = train(pruned / "config.yaml", *options, "training.exit_at_step=6")
    assert done.returncode == 0, done.stderr
    assert "MFU counts the trained model alone" in done.stdout + done.stderr
    healed = metrics(pruned, "distillation_loss")
    assert len(healed) == 6 and 0 < healed[-1] < healed[1]  # the first step without warm-up moves away
    losses, lm = metrics(pruned), metrics(pruned, "lm_loss")
    gates = metrics(pruned, "load_balance_loss")
    for loss, cross_entropy, divergence, gate in zip(losses, lm, healed, gates, strict=True):
        assert loss == pytest.approx(0.2 * cross_entropy + 0.8 * divergence + 0.01 * gate, rel=1e-5)
    assert train(pruned / "config.yaml", *options).returncode == 0
    assert train(pruned / "config.yaml", *options, f"run_dir={undisturbed}").returncode == 0
    assert (events(pruned).count("resume"), events(undisturbed).count("resume")) == (2, 1)
    for key in ("loss", "distillation_loss", "grad_norm"):
        assert metrics(pruned, key) == metrics(undisturbed, key) and len(metrics(pruned, key)) == 8


@pytest.mark.slow
def test_a_random_pruning_has_the_same_size_and_other_weights(source: Path, pruned: Path, tmp_path: Path) -> None:
    options = ["--target", "0.7", "--random", "1", *FEW]
    assert main(["checkpoint", "prune", str(source), str(tmp_path / "random"), *options]) == 0
    first, second = (load_model(run)[0] for run in (pruned, tmp_path / "random"))
    counts = [sum(p.numel() for p in model.parameters()) for model in (first, second)]
    assert counts[0] == counts[1]
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=False))


@pytest.mark.slow
def test_a_pruned_model_decodes_and_converts_there_and_back(source: Path, tmp_path: Path) -> None:
    """Less than a branch is removed, so that layers get sizes of their own."""
    pruned = tmp_path / "pruned"
    assert main(["checkpoint", "prune", str(source), str(pruned), "--target", "0.97", *FEW]) == 0
    model, _ = load_model(pruned)
    assert model.config.letter_sizes and model.config.num_layers == 4
    ids_BS = torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(2)
    with torch.no_grad():
        full = model(ids_BS).logits_BSV
        steps = [model(ids_BS[:, at : at + 1], cache=cache).logits_BSV for at in range(20)]
    torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-4, rtol=0)
    convert = ["checkpoint", "convert"]
    assert main([*convert, str(pruned), str(tmp_path / "hf"), "--to", "hf", "--check-logits", "off"]) == 0
    assert main([*convert, str(tmp_path / "hf"), str(tmp_path / "back"), "--to", "dcp"]) == 0
    here, there = (CheckpointReader(max((run / "checkpoints").iterdir())) for run in (pruned, tmp_path / "back"))
    for name in here.tensors:
        if name.startswith("model."):
            assert torch.equal(here.read(name), there.read(name)), name


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("training.teacher=nowhere", "checkpoint 'nowhere' does not exist"),
        ("model.vocab_size=512", "has vocab_size 264 and this model 512"),
        ("model.kernels.cross_entropy=reference", "does not compare with a teacher; use auto or chunked"),
    ],
)
def test_teachers_that_do_not_fit_are_refused(
    source: Path, data: Path, tmp_path: Path, setting: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [f"run_dir={tmp_path}/run", f"data.train={data / 'train'}", f"data.validation={data / 'validation'}"]
    options = ["--config", "quickstart", "--check", *paths, *SHORT, f"training.teacher={source}", setting]
    assert main(["train", *options]) == 2
    assert message in capsys.readouterr().err


def test_the_plan_counts_a_teacher(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["plan", "--config", "quickstart", "--gpus", "2"]
    assert main(options) == 0
    assert "teacher" not in capsys.readouterr().out
    assert main([*options, f"training.teacher={source}"]) == 0
    assert f"of the step's seconds are of {source}" in capsys.readouterr().out
    assert main([*options, f"training.teacher={tmp_path}"]) == 2
    # 264 = 8 x 33 tokens, 6 and 3 heads: the teacher allows tp 1 alone, another student 2
    student = ["model.num_kv_heads=6", "model.global_heads=2", "parallel.tp=2", "model.mamba.norm_groups=2"]
    assert main([*options, *student]) == 0
    assert main([*options, *student, f"training.teacher={source}"]) == 2
    assert f"training.teacher '{source}" in capsys.readouterr().err


@pytest.mark.slow
def test_the_comparison_trains_prunes_heals_and_prints_one_table(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison"
    sizes = ["--config", "quickstart", "--steps", "20", "--share", "0.2", "--loss-rows", "4", *FEW]
    settings = ["--set", *SHORT[:3], "logging.log_interval=1"]
    assert compare_pruning.main(["--data", str(data), "--out", str(out), "--device", "cpu", *sizes, *settings]) == 0
    found = json.loads((out / "results.json").read_text())["models"]
    source, healed = found["source"], {name: found[f"{name}, healed"] for name in ("pruned", "random")}
    assert 0.66 < healed["pruned"]["parameters"] / source["parameters"] <= 0.7
    assert healed["pruned"]["parameters"] == healed["random"]["parameters"] == found["from scratch"]["parameters"]
    assert {model["tokens"] for model in found.values()} == {0, 4 * 4 * 64, 20 * 4 * 64}
    for name, model in healed.items():
        assert model["loss"] != found[f"{name}, before healing"]["loss"]
        assert len(metrics(out / name, "distillation_loss")) == 4
    assert healed["pruned"]["loss"] < found["pruned, before healing"]["loss"]
    assert found["from scratch"]["loss"] > healed["pruned"]["loss"]
    assert not metrics(out / "scratch", "distillation_loss")
    assert all(model["decoded_per_s"] > 0 for model in found.values())
    shown = capsys.readouterr().out
    assert (out / "table.md").read_text() in shown and shown.count("\n| ") == 1 + len(found)
    assert (out / "parts.png").stat().st_size > 10_000


def test_the_comparison_needs_one_source_of_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare_pruning.main(["--out", str(tmp_path / "new")]) == 2
    assert "give either --data" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert compare_pruning.main(["--source", "run", "--out", str(tmp_path)]) == 2
    assert "exists; give a new folder" in capsys.readouterr().err
