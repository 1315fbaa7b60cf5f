"""Mutated weight folders: an error of one line, or the tensors and logits that the files' own library computes."""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusiontree.convert.foreign import Agreement, agree, read_foreign
from fusiontree.convert.formats import Options, Stream, open_source
from fusiontree.convert.logits import fusiontree_logits
from fusiontree.convert.name_map import NameMap, read_map
from fusiontree.convert.reader import CheckpointSource
from fusiontree.convert.safe_unpickle import load_inert
from fusiontree.convert.warm_start import MappedWeights
from fusiontree.convert.weights import open_weights
from fusiontree.models.config import ModelConfig
from fusiontree.utils.errors import UserError
from tests.convert.test_foreign import their_folder
from tests.convert.test_hf import their_model
from tests.convert.test_warm_start import MAMBA2
from tests.data.test_fuzz_inputs import mutate_bytes, mutate_value
from tests.helpers import TINY, tiny_model

IDS_BS = (torch.arange(24)[None] * 7919 + 13) % 60


def cases(few: int, many: int) -> Any:
    return pytest.mark.parametrize("cases", [few, pytest.param(many, marks=pytest.mark.slow)])


def one_line(error: UserError) -> None:
    assert str(error).strip() and "\n" not in str(error).strip() and "Traceback" not in str(error)


def changed_header(content: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header's values, bytes or length are others."""
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    how = draw.randrange(4)
    if how == 0:
        header = mutate_bytes(header, draw)
    elif how == 1:
        return mutate_bytes(content, draw)
    else:
        values = json.loads(header)
        mutate_value(values, draw)
        header = json.dumps(values).encode()
    length = len(header) if draw.random() < 0.9 else draw.choice([0, length, length + 8, 1 << 40, (1 << 64) - 1])
    return length.to_bytes(8, "little") + header + content[8 + int.from_bytes(content[:8], "little") :]


def their_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors that the library itself reads, or None."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError, KeyError, TypeError, AttributeError):
        return None


def same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and raw(left) == raw(right)


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@cases(100, 1000)
def test_safetensors_files(tmp_path: Path, cases: int) -> None:
    """What is read is what the library reads; a file that it refuses is refused."""
    draw, read = random.Random(4), 0
    generator = torch.Generator().manual_seed(1)
    tensors = {"a": torch.randn(4, 3, generator=generator), "b": torch.ones(5).bfloat16(), "c": torch.tensor(3)}
    tensors |= {"d": torch.zeros(0, 3), "e": torch.tensor([True, False])}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    whole = path.read_bytes()
    for case in range(cases):
        path.write_bytes(changed_header(whole, draw))
        try:
            file = open_weights(tmp_path)
            ours = {name: file.read(name) for name in file.entries}
        except UserError as error:
            one_line(error)
            continue
        read += 1
        theirs = their_tensors(path)
        assert theirs is not None and theirs.keys() == ours.keys(), (case, path.read_bytes()[:500])
        assert all(same(theirs[name], ours[name]) for name in ours), case
    assert 0.05 * cases < read < 0.9 * cases, read


def test_files_that_no_sum_of_sizes_betrays(tmp_path: Path) -> None:
    """Gaps, bytes behind the last tensor, names given twice, a flipped bit in a file of torch.save."""
    path = tmp_path / "model.safetensors"
    entry = '"%s": {"dtype": "F32", "shape": [2], "data_offsets": [%d, %d]}'
    for header, size, said in (
        ("{" + entry % ("a", 8, 16) + "}", 16, "no tensor has the bytes before the values of 'a'"),
        ("{" + entry % ("a", 0, 8) + "}", 12, "no tensor has the bytes at the end"),
        ("{" + entry % ("a", 0, 8) + ", " + entry % ("a", 8, 16) + "}", 16, "given twice"),
        ('{"__metadata__": {"format": 1}, ' + entry % ("a", 0, 8) + "}", 8, "no mapping of texts"),
        ('{"__metadata__": [], ' + entry % ("a", 0, 8) + "}", 8, "cannot be read"),
        ('{"__metadata__": {}, ' + entry % ("a", 0, 8) + "}", 8, ""),
    ):
        path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(size))
        assert (their_tensors(path) is None) == bool(said) or said == "given twice"
        if said:
            with pytest.raises(UserError, match=said):
                open_weights(path)
        else:
            assert set(open_weights(path).entries) == {"a"}
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.full((64,), 3.0)}, file)
    content = file.read_bytes()
    place = content.index(torch.full((64,), 3.0).numpy().tobytes())
    file.write_bytes(content[: place + 5] + bytes([content[place + 5] ^ 1]) + content[place + 6 :])
    for read in (open_weights, load_inert):
        with pytest.raises(UserError, match="checksum"):
            read(file)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.full((64,), 3.0)}, file)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(open_weights(file).read("a"), torch.full((64,), 3.0))


