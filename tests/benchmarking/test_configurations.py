"""The benchmark's configurations: each loads, fits its GPUs, needs no dataset, and has its comment's parameters."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fusiontree.config.load import load_config
from fusiontree.config.packaged import find_file, packaged_names
from fusiontree.data.loader import TrainingData
from fusiontree.parallel.validate import check_layout
from fusiontree.planning.cost_model import Hardware, count_parameters, estimate
from fusiontree.utils.errors import UserError

BENCH = [name for name in packaged_names() if name.startswith("bench/")]
GPUS = {"bench/hybrid_7b_32k": 4}
"""GPUs of 80 GB that a configuration is made for, if several."""


def test_the_sizes_are_packaged() -> None:
    assert {f"bench/hybrid_{size}_8k" for size in ("50m", "150m", "400m", "1b")} <= set(BENCH)


@pytest.mark.parametrize("name", BENCH)
def test_a_configuration_fits_its_gpus(name: str) -> None:
    config, gpus = load_config(name), GPUS.get(name, 1)
    check_layout(config.model, config.parallel, config.training, gpus)
    assert config.training.seq_len <= config.model.max_position_embeddings
    assert estimate(config.model, config.parallel, config.training, gpus, Hardware()).total_gib < 76


@pytest.mark.parametrize("name", BENCH)
def test_a_configuration_needs_no_dataset(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(name)
    (micro,) = next(TrainingData(config.data, config.training, config.model.vocab_size, 0, 8).steps())[0].micro_batches
    assert micro.row_weight_B.all() and micro.input_ids_BS.max() < config.model.vocab_size
    with pytest.raises(UserError, match="data/mine"):
        named = load_config(name, ["data.train=data/mine"])
        TrainingData(named.data, named.training, named.model.vocab_size)


@pytest.mark.parametrize("name", [name for name in BENCH if re.search(r"\d+m_", name)])
def test_the_comment_says_the_parameters(name: str) -> None:
    first = find_file(Path(name)).read_text(encoding="utf-8").splitlines()[0]
    said = re.match(r"# ([\d.]+)M parameters, ([\d.]+)M without the embedding look-up: ", first)
    assert said
    model = load_config(name).model
    split, whole, _ = count_parameters(model, 1)
    total = split + whole
    found = (total, total - model.vocab_size * model.hidden_size)
    assert tuple(f"{count / 1e6:.1f}" for count in found) == said.groups()
