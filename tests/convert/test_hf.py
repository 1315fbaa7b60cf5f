"""Hugging Face exports: equal logits and tokens in a process without us, and the way back."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fusiontree.checkpoint.load import load_model
from fusiontree.convert import hf_tokenizer
from fusiontree.generation.decoding import generate
from fusiontree.generation.running_batch import pad_left
from fusiontree.generation.sampling import SamplingConfig
from fusiontree.models.model import FusionTreeModel
from tests.convert.checkpoints import all_tensors, convert, training_run
from tests.convert.test_tool import refused
from tests.helpers import tiny_model
from tests.models.variants import VARIANTS

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9, 8], [3] * 12]
NEW = 20

STRANGER = """
import json, sys

class Without:
    '''A finder of modules that does not know some packages.'''

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        absent = ("fusiontree", "mamba_ssm", "causal_conv1d", "flash_attn", "fla", "triton")
        return None if name.split(".")[0] in absent else self.finder.find_spec(name, path, target)

sys.meta_path = [Without(finder) for finder in sys.meta_path]
import torch
from transformers import AutoModelForCausalLM

folders, prompts, new, output = json.loads(sys.argv[1])
width = max(map(len, prompts))
ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
results = {}
for name, folder in folders.items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=None)
    results[name] = (logits, tokens[:, width:])
for absent in ("fusiontree", "triton"):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{absent} could be imported")
torch.save(results, output)
"""


def stranger(folders: dict[str, Path], tmp_path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Load the folders in a process that has only transformers and torch; return logits and greedy tokens."""
    output = tmp_path / "results.pt"
    arguments = json.dumps([{name: str(folder) for name, folder in folders.items()}, PROMPTS, NEW, str(output)])
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, arguments], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output, weights_only=True)


def their_model(ours: FusionTreeModel) -> Any:
    """The exported code with our weights, in this process."""
    from fusiontree.convert.hf import exported_name
    from fusiontree.convert.hf_model.configuration_fusiontree import FusionTreeConfig
    from fusiontree.convert.hf_model.modeling_fusiontree import FusionTreeForCausalLM

    values = {name: value for name, value in ours.config.model_dump().items() if name != "kernels"}
    theirs = FusionTreeForCausalLM(FusionTreeConfig(**values)).eval()
    weights = {exported_name(f"model.{name}"): value for name, value in ours.named_parameters()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs


def test_exports_equal_ours_where_only_transformers_and_torch_are(tmp_path: Path):
    folders, expected = {}, {}
    ids_BS, mask_BS = pad_left(PROMPTS)
    for number, (name, variant) in enumerate(VARIANTS.items()):
        run, folder = tmp_path / f"run{number}", tmp_path / f"hf{number}"
        model = training_run(run, **variant)
        convert(run, folder, "--to", "hf", "--max-shard-size", "40KB" if number % 2 else "1GB")
        folders[name] = folder
        greedy = SamplingConfig(greedy=True)
        rows = generate(model, PROMPTS, max_new_tokens=NEW, sampling=greedy, never=range(257, 264)).rows
        with torch.no_grad():
            logits = model(ids_BS, padding_mask_BS=mask_BS).logits_BSV
        expected[name] = (logits, [row.tokens for row in rows])
    results = stranger(folders, tmp_path)
    assert results.keys() == expected.keys()
    for name, (logits, tokens) in results.items():
        torch.testing.assert_close(logits[mask_BS], expected[name][0][mask_BS], atol=1e-5, rtol=1e-5, msg=name)
        assert tokens.tolist() == expected[name][1], name


@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_is_byte_identical(tied: bool, tmp_path: Path):
    training_run(tmp_path / "run", tie_word_embeddings=tied, layer_pattern="FMA")
    convert(tmp_path / "run", tmp_path / "hf", "--to", "hf", "--max-shard-size", "30KB")
    convert(tmp_path / "hf", tmp_path / "again", "--to", "dcp")
    convert(tmp_path / "again", tmp_path / "hf2", "--to", "hf", "--max-shard-size", "30KB")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("hf", "hf2"))
    assert first == second and len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    before, after = all_tensors(tmp_path / "run"), all_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("model."))
    assert not any(after[n].any() for n in after if n.startswith("optimizer."))
    assert ("model.head.weight" in after) is not tied
    load_model(tmp_path / "again")


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_stored_once(tied: bool, tmp_path: Path):
    training_run(tmp_path / "run", tie_word_embeddings=tied)
    convert(tmp_path / "run", tmp_path / "hf", "--to", "hf", "--dtype", "bf16")
    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:  # the library's own reader
        names = list(file.keys())
        assert ("lm_head.weight" in names) is not tied and "model.embed.weight" in names
        assert file.get_tensor("model.embed.weight").dtype is torch.bfloat16
        assert file.get_tensor("model.layers.0.mamba.ssm.A_log").dtype is torch.float32


