"""The real programs on a real dataset: what a resume, another layout or another start gives."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusiontree.data.config import DataConfig
from fusiontree.data.loader import TrainingData
from fusiontree.data.tokenizers import ByteTokenizer
from fusiontree.supervision.restart_policy import failures_in_a_row
from fusiontree.tracking.records import read_records
from fusiontree.training.config import TrainingConfig
from tests.data.datasets import documents, write
from tests.end_to_end.runs import ROOT, environment, events, metrics, train, write_config

pytestmark = pytest.mark.xdist_group("training")


@pytest.fixture(scope="module")
def reference(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of one process."""
    folder = tmp_path_factory.mktemp("reference")
    done = train(write_config(folder, data))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_leaves_what_it_promises(reference: Path) -> None:
    last = json.loads((reference / "metrics.jsonl").read_text().splitlines()[-2])
    wanted = "step tokens loss lm_loss load_balance_loss entropy_loss grad_norm lr seq_len tokens_per_s"
    wanted += " tokens_per_s_per_gpu mfu step_time_s data_wait_s peak_memory_gib gates"
    assert set(wanted.split()) <= last.keys()
    assert len(last["gates"]["mean"]) == 2
    assert len(metrics(reference, "validation_loss")) == 2
    assert metrics(reference)[-1] < metrics(reference)[0]
    folders = sorted(p.name for p in (reference / "checkpoints").iterdir())
    assert folders == ["step-00000007", "step-00000014", "step-00000020"]
    assert events(reference)[0] == "start"
    assert events(reference)[-1] == "finished"
    assert (reference / "config.yaml").is_file()


def test_a_resumed_run_equals_an_uninterrupted_one_exactly(reference: Path, data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    for stop in ("training.exit_at_step=5", "training.exit_at_step=12", "training.max_steps=20"):
        done = train(config, stop)
        assert done.returncode == 0, done.stderr
    assert events(tmp_path / "run").count("resume") == 2
    for key in ("loss", "grad_norm", "tokens", "lr", "validation_loss"):
        assert metrics(tmp_path / "run", key) == metrics(reference, key), key


@pytest.mark.slow
def test_every_validation_set_is_measured(reference: Path, data: Path, tmp_path: Path) -> None:
    """The first set's loss is the run's; with one set, nothing has another name than before."""
    other = write(tmp_path / "noise", [documents(40, seed=9)], ByteTokenizer.info)
    sets = f"{{held_out: {data / 'validation'}, noise: {other}}}"
    done = train(write_config(tmp_path, data), f"data.validation={sets}", processes=2)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    for key in ("validation_loss", "validation_tokens", "validation_bits_per_byte"):
        assert metrics(run, key) == pytest.approx(metrics(reference, key), rel=1e-5)
        assert metrics(run, f"{key}/held_out") == metrics(run, key)
    assert len(metrics(run, "validation_loss/noise")) == 2
    assert metrics(run, "validation_loss/noise")[-1] > metrics(run, "validation_loss")[-1]
    assert not metrics(run, "validation_bits_per_byte/noise")  # the dataset does not record bytes of text
    statistics = json.loads((data / "validation" / "dataset.json").read_text())["statistics"]
    bits = metrics(run, "validation_loss")[-1] / math.log(2) * statistics["tokens"] / statistics["text_bytes"]
    assert metrics(run, "validation_bits_per_byte")[-1] == pytest.approx(bits)
    assert "tokens of noise" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "ddp"])
def test_two_ranks_equal_one_process(reference: Path, data: Path, tmp_path: Path, engine: str) -> None:
    done = train(write_config(tmp_path, data), f"parallel.engine={engine}", processes=2)
    assert done.returncode == 0, done.stderr
    for key in ("loss", "grad_norm", "load_balance_loss", "entropy_loss", "validation_loss"):
        assert metrics(tmp_path / "run", key) == pytest.approx(metrics(reference, key), rel=1e-5, abs=1e-7), key
    for key in ("tokens", "tokens_hash"):  # counts, not measurements: exact
        assert metrics(tmp_path / "run", key) == metrics(reference, key), key


