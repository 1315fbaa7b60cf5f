"""DeepSpeed's engines do what FSDP2 does: same checkpoint, same losses, same norms, same skipped steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.checkpoint.reader import CheckpointReader
from tests.end_to_end.runs import ROOT, build_data, environment, metrics, train, write_config

pytestmark = [pytest.mark.xdist_group("zero"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A configuration, and a checkpoint of step 3 that FSDP2 wrote."""
    folder = tmp_path_factory.mktemp("start")
    config = write_config(folder, build_data(folder))
    done = train(config, "training.exit_at_step=3", "training.validation.interval=0", processes=2)
    assert done.returncode == 0, done.stderr
    return config, folder / "run" / "checkpoints" / "step-00000003"


def probe(start: tuple[Path, Path], output: Path, *overrides: str, processes: int = 2) -> dict[str, Any]:
    """What an engine made of the checkpoint; it saved the state again at ``output``."""
    config, checkpoint = start
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc-per-node={processes}"]
    command = [*torchrun, "-m", "tests.engines.engine_worker", str(config), str(checkpoint), str(output), *overrides]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = json.loads((output / "found.json").read_text())
    found["output"] = done.stdout + done.stderr
    return found


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    reader = CheckpointReader(folder)
    return {name: reader.read(name) for name in reader.tensors}


def same_bits(one: Path, other: Path) -> None:
    """Assert that two checkpoints hold the same names and the same bits."""
    ours, theirs = tensors_of(one), tensors_of(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def agree(found: dict[str, Any], reference: dict[str, Any], rel: float) -> None:
    """Assert that two engines saw the same."""
    for key in ("skipped", "finite", "dtypes", "steps after the skip", "steps"):
        assert found[key] == reference[key], key
    for key in ("evaluated", "norms", "evaluated after"):
        assert found[key] == pytest.approx(reference[key], rel=rel), key


@pytest.fixture(scope="module")
def fsdp2(start: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return probe(start, tmp_path_factory.mktemp("probe") / "fsdp2", "parallel.engine=fsdp2")


@pytest.mark.slow
def test_zero3_does_what_fsdp2_does(start: tuple[Path, Path], fsdp2: dict[str, Any], tmp_path: Path) -> None:
    found = probe(start, tmp_path / "out", "parallel.engine=zero3")
    agree(found, fsdp2, rel=1e-6)
    same_bits(tmp_path / "out" / "step-00000001", start[1])
    # No rank holds more than its share: nothing is replicated, nothing stays gathered.
    whole = sum(t.numel() for name, t in tensors_of(start[1]).items() if name.startswith("model."))
    assert all(abs(held * 2 / whole - 1) < 0.02 for held in found["held"])
    # A user's console is not DeepSpeed's.
    assert "deepspeed" not in found["output"].lower()
    assert "gcc" not in found["output"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero1", "zero2"])
def test_the_other_stages_do_too(start: tuple[Path, Path], fsdp2: dict[str, Any], tmp_path: Path, engine: str) -> None:
    found = probe(start, tmp_path / "out", f"parallel.engine={engine}", "training.activation_checkpointing=full")
    agree(found, fsdp2, rel=1e-6)
    same_bits(tmp_path / "out" / "step-00000001", start[1])


@pytest.mark.slow
@pytest.mark.parametrize("offload", [("zero1", "optimizer"), ("zero2", "optimizer"), ("zero3", "all")])
def test_waiting_in_cpu_memory_changes_nothing(
    start: tuple[Path, Path], fsdp2: dict[str, Any], tmp_path: Path, offload: tuple[str, str]
) -> None:
    engine, what = offload
    found = probe(start, tmp_path / "out", f"parallel.engine={engine}", f"parallel.offload={what}")
    agree(found, fsdp2, rel=1e-6)
    same_bits(tmp_path / "out" / "step-00000001", start[1])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_is_the_same_under_every_engine(start: tuple[Path, Path], tmp_path: Path, precision: str) -> None:
    """The state space's parameters and the last norm's stay fp32, the others are cast, and nothing else is."""
    common = (f"training.precision={precision}", "training.activation_checkpointing=full")
    reference = probe(start, tmp_path / "fsdp2", "parallel.engine=fsdp2", *common)
    assert reference["dtypes"] == {
        "kept": "torch.float32",
        "other": {"bf16": "torch.bfloat16"}.get(precision, "torch.float16"),
    }
    for engine in ("zero1", "zero2", "zero3"):
        found = probe(start, tmp_path / engine, f"parallel.engine={engine}", *common)
        agree(found, reference, rel=2e-3)  # FSDP2's blocks add the gradients of a common input up in fewer roundings


@pytest.mark.slow
def test_a_run_moves_between_engines(start: tuple[Path, Path], tmp_path: Path) -> None:
    """FSDP2 to ZeRO-3 on another number of ranks, to ZeRO-1, back to FSDP2; as if nothing had moved."""
    data = start[0].parent / "data"
    config = write_config(tmp_path, data)
    whole = write_config(tmp_path, data, "whole")
    assert train(whole).returncode == 0
    for engine, processes, stop in (
        ("fsdp2", 2, 4),
        ("zero3", 4, 9),
        ("zero1", 2, 14),
        ("zero2", 3, 17),
        ("fsdp2", 1, 20),
    ):
        overrides = (f"parallel.engine={engine}", f"training.exit_at_step={stop}")
        done = train(config, *overrides, processes=processes, timeout=600)
        assert done.returncode == 0, done.stderr
    for key in ("loss", "grad_norm", "validation_loss"):
        assert metrics(tmp_path / "run", key) == pytest.approx(metrics(tmp_path / "whole", key), rel=1e-5, abs=1e-7)
