"""Configuration errors name the key, its place and the way out; resolved configurations read back equal."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from fusiontree.config.describe import describe_settings
from fusiontree.config.load import build_config, dump_config, load_config
from fusiontree.utils import settings
from fusiontree.utils.errors import UserError

BASE = """
run_dir: runs/x
model: {vocab_size: 264, hidden_size: 64, num_layers: 2, num_heads: 4, gate_rank: 8, max_position_embeddings: 128}
training: {seq_len: 64, max_steps: 10, global_batch_size: 4, learning_rate: 3e-4}
data: {train: shards}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(BASE)
    return path


def error_of(file: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    return str(caught.value)


def test_overrides_win_and_scientific_numbers_are_numbers(file: Path) -> None:
    config = load_config(file, ["training.learning_rate=1e-3", "model.mamba.d_state=16", "training.max_steps=7"])
    assert config.training.learning_rate == 1e-3
    assert config.model.mamba.d_state == 16
    assert config.training.max_steps == 7


def test_a_bare_off_is_a_choice_and_no_boolean(file: Path, tmp_path: Path) -> None:
    config = load_config(
        file, ["supervision.health_check=off", "training.spikes.policy=off", "training.cuda_graphs=on"]
    )
    assert (config.supervision.health_check, config.training.spikes.policy) == ("off", "off")
    assert config.training.cuda_graphs == "on"
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    assert "training.max_steps" in error_of(file, "training.max_steps=off")


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("parallel.keep_below", "parallel.zero3_persistence_threshold", 7),
        ("training.checkpointed_layers", "training.recompute_layers", 1),
    ],
)
def test_a_former_name_is_understood_and_warns_once(
    file: Path, old: str, new: str, value: int, caplog: pytest.LogCaptureFixture
) -> None:
    settings.warn_of_former_name.cache_clear()
    configs = [load_config(file, [f"{old}={value}"]), load_config(file, [f"{old}={value}"])]
    assert configs == [load_config(file, [f"{new}={value}"])] * 2
    leaf, present = old.split(".")[1], new.split(".")[1]
    assert [record.getMessage() for record in caplog.records] == [f"the setting '{leaf}' is now named '{present}'"]
    assert f"'{leaf}' is the former name of '{present}', and both are given" in error_of(file, f"{old}=1", f"{new}=1")


def test_resolved_config_reads_back_equal(file: Path, tmp_path: Path) -> None:
    config = load_config(file, ["training.curriculum=[[32, 5]]"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


@pytest.mark.parametrize("text", ["1e5", "010", "1:30", "2024-01-01", ".5", "on", "null", "0x1f", "a: b", "- a", "1.5"])
def test_texts_that_look_like_numbers_stay_texts(file: Path, tmp_path: Path, text: str) -> None:
    config = load_config(file, [f"run_dir='{text}'"])
    assert config.run_dir == text
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.seq_length=64", ["training.seq_length", "did you mean 'seq_len'"]),
        ("model.mamba.dstate=64", ["model.mamba.dstate", "did you mean 'd_state'"]),
        ("trainig.seed=1", ["trainig", "did you mean 'training'"]),
        ("training.num_heads=4", ["training.num_heads", "belongs in model.num_heads"]),
        ("model.num_heads=5", ["hidden_size 64", "num_heads 5"]),
        ("model.num_heads=four", ["model.num_heads", "'four'"]),
        ("model.num_heads=4.5", ["model.num_heads", "4.5"]),
        ("model.window_size=0", ["model.window_size", "greater than or equal to 1"]),
        ("model.num_kv_heads=3", ["num_heads 4", "num_kv_heads 3"]),
        ("model.global_heads=9", ["global_heads 9", "num_heads 4"]),
        ("model.mamba.n_groups=3", ["n_groups 3"]),
        ("model.layer_pattern=FFF", ["FFF", "num_layers is 2"]),
        ("model.layer_pattern=FX", ["'X'"]),
        ("training.seq_len=4096", ["seq_len 4096", "max_position_embeddings 128"]),
        ("training.curriculum=[[48, 5]]", ["48", "does not divide seq_len 64"]),
        ("training.validation.interval=5", ["data.validation"]),
        ("model=3", ["model"]),
        ("model.hidden_size.x=3", ["model.hidden_size is a value"]),
        ("nonsense", ["section.key=value"]),
        ("training.precision=int8", ["training.precision", "'bf16'"]),
    ],
)
def test_each_mistake_is_named(file: Path, override: str, parts: list[str]) -> None:
    message = error_of(file, override)
    for part in parts:
        assert part in message, message


def test_missing_key_and_file_are_named(file: Path) -> None:
    values = yaml.safe_load(BASE)
    del values["training"]["max_steps"]
    with pytest.raises(UserError, match=r"'training.max_steps' is missing"):
        build_config(values, "here")
    with pytest.raises(UserError, match=r"did you mean 'run\.yaml'"):
        load_config(file.with_name("runs.yaml"))


def test_a_key_given_twice_is_an_error(file: Path) -> None:
    file.write_text(BASE + "run_dir: other\n")
    assert "'run_dir' is given twice" in error_of(file)


def test_every_setting_is_described() -> None:
    text = describe_settings()
    assert "training.seq_len  [int, tokens] required" in text
    assert "model.mamba.d_state" in text
    assert "= PydanticUndefined" not in text
    lines = text.splitlines()
    undocumented = [a for a, b in itertools.pairwise(lines) if a.startswith("  ") and "[" in a and not b.strip()]
    assert not undocumented


def test_num_heads_is_respected(file: Path) -> None:
    """A prototype ignored this key of its config."""
    assert load_config(file, ["model.num_heads=2"]).model.num_heads == 2


