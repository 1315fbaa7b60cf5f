"""Hugging Face folders: sharded safetensors, configuration, tokenizer, and the model's code.

Parameter names are FusionTree's with the prefix ``model.``, except for the head, which is ``lm_head.weight``. A tied
head is not stored: transformers ties it by ``tie_word_embeddings``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from fusiontree.convert import hf_model
from fusiontree.convert.reader import TOKENIZER_FILES, CheckpointSource, Entry, Stream, checked
from fusiontree.convert.safetensors_file import SafetensorsFile, write_safetensors
from fusiontree.models.config import LETTERS, ModelConfig
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import write_json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TRAINING_TOKENIZER = "training_tokenizer"
"""Folder with a tokenizer's files as training had them, if transformers would tokenize otherwise by them."""
CODE = ("configuration_fusiontree.py", "modeling_fusiontree.py")
NO_EFFECT = frozenset(
    (
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "auto_map",
        "bos_token_id",
        "chunk_size",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "hidden_size",
        "id2label",
        "initializer_range",
        "intermediate_size",
        "is_encoder_decoder",
        "label2id",
        "mamba_chunk_size",
        "mamba_conv_bias",
        "mamba_expand",
        "num_hidden_layers",
        "num_logits_to_keep",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "rescale_prenorm_residual",
        "residual_in_fp32",
        "return_dict",
        "time_step_floor",
        "time_step_max",
        "time_step_min",
        "time_step_rank",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "use_conv_bias",
        "vocab_size",
        "z_loss_coefficient",
    )
)
"""Keys of a config.json that do not change what a model computes, or are sizes that the weights' shapes show."""
_HEAD = ("model.head.weight", "lm_head.weight")
_LEFT_OUT = ("kernels", "letters", "mixers")  # settings of the machine, and of mixers that the code does not have


def exported_name(name: str) -> str:
    """Return the name of a parameter in the Hugging Face folder."""
    return _HEAD[1] if name == _HEAD[0] else name


def training_name(name: str) -> str:
    """Return the name of a parameter in a training checkpoint."""
    return _HEAD[0] if name == _HEAD[1] else name


class HuggingFaceFolder(CheckpointSource):
    """A folder written by :func:`write`, or saved from it by transformers' ``save_pretrained``."""

    def __init__(self, path: Path) -> None:
        """Open the folder.

        Raises:
            UserError: the folder is incomplete or of another type of model, or weights and configuration disagree.
        """
        config = read_json(path / CONFIG)
        if config.get("model_type") != "fusiontree":
            raise UserError(
                f"{path / CONFIG} describes a model of type '{config.get('model_type')}', not 'fusiontree'; to start "
                f"from another model's weights give --map FILE and --config FILE"
            )
        known = ModelConfig.model_fields.keys()
        others = {k: v for k, v in config.items() if k not in known and k not in NO_EFFECT | {"model_type"}}
        if foreign := [f"{key} {value!r}" for key, value in others.items() if value not in (None, False)]:
            raise UserError(
                f"{path / CONFIG} has {', '.join(foreign)}, which no model of this project computes; remove it if it "
                f"has no effect"
            )
        self.config = {"model": {name: value for name, value in config.items() if name in known}}
        self.files = tokenizer_files(path)
        self._weights = SafetensorsFolder(path)
        self.entries = {training_name(name): entry for name, entry in self._weights.entries.items()}
        if self.model_config.tie_word_embeddings:
            self.entries.pop(_HEAD[0], None)  # some writers also store the tied head
        self.entries = checked(self.entries, self.model_config, str(path))

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._weights.read(exported_name(name))


def tokenizer_files(path: Path) -> list[Path]:
    """Return the files that FusionTree reads a tokenizer from; empty if no file gives the end-of-document token."""
    if (path / TRAINING_TOKENIZER).is_dir():
        path = path / TRAINING_TOKENIZER
    info = path / TOKENIZER_FILES[0]
    if not info.is_file():
        return []
    return [info] if read_json(info).get("file") is None else [info, path / TOKENIZER_FILES[1]]


class SafetensorsFolder:
    """The tensors of a folder's safetensors files."""

    def __init__(self, path: Path) -> None:
        """Open the files.

        Raises:
            UserError: there is no safetensors file, or a file or tensor named in the index is missing.
        """
        if (path / INDEX).is_file():
            places = index_of(path, INDEX)
            files = {file: SafetensorsFile(path / file) for file in sorted(set(places.values()))}
            for name, file in places.items():
                if name not in files[file].entries:
                    raise UserError(f"{files[file].path} lacks '{name}', which the index says it holds; copy it again")
            self._files = {name: files[file] for name, file in places.items()}
        else:
            found = [path / SINGLE] if (path / SINGLE).is_file() else sorted(path.glob("*.safetensors"))
            if not found:
                raise UserError(f"{path} holds no .safetensors file; give the folder that has the weights")
            self._files = {}
            for file in map(SafetensorsFile, found):
                for name in file.entries:
                    if name in self._files:
                        raise UserError(
                            f"'{name}' is in {self._files[name].path} and in {file.path}, and {path} has no index; "
                            f"remove the file that is no part of the model"
                        )
                    self._files[name] = file
        self.entries = {name: file.entries[name] for name, file in self._files.items()}

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._files[name].read(name)