def test_what_transformers_saves_again_is_read(tmp_path: Path):
    from fusiontree.convert.hf_model.configuration_fusiontree import FusionTreeConfig

    ours = tiny_model(vocab_size=264, tie_word_embeddings=True)
    theirs = their_model(ours)
    theirs.save_pretrained(tmp_path / "saved")
    assert isinstance(theirs.config, FusionTreeConfig)
    convert(tmp_path / "saved", tmp_path / "run", "--to", "dcp")
    tensors = all_tensors(tmp_path / "run")
    assert all(torch.equal(tensors[f"model.{name}"], value) for name, value in ours.named_parameters())


@pytest.mark.parametrize("block", ["pattern FMAF", "sum and MLP in turn", "mean of normalized branches"])
def test_loss_and_gradients_equal_ours_with_and_without_gradient_checkpointing(block: str):
    variant = {**VARIANTS[block], "attention_type": "pyramidal", "window_size": 2, "window_size_last": 9}
    ours = tiny_model(**variant)
    ids_BS = torch.randint(0, 64, (2, 21), generator=torch.Generator().manual_seed(2))
    labels_BS = torch.cat([ids_BS[:, 1:], torch.full((2, 1), -100)], dim=1)
    (ours(ids_BS, labels_BS=labels_BS).loss_sum / 40).backward()
    for recompute in (False, True):
        theirs = their_model(ours).train()
        if recompute:
            theirs.gradient_checkpointing_enable()
        loss = theirs(ids_BS, labels=ids_BS).loss
        loss.backward()
        assert theirs.model.is_gradient_checkpointing is recompute
        theirs_by_name = dict(theirs.model.named_parameters()) | {"head.weight": theirs.lm_head.weight}
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(theirs_by_name[name].grad, parameter.grad, atol=2e-5, rtol=1e-4, msg=name)


def test_decoding_equals_whole_texts_in_any_pieces():
    theirs = their_model(tiny_model(layer_pattern="FMA", srte_encoding="learnable"))
    ids_BS = torch.randint(0, 64, (2, 30), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = theirs(ids_BS).logits
        cache, pieces = None, []
        for piece in ids_BS.split([9, 1, 1, 12, 7], dim=1):
            output = theirs(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_beams_follow_their_rows():
    theirs = their_model(tiny_model(layer_pattern="FMA"))
    ids_BS = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    options: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 4, "do_sample": False, "pad_token_id": 0}
    with_cache = theirs.generate(ids_BS, **options)
    assert torch.equal(with_cache, theirs.generate(ids_BS, use_cache=False, **options))


def test_right_padding_and_refusals():
    theirs = their_model(tiny_model())
    ids_BS = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 0, 0]])
    mask_BS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        padded = theirs(ids_BS, attention_mask=mask_BS, use_cache=False).logits[1, :3]
        torch.testing.assert_close(padded, theirs(ids_BS[1:, :3]).logits[0], atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # nobody asked for a cache, and pads have no loss
        loss = theirs(ids_BS, attention_mask=mask_BS, labels=ids_BS).loss
        expected = theirs(ids_BS, labels=ids_BS.masked_fill(mask_BS == 0, -100), use_cache=False).loss
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    with pytest.raises(ValueError, match="padding_side='left'"):
        theirs(ids_BS, attention_mask=mask_BS, use_cache=True)
    with pytest.raises(ValueError, match="one run of real tokens"):
        theirs(ids_BS, attention_mask=torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="a row of its own"):
        theirs(ids_BS, position_ids=torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]))
    with pytest.raises(ValueError, match="a row of its own"):
        theirs(ids_BS, seq_idx=torch.zeros(2, 5, dtype=torch.int32))
    theirs(ids_BS, position_ids=torch.arange(5).expand(2, -1))


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_beams": 3}])
def test_texts_go_on_the_same_with_pads_on_any_side(options: dict[str, Any]):
    theirs = their_model(tiny_model(layer_pattern="FMA"))
    alone = [
        theirs.generate(torch.tensor([p]), max_new_tokens=8, do_sample=False, **options)[0, len(p) :] for p in PROMPTS
    ]
    width = max(map(len, PROMPTS))
    for side in ("left", "right"):
        pads = [[0] * (width - len(p)) for p in PROMPTS]
        rows = [(pad + p, [0] * len(pad) + [1] * len(p)) for pad, p in zip(pads, PROMPTS, strict=True)]
        if side == "right":
            rows = [(p + pad, [1] * len(p) + [0] * len(pad)) for pad, p in zip(pads, PROMPTS, strict=True)]
        ids_BS, mask_BS = (torch.tensor(values) for values in zip(*rows, strict=True))
        new = theirs.generate(ids_BS, attention_mask=mask_BS, max_new_tokens=8, do_sample=False, **options)[:, width:]
        assert torch.equal(new, torch.stack(alone)), side