def test_merge_keys_merge_and_what_is_written_wins(file: Path) -> None:
    """Usual YAML: anchors, merges of one or several mappings, nested; a key in two merged mappings is no mistake."""
    text = BASE.replace("training: {seq_len: 64, max_steps: 10, global_batch_size: 4, learning_rate: 3e-4}", "")
    inner = "{<<: {seq_len: 32, learning_rate: 1e-3}, max_steps: 7, global_batch_size: 4}"
    for section in (
        f"training: {inner}",
        "training: {<<: [{seq_len: 32, max_steps: 7}, {max_steps: 9, global_batch_size: 4}], learning_rate: 1e-3}",
        "training:\n  <<: {<<: {seq_len: 16, global_batch_size: 4}, seq_len: 32, max_steps: 7}\n  learning_rate: 1e-3",
    ):
        file.write_text(f"{text}\n{section}\n")
        training = load_config(file).training
        assert (training.seq_len, training.max_steps, training.learning_rate) == (32, 7, 1e-3)
    file.write_text(f"{text}\ntraining: {{<<: {{seq_len: 1}}, seq_len: 2, seq_len: 3}}\n")
    assert "key 'seq_len' is given twice (line " in error_of(file)


def test_entries_that_hold_what_others_take_over_are_no_settings(file: Path) -> None:
    """As usual in YAML: templates at the top, taken over by merge keys or aliases, also of one another."""
    text = BASE.replace("training: {seq_len: 64, max_steps: 10, global_batch_size: 4, learning_rate: 3e-4}", "")
    file.write_text(
        "base: &base {seq_len: 32, max_steps: 6, global_batch_size: 4}\nx-rates: [&low 1e-3, 2.0]\n"
        "training_base: &more\n  <<: *base\n  max_steps: 7\n"
        f"{text}\ntraining:\n  <<: *more\n  learning_rate: *low\n"
    )
    training = load_config(file).training
    assert (training.seq_len, training.max_steps, training.learning_rate) == (32, 7, 1e-3)
    file.write_text(f"{BASE}\nbase: &base {{seq_len: 32}}\n")  # nothing takes it over
    assert "unknown key 'base'" in error_of(file)
    file.write_text(f"base: &base 3e-4\n{BASE.replace('3e-4', '*base')}\nbase2: *base\nbase3: {{a: *base}}\n")
    assert "unknown key 'base2'" in error_of(file) and "unknown key 'base3'" in error_of(file)
    file.write_text(f"{BASE}\ntrainin: &t {{seq_len: 32}}\nevaluation: *t\n")
    assert "did you mean 'training'" in error_of(file)
    file.write_text(f"base: &a {{b: *a}}\n{BASE}")
    assert "not valid YAML" in error_of(file) or "unknown key" in error_of(file)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"run_dir: caf\xe9\n", "is not UTF-8: byte 0xe9 at position 12"),
        (BASE.encode("utf-16"), "is not UTF-8"),
        (b"run_dir: \x00\n", "not valid YAML"),
        (b"run_dir: [a\n", "not valid YAML"),
        (b"run_dir: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        (b"run_dir: *x\n", "not valid YAML"),
        (b"? [a, b]\n: 1\n", "a key is a list or a mapping (line 1)"),
        (b"a: &a [*a]\n", "not valid YAML"),
        (b"[" * 1200, "not valid YAML"),
        (b"n: " + b"9" * 5000, "not valid YAML"),
        (b"", "is empty or no mapping"),
        (b"- a\n", "is empty or no mapping"),
        (b"just words", "is empty or no mapping"),
        (b"1: 2\nnull: 3\n", "unknown key"),
    ],
)
def test_a_file_that_is_no_configuration_gives_one_error(file: Path, content: bytes, named: str) -> None:
    file.write_bytes(content)
    assert named in error_of(file)


def test_what_cannot_be_read_is_named(file: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml' does not exist" in error_of(tmp_path / "folder.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert "does not exist" in error_of(tmp_path / "loop.yaml")
    file.write_bytes(b"\xef\xbb\xbf" + BASE.encode())  # Windows editors begin a file so
    assert load_config(file).training.seq_len == 64


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("training.max_steps=010", "'training.max_steps' is '010'"),
        ("supervision.restart_backoff_s=1:30", "'supervision.restart_backoff_s' is '1:30'"),
        (f"training.max_steps={10**30}", "'training.max_steps' is 1000000"),
        ("run_dir=", "'run_dir' is None"),
        ("training.=3", "unknown key"),
        ("training.<<[x](y)=3", "unknown key 'training.<<[x](y)'"),
        ("str=3", "unknown key 'str'"),
        ("data.train=[", "not valid YAML"),
        ("training=null", "'training' is None"),
        ("training.max_steps=true", "'training.max_steps' is True"),
    ],
)
def test_values_are_never_read_as_something_else(file: Path, override: str, named: str) -> None:
    assert named in error_of(file, override)


def test_words_that_yaml_reads_otherwise_stay_words(file: Path) -> None:
    assert load_config(file, ["run_dir=2024-01-01"]).run_dir == "2024-01-01"
    sets = load_config(file, ["data.validation={on: a, 2024: b, null: c}"]).data.validation_sets
    assert list(sets) == ["on", "2024", "null"]
    assert load_config(file, ["training.max_steps=1_000"]).training.max_steps == 1000


@pytest.mark.parametrize(
    "value", ["!!int", "!!float", "!!bool maybe", "!!timestamp x", "!!int x", "!!binary é", "!!set x"]
)
def test_values_that_do_not_fit_their_tags_are_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "run.yaml").write_text(f"run_dir: {value}\n")
    with pytest.raises(UserError, match=r"run\.yaml: not valid YAML"):
        load_config(tmp_path / "run.yaml")