@cases(30, 300)
def test_torch_files(tmp_path: Path, cases: int) -> None:
    """A damaged file of torch.save is refused, or gives the tensors that were saved."""
    draw, read = random.Random(5), 0
    tensors = {"a": torch.arange(12.0).reshape(4, 3), "b": torch.ones(5).bfloat16()}
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors, path)
    whole = path.read_bytes()
    for case in range(cases):
        path.unlink()  # the former file may still be mapped into memory
        path.write_bytes(mutate_bytes(whole, draw))
        try:
            file = open_weights(tmp_path)
            ours = {name: file.read(name) for name in file.entries}
        except UserError as error:
            one_line(error)
            continue
        read += 1
        assert ours.keys() == tensors.keys() and all(same(tensors[name], ours[name]) for name in ours), case
    assert read < 0.9 * cases, read


KEYS: dict[str, list[Any]] = {
    "hidden_act": ["silu", "gelu", "relu"],
    "layer_norm_epsilon": [1e-5, 1e-3, 0.1],
    "n_groups": [1, 2, 4],
    "state_size": [8, 16, 32],
    "head_dim": [4, 8, 16],
    "num_heads": [4, 8, 16],
    "expand": [1, 2, 4],
    "hidden_size": [16, 32, 64],
    "conv_kernel": [3, 4],
    "vocab_size": [50, 60, 64],
    "num_hidden_layers": [1, 2, 3],
    "tie_word_embeddings": [True, False],
    "time_step_limit": [[0.0, 1.0], [0.3, 0.6], [0.01, 1e9], [0.0, {"__float__": "Infinity"}]],
    "time_step_min": [1e-3, 1e-2],
    "use_bias": [True, False],
    "use_conv_bias": [True, False],
    "residual_in_fp32": [True, False],
    "norm_before_gate": [True, False],
    "rms_norm": [True, False],
    "chunk_size": [4, 8, 256],
    "model_type": ["mamba2", "mamba", "llama", "bamba"],
    "rope_theta": [1e4, 5e5],
    "torch_dtype": ["float32", "bfloat16"],
}


def change(values: dict[str, Any], draw: random.Random) -> None:
    """Change a setting to a likely value, or anything in the file."""
    if draw.random() < 0.75:
        key = draw.choice(list(KEYS))
        values[key] = draw.choice(KEYS[key])
    else:
        mutate_value(values, draw)


def started(folder: Path, rules: NameMap, model: ModelConfig, explicit: set[str]) -> MappedWeights:
    """Open a folder as the command does for a map."""
    foreign = read_foreign(folder)
    agreement = Agreement({}, [])
    values = model.model_dump(mode="json")
    if foreign is not None:
        agreement = agree(foreign, model, explicit, rules.targets, rules.accept)
        for name, value in agreement.adopted.items():
            *section, key = name.split(".")
            (values[section[0]] if section else values)[key] = value
    try:
        ModelConfig.model_validate(values)
    except ValueError as error:  # the command gives the same as one line
        raise UserError("the configuration does not allow it") from error
    return MappedWeights(folder, rules, {"model": values}, 0, foreign, agreement)


def logits_of(source: CheckpointSource) -> Tensor:
    return fusiontree_logits(Stream(source, None, lambda done, total: None), IDS_BS, torch.float32)


