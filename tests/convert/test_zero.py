"""DeepSpeed's own ZeRO folders: read from what DeepSpeed saves, written so that DeepSpeed loads them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.convert.checkpoints import all_tensors, convert, equal, training_run
from tests.convert.test_tool import refused
from tests.convert.test_warm_start import Bomb
from tests.end_to_end.runs import ROOT, environment, write_config
from tests.helpers import TINY


@pytest.mark.parametrize(
    ("stage", "dp", "tp", "tied"),
    [
        (1, 2, 1, True),
        pytest.param(2, 3, 1, False, marks=pytest.mark.slow),
        pytest.param(2, 1, 2, True, marks=pytest.mark.slow),
        pytest.param(3, 2, 1, True, marks=pytest.mark.slow),
        (3, 3, 2, False),
    ],
)
def test_there_and_back(stage: int, dp: int, tp: int, tied: bool, tmp_path: Path):
    model = training_run(tmp_path / "run", layer_pattern="FMA", tie_word_embeddings=tied)
    convert(tmp_path / "run", tmp_path / "zero", "--to", "zero", "--stage", stage, "--dp", dp, "--tp", tp)
    assert (tmp_path / "zero" / "latest").read_text() == "global_step7"
    files = [file.name for file in (tmp_path / "zero" / "global_step7").iterdir()]
    assert len(files) == dp * tp + (dp * tp if stage == 3 else tp)
    convert(tmp_path / "zero", tmp_path / "again", "--to", "dcp")
    assert equal(all_tensors(tmp_path / "again"), all_tensors(tmp_path / "run"))
    states = [next((tmp_path / n / "checkpoints").glob("*/state.json")).read_text() for n in ("run", "again")]
    assert json.loads(states[0]) == json.loads(states[1])
    if tp > 1:
        return
    pytest.importorskip("deepspeed")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    theirs = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "zero"))  # DeepSpeed's own reader
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(theirs[name], value) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "dp", "tp"), [("zero1", 2, 1), ("zero2", 1, 2), ("zero3", 2, 1), ("zero3", 2, 2)])
def test_deepspeed_saves_what_we_read_and_loads_what_we_write(engine: str, dp: int, tp: int, tmp_path: Path):
    pytest.importorskip("deepspeed")
    config = write_config(tmp_path, tmp_path / "data")
    values = yaml.safe_load(config.read_text())
    values["model"] = {**TINY, "layer_pattern": "FA", "tie_word_embeddings": dp * tp == 4}
    config.write_text(yaml.safe_dump(values))

    def deepspeed(action: str, folder: str, ours: str) -> None:
        launcher = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc-per-node={dp * tp}"]
        script = str(Path(__file__).with_name("zero_side.py"))
        arguments = [action, engine, str(tp), str(config), str(tmp_path / folder), str(tmp_path / ours)]
        env = environment() | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run([*launcher, script, *arguments], env=env, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[-3000:]

    deepspeed("save", "theirs", "expected")
    expected = all_tensors(tmp_path / "expected")
    convert(tmp_path / "theirs", tmp_path / "read", "--to", "dcp", "--config", config)
    assert equal(all_tensors(tmp_path / "read"), expected)
    sizes = ("--stage", engine[-1], "--dp", dp, "--tp", tp)
    convert(tmp_path / "read", tmp_path / "written", "--to", "zero", *sizes)
    deepspeed("load", "written", "loaded")
    assert equal(all_tensors(tmp_path / "loaded"), expected)


def test_code_in_a_folder_is_never_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    training_run(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "zero", "--to", "zero", "--stage", 1)
    file = next((tmp_path / "zero" / "global_step7").glob("*optim_states.pt"))
    content = torch.load(file, weights_only=False)
    content["optimizer_state_dict"]["loss_scaler"] = Bomb(tmp_path / "mark")
    torch.save(content, file)
    convert(tmp_path / "zero", tmp_path / "again", "--to", "dcp")
    assert equal(all_tensors(tmp_path / "again"), all_tensors(tmp_path / "run"))
    assert not (tmp_path / "mark").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "mark").exists()  # the bomb works


def test_incomplete_and_foreign_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    training_run(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "zero", "--to", "zero", "--stage", 2, "--dp", 2, "--tp", 2)
    tag = tmp_path / "zero" / "global_step7"

    def said() -> str:
        return refused(capsys, tmp_path / "zero", tmp_path / "again", "--to", "dcp")

    ours = tmp_path / "zero" / "fusiontree.json"
    values = json.loads(ours.read_text())
    values["config"]["model"]["hidden_size"] = 64
    ours.write_text(json.dumps(values))
    assert "on a rank; at tp 2 it should be" in said()
    ours.write_text(json.dumps(values | {"config": {"model": {"of_a_later_version": True}}}))
    assert "configuration describes no model of this version (model.of_a_later_version: " in said()
    ours.unlink()
    assert "give --config FILE" in said()
    values["config"]["model"]["hidden_size"] = 32
    ours.write_text(json.dumps(values))
    (tag / "mp_rank_00_model_states.pt").rename(tag / "elsewhere")
    assert "lacks mp_rank_00_model_states.pt" in said()
    (tag / "zero_pp_rank_0_mp_rank_01_optim_states.pt").unlink()
    assert "lacks the optimizer states of zero_pp_rank_0_mp_rank_01" in said()
    assert "must be at least 1" in refused(capsys, tmp_path / "run", tmp_path / "x", "--to", "zero", "--dp", 0)