def index_of(path: Path, name: str) -> dict[str, str]:
    """Return the file of every tensor, from the index of a folder of weights.

    Raises:
        UserError: the index is damaged, or names a file that is missing or outside the folder.
    """
    places = read_json(path / name).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{path / name} has no 'weight_map' of file names; copy the folder again")
    missing = sorted({f for f in places.values() if f != Path(f).name or not (path / f).is_file()})
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}, which its index names; copy the folder again")
    return places


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: the file cannot be read, or does not contain an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object")
    return values


def write(folder: Path, stream: Stream, *, max_shard_bytes: int) -> None:
    """Write everything that ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` needs.

    Args:
        folder: temporary folder that becomes the target.
        stream: the tensors; moments are left out.
        max_shard_bytes: maximum size of a weight file; a larger tensor gets a separate file.

    Raises:
        UserError: the model has layers of other mixers than the exported code.
    """
    others = sorted(set(stream.source.model_config.pattern) - set(LETTERS))
    if others:
        raise UserError(
            f"the exported code has no mixers of the layers {', '.join(others)}, only of {', '.join(LETTERS)}; convert "
            f"to safetensors"
        )
    names = [name for name in stream.source.entries if name.startswith("model.")]
    shards = plan_shards({name: stream.entry(name) for name in names}, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        entries = {exported_name(name): stream.entry(name) for name in shard}
        write_safetensors(folder / file, entries, lambda name: stream.read(training_name(name)), {"format": "pt"})
        weight_map.update(dict.fromkeys(entries, file))
    if len(shards) > 1:
        total = sum(stream.entry(name).nbytes for name in names)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    model = stream.source.model_config.model_dump(mode="json")
    tokenizer, unused = write_tokenizer(folder, stream.source.files, model["vocab_size"])
    dtype = str(stream.entry("model.embed.weight").dtype).removeprefix("torch.")
    write_json(
        folder / CONFIG,
        {
            "architectures": ["FusionTreeForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_fusiontree.FusionTreeConfig",
                "AutoModel": "modeling_fusiontree.FusionTreeModel",
                "AutoModelForCausalLM": "modeling_fusiontree.FusionTreeForCausalLM",
            },
            "model_type": "fusiontree",
            "dtype": dtype,
            **{name: value for name, value in model.items() if name not in _LEFT_OUT},
            **tokenizer,
        },
    )
    write_json(folder / "generation_config.json", tokenizer | ({"suppress_tokens": unused} if unused else {}))
    for name in CODE:
        shutil.copyfile(Path(hf_model.__file__).parent / name, folder / name)


def plan_shards(entries: dict[str, Entry], max_bytes: int) -> list[list[str]]:
    """Return the names of the tensors in each file, in order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += entry.nbytes
    return shards


def write_tokenizer(folder: Path, files: list[Path], vocab_size: int) -> tuple[dict[str, int], list[int]]:
    """Write the tokenizer in transformers' format, such that texts get the tokens that they had in training.

    Args:
        folder: to write to.
        files: of the training checkpoint.
        vocab_size: of the model.

    Returns:
        The token ids for the model's configuration, and the model's ids that stand for no token.
    """
    by_name = {file.name: file for file in files}
    if TOKENIZER_FILES[0] not in by_name:
        return {}, []
    info = read_json(by_name[TOKENIZER_FILES[0]])
    if info["kind"] == "byte":
        eos = "<|endoftext|>"
        backend = _byte_tokenizer(eos, info["eos_id"])
        backend.save(str(folder / "tokenizer.json"))
        shutil.copyfile(by_name[TOKENIZER_FILES[0]], folder / TOKENIZER_FILES[0])
    else:
        from tokenizers import Tokenizer as Backend

        content = by_name[TOKENIZER_FILES[1]].read_bytes()
        exported = as_trained(content)
        (folder / "tokenizer.json").write_bytes(exported)
        kept = folder if exported == content else folder / TRAINING_TOKENIZER
        kept.mkdir(exist_ok=True)
        for file in files:
            shutil.copyfile(file, kept / file.name)
        backend = Backend.from_file(str(folder / "tokenizer.json"))
        eos = backend.id_to_token(info["eos_id"]) or ""
    known = set(backend.get_vocab().values())
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": eos,
            "pad_token": eos,
            "padding_side": "left",  # a text can only be continued at the end of its row
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # the name of a special token in a text is text, as in training
        },
    )
    ids = {"eos_token_id": info["eos_id"], "pad_token_id": info["eos_id"]}
    return ids, [token for token in range(vocab_size) if token not in known]


def as_trained(content: bytes) -> bytes:
    """Return a tokenizer.json without what training does not apply: truncation, padding and added tokens."""
    values = json.loads(content)
    wanted = {**values, "truncation": None, "padding": None}
    if _adds_tokens(values.get("post_processor")):
        wanted["post_processor"] = None
    return content if wanted == values else json.dumps(wanted, ensure_ascii=False).encode()


def _adds_tokens(processor: dict[str, Any] | None) -> bool:
    if processor is None or processor.get("type") == "ByteLevel":  # ByteLevel changes offsets alone
        return False
    return processor.get("type") != "Sequence" or any(map(_adds_tokens, processor.get("processors", [])))


def _byte_tokenizer(eos: str, eos_id: int) -> Any:
    """Return a tokenizer in which token b is byte b and the last token ends a document."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # The library represents bytes by printable characters: the same character if printable, else 256 and up, in order.
    itself = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocabulary = {chr(byte if byte in itself else next(others)): byte for byte in range(256)}
    assert set(vocabulary) == set(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={**vocabulary, eos: eos_id}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(eos, special=True)])
    return backend