def theirs_of(folder: Path, weights: dict[str, Tensor]) -> Tensor | None:
    """Logits of transformers' own model with a folder's configuration, None if it cannot be built from the folder."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    try:
        model = Mamba2ForCausalLM(Mamba2Config.from_pretrained(folder)).eval()
        missing, unexpected = model.load_state_dict(weights, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            return None
        model.tie_weights()
        with torch.no_grad():
            return model(IDS_BS, use_cache=False).logits.double()
    except Exception:  # of any kind: the configuration is nonsense
        return None


@cases(12, 250)
def test_foreign_configurations(tmp_path: Path, cases: int) -> None:
    """A model that starts from a folder by an exact map computes what transformers does, or is refused."""
    pytest.importorskip("transformers")
    draw, equal = random.Random(6), 0
    folder = their_folder("Mamba2", tmp_path / "theirs")
    base, weights = (folder / "config.json").read_text(), load_file(folder / "model.safetensors")
    mamba = {**TINY.get("mamba", {}), "n_groups": 2, "norm_groups": 2}
    model = ModelConfig.model_validate({**TINY, "layer_pattern": "MM", "mamba": mamba})
    explicit = model.model_fields_set - {"tie_word_embeddings", "srte_encoding"}
    rules = read_map(MAMBA2)
    for case in range(cases):
        values = json.loads(base)
        for _ in range(draw.choice([1, 1, 2])):
            with contextlib.suppress(IndexError):
                change(values, draw)
        content = json.dumps(values).encode()
        (folder / "config.json").write_bytes(content if draw.random() < 0.9 else mutate_bytes(content, draw))
        try:
            source = started(folder, rules, model, set(explicit))
            ours_BSV = logits_of(source)[..., :60]
        except UserError as error:
            one_line(error)
            continue
        assert source.original is not None
        theirs_BSV = theirs_of(folder, weights)
        if source.original.differences or theirs_BSV is None:  # said to the user, or the check of logits fails
            continue
        equal += 1
        largest = max(1.0, float(theirs_BSV.abs().max()))
        assert float((ours_BSV - theirs_BSV[..., :60]).abs().max()) <= 1e-4 * largest, (case, values)
    assert equal > 0.1 * cases, equal


@cases(20, 250)
def test_maps(tmp_path: Path, cases: int) -> None:
    """A mutated map is refused with an error for a person, or fills every parameter that it names."""
    draw = random.Random(7)
    pytest.importorskip("transformers")
    folder = their_folder("Mamba2", tmp_path / "theirs")
    mamba = {**TINY.get("mamba", {}), "n_groups": 2, "norm_groups": 2}
    model = ModelConfig.model_validate({**TINY, "layer_pattern": "MM", "mamba": mamba, "tie_word_embeddings": False})
    base = yaml.safe_load(MAMBA2.read_text())
    for _ in range(cases):
        values = json.loads(json.dumps(base))
        mutate_value(values, draw)
        content = yaml.safe_dump(values).encode()
        (tmp_path / "map.yaml").write_bytes(content if draw.random() < 0.7 else mutate_bytes(content, draw))
        try:
            source = started(folder, read_map(tmp_path / "map.yaml"), model, set())
            for name, entry in source.entries.items():
                assert tuple(source.read(name).shape) == entry.shape
        except UserError as error:
            assert str(error).strip()


@cases(20, 250)
def test_exported_folders(tmp_path: Path, cases: int) -> None:
    """A mutated folder of our own export is refused, or its model computes what the exported code does."""
    pytest.importorskip("transformers")
    from fusiontree.convert.hf_model.configuration_fusiontree import FusionTreeConfig
    from fusiontree.convert.hf_model.modeling_fusiontree import FusionTreeForCausalLM

    draw, equal = random.Random(8), 0
    their_model(tiny_model()).save_pretrained(tmp_path / "hf")
    folder = tmp_path / "hf"
    base, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    shutil.copy(folder / "config.json", tmp_path / "config.json")
    for case in range(cases):
        values = json.loads(json.dumps(base))
        mutate_value(values, draw)
        content = json.dumps(values).encode()
        (folder / "config.json").write_bytes(content if draw.random() < 0.8 else mutate_bytes(content, draw))
        try:
            _, source = open_source(folder, "hf", Options())
            ours_BSV = logits_of(source)
        except UserError as error:
            assert str(error).strip()
            continue
        given = json.loads((folder / "config.json").read_text())
        try:
            theirs = FusionTreeForCausalLM(FusionTreeConfig(**given)).eval()
            missing, unexpected = theirs.load_state_dict(weights, strict=False)
        except Exception:  # the exported code refuses the configuration in its own way
            continue
        if unexpected or set(missing) - {"lm_head.weight"}:
            continue
        theirs.tie_weights()
        with torch.no_grad():
            theirs_BSV = theirs(IDS_BS, use_cache=False).logits.double()
        assert theirs_BSV.shape == ours_BSV.shape
        difference = float((ours_BSV - theirs_BSV).abs().max())
        assert math.isfinite(difference) and difference <= 1e-4 * max(1.0, float(theirs_BSV.abs().max())), (case, given)
        equal += 1
    assert equal > 0.1 * cases, equal