def test_the_token_hash_is_that_of_the_rows_that_were_read(reference: Path, data: Path) -> None:
    """Exact to the last bit: float32 keeps 24 of its 32."""
    config = DataConfig(train=str(data / "train"), validation=str(data / "validation"))
    rows = TrainingData(config, TrainingConfig(seq_len=64, max_steps=20, global_batch_size=8, micro_batch_size=2), 264)
    steps = rows.steps(None)
    expected = [f"{next(steps)[0].tokens_hash & 0xFFFF_FFFF:08x}" for _ in range(20)]
    steps.close()
    assert metrics(reference, "tokens_hash") == expected


@pytest.mark.slow
def test_three_ranks_share_a_batch_of_eight(reference: Path, data: Path, tmp_path: Path) -> None:
    """Eight rows do not divide by three ranks; fillers keep them in step and count nothing."""
    done = train(write_config(tmp_path, data), "training.max_steps=6", "training.validation.interval=0", processes=3)
    assert done.returncode == 0, done.stderr
    # Another max_steps is another learning rate from step 5 on; the first four are the warm-up.
    for key in ("loss", "grad_norm"):
        assert metrics(tmp_path / "run", key)[:5] == pytest.approx(metrics(reference, key)[:5], rel=1e-5), key


@pytest.mark.slow
def test_another_accumulation_and_recomputation_change_nothing(reference: Path, data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    done = train(config, "training.micro_batch_size=8", "training.activation_checkpointing=full")
    assert done.returncode == 0, done.stderr
    for key in ("loss", "grad_norm"):
        assert metrics(tmp_path / "run", key) == pytest.approx(metrics(reference, key), rel=1e-5, abs=1e-7), key


@pytest.mark.slow
def test_auto_says_how_much_it_recomputes(reference: Path, data: Path, tmp_path: Path) -> None:
    done = train(write_config(tmp_path, data), "training.activation_checkpointing=auto", "training.exit_at_step=3")
    assert done.returncode == 0, done.stderr
    assert "activation checkpointing: auto, measured in two steps (estimate: none in 2 layers)" in done.stdout
    assert re.search(r"\nrecompute  none in 2 layers \(auto, 0\.0 of \d+\.\d GiB\)\n", done.stdout)
    assert metrics(tmp_path / "run") == metrics(reference)[:3]
    limit = "training.memory_limit=1.0e-12"
    refused = train(write_config(tmp_path, data, "small"), "training.activation_checkpointing=auto", limit)
    assert refused.returncode == 2
    assert re.search(r"a step needs \S+ GiB per rank .* training\.memory_limit 1e-12 allows", refused.stderr)


def test_a_run_moves_to_another_number_of_ranks(reference: Path, data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    assert train(config, "training.exit_at_step=9", processes=2).returncode == 0
    done = train(config)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run") == pytest.approx(metrics(reference), rel=1e-5)


def damage(checkpoint: Path) -> Path:
    """Flip one bit of its largest file and return that file."""
    weights = max(checkpoint.glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0x10
    weights.write_bytes(content)
    return weights


def test_a_damaged_newest_checkpoint_is_passed_over(reference: Path, data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, data)
    assert train(config, "training.exit_at_step=9").returncode == 0
    newest = tmp_path / "run" / "checkpoints" / "step-00000009"
    weights = damage(newest)
    done = train(config)
    assert done.returncode == 0, done.stderr
    assert weights.name in done.stdout + done.stderr
    assert "resumed at step 7" in done.stdout
    assert metrics(tmp_path / "run") == metrics(reference)


@pytest.mark.slow
def test_progress_after_a_damaged_checkpoint_is_kept(reference: Path, data: Path, tmp_path: Path) -> None:
    """A damaged newer checkpoint must not count for retention: the saves after it would be deleted at once."""
    config, run = write_config(tmp_path, data), tmp_path / "run"
    settings = ("checkpoint.save_interval=3", "checkpoint.keep_last=1")
    assert train(config, *settings, "checkpoint.keep_every=6", "training.exit_at_step=11").returncode == 0
    damage(run / "checkpoints" / "step-00000011")
    for stop, resumed in (("training.exit_at_step=8", 6), ("training.exit_at_step=10", 8)):
        done = train(config, *settings, stop)
        assert done.returncode == 0, done.stderr
        assert f"resumed at step {resumed}" in done.stdout
    folders = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert folders == ["damaged-step-00000011", "step-00000010"]
    done = train(config, *settings)
    assert "resumed at step 10" in done.stdout
    assert metrics(run) == metrics(reference)


@pytest.mark.slow
def test_relaunches_of_a_finished_run_are_no_failures(reference: Path, data: Path, tmp_path: Path) -> None:
    """Ten starts of a run that is at its end, then one with a higher ``max_steps``, which trains on."""
    config = write_config(tmp_path, data)
    assert train(config, "training.max_steps=4").returncode == 0
    arguments = ["--config", str(config), "training.max_steps=4"]
    again = f"from fusiontree.train import main\nfor _ in range(10): assert main({arguments!r}) == 0"
    done = subprocess.run([sys.executable, "-c", again], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert events(tmp_path / "run")[-3:] == ["finished", "resume", "finished"]
    assert failures_in_a_row(read_records(tmp_path / "run" / "events.jsonl")) == 0
    done = train(config)
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "run")) == 20


@pytest.mark.slow
def test_a_store_that_is_silent_longer_than_a_step_may_hang_is_waited_for(data: Path, tmp_path: Path) -> None:
    """The scene: reading was to be retried for minutes, and the watchdog ended the job ("hung in 'wait for data'")."""
    store = f"data.train='pipe:sleep 2; cat {data / 'train'}/{{name}}'"
    settings = ["data.allow_pipe=true", f"data.cache_dir={tmp_path / 'cache'}", "data.prefetch_shards=0"]
    settings += ["data.shuffle_shards=1", "data.num_workers=0", "supervision.hang_timeout_s=1.5"]
    done = train(write_config(tmp_path, data), store, *settings, "training.max_steps=8", "training.warmup_steps=0")
    assert done.returncode == 0, done.stderr
    assert max(metrics(tmp_path / "run", "data_wait_s")[1:]) > 1.5  # a shard was waited for after the first step


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_low_precision_learns(data: Path, tmp_path: Path, precision: str) -> None:
    done = train(write_config(tmp_path, data), f"training.precision={precision}", "training.max_steps=12")
    assert done.returncode == 0, done.stderr
    losses = metrics(tmp_path / "run", "lm_loss")
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.slow
def test_curriculum_keeps_the_tokens_of_a_step(data: Path, tmp_path: Path) -> None:
    stages = "training.curriculum=[[16, 3], [32, 4]]"
    config = write_config(tmp_path, data)
    assert train(config, stages, "training.exit_at_step=5").returncode == 0
    done = train(config, stages, "training.max_steps=10")
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run", "seq_len") == [16] * 3 + [32] * 4 + [64] * 3
    whole = write_config(tmp_path, data, "whole")
    assert train(whole, stages, "training.max_steps=10").returncode == 0
    assert metrics(tmp_path / "run")[:5] == metrics(tmp_path / "whole")[:5]


@pytest.mark.slow
def test_shards_inside_a_node_and_copies_between(reference: Path, data: Path, tmp_path: Path) -> None:
    """Four ranks, parameters sharded over pairs; saved so, and resumed by one process."""
    config = write_config(tmp_path, data)
    done = train(config, "parallel.shard_size=2", "training.exit_at_step=9", processes=4)
    assert done.returncode == 0, done.stderr
    assert train(config).returncode == 0
    for key in ("loss", "grad_norm"):
        assert metrics(tmp_path / "run", key) == pytest.approx(metrics(reference, key), rel=1e-5, abs=1e-7), key