def test_the_byte_tokenizer_reads_as_ours_does(tmp_path: Path):
    from transformers import PreTrainedTokenizerFast

    from fusiontree.data.tokenizers import ByteTokenizer

    training_run(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "hf", "--to", "hf")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    for text in ("Grüße,\n\t 世界 \x00 <|endoftext", "a\r\nb\u2028<|endoftext|>", " x  ", "e\u0301"):
        assert theirs(text)["input_ids"] == ByteTokenizer().encode(text)
        assert theirs.decode(theirs(text)["input_ids"]) == text
    text = "plain"
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == 256 and theirs.padding_side == "left"
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 256
    assert generation["suppress_tokens"] == list(range(257, 264))  # the model's vocabulary is padded


def tokenizer_file(folder: Path, change: Callable[[Any], None]) -> dict[str, Any]:
    """Write a byte-level tokenizer.json with a gap in its ids, changed; return the record of its file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {letter: i + (i > 100) for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary | {"<|endoftext|>": 257, "<|bos|>": 258}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True), AddedToken("<|bos|>", special=True)])
    change(backend)
    backend.save(str(folder / "tokenizer.json"))
    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    names = {"kind": "huggingface", "name": "t", "file": "tokenizer.json"}
    return {**names, "vocab_size": 259, "eos_id": 257, "sha256": digest}


def with_bos(backend: Any) -> None:
    from tokenizers import processors

    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|endoftext|>", special_tokens=[("<|bos|>", 258), ("<|endoftext|>", 257)]
    )


TRAITS: dict[str, Callable[[Any], None]] = {
    "plain": lambda backend: None,
    "bos": with_bos,
    "truncation": lambda backend: backend.enable_truncation(4),
    "padding": lambda backend: backend.enable_padding(length=40, pad_id=257, pad_token="<|endoftext|>"),
    "all": lambda backend: (with_bos(backend), backend.enable_truncation(4), backend.enable_padding(length=9)),
}


@pytest.mark.parametrize("trait", TRAITS)
def test_an_exported_tokenizer_reads_as_training_does(trait: str, tmp_path: Path):
    from transformers import AutoTokenizer

    from fusiontree.data.tokenizers import load_tokenizer

    run = tmp_path / "run"
    training_run(run)
    (folder,) = (run / "checkpoints").iterdir()
    info = tokenizer_file(folder, TRAITS[trait])
    (folder / "tokenizer_info.json").write_text(json.dumps(info))
    files = [folder / "tokenizer_info.json", folder / "tokenizer.json"]
    exported = tmp_path / "hf"
    exported.mkdir()
    ids, unused = hf_tokenizer.write_tokenizer(exported, files, 264)
    assert ids == {"eos_token_id": 257, "pad_token_id": 257}
    assert unused == [101, 259, 260, 261, 262, 263]  # the gap, and the padding of the vocabulary
    (tmp_path / "plain").mkdir()
    info = tokenizer_file(tmp_path / "plain", TRAITS["plain"])
    (tmp_path / "plain" / "tokenizer_info.json").write_text(json.dumps(info))
    theirs, ours = AutoTokenizer.from_pretrained(exported), load_tokenizer(tmp_path / "plain")
    for text in ("ab", "a longer text of some words", "", " Grüße\r\n", "tail\u2028"):
        assert theirs(text)["input_ids"] == ours.encode(text), text
    assert theirs("x <|endoftext|> <|bos|>")["input_ids"] == theirs("x ")["input_ids"] + [
        token for text in ("<|endoftext|>", " ", "<|bos|>") for token in plain_bytes(theirs, text)
    ]
    back = hf_tokenizer.tokenizer_files(exported)
    assert [file.read_bytes() for file in back] == [file.read_bytes() for file in files]


def plain_bytes(tokenizer: Any, text: str) -> list[int]:
    """The tokens of the text's characters, each alone."""
    return [token for letter in text for token in tokenizer(letter)["input_ids"]]


def test_keys_of_a_config_that_no_model_computes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    training_run(tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "hf", "--to", "hf")
    values = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(values | {"rope_scaling": {"type": "linear", "factor": 2}}))
    assert "rope_scaling" in refused(capsys, tmp_path / "hf", tmp_path / "again", "--to", "dcp")
