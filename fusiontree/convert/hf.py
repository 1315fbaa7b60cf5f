"""Hugging Face folders: sharded safetensors, configuration, tokenizer, and the model's code.

Parameter names are FusionTree's with the prefix ``model.``, except for the head, which is ``lm_head.weight``. A tied
head is not stored: transformers ties it by ``tie_word_embeddings``.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from fusiontree.convert import hf_model
from fusiontree.convert.hf_tokenizer import read_json, tokenizer_files, write_tokenizer
from fusiontree.convert.reader import CheckpointSource, Entry, Stream, checked
from fusiontree.convert.safetensors_file import SafetensorsFile, write_safetensors
from fusiontree.models.config import ModelConfig
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import write_json

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
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
_MIXERS = ("mamba2", "attention", "gated_delta_net")
"""Mixers of the exported code."""


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
            for weights in map(SafetensorsFile, found):
                for name in weights.entries:
                    if name in self._files:
                        raise UserError(
                            f"'{name}' is in {self._files[name].path} and in {weights.path}, and {path} has no index; "
                            f"remove the file that is no part of the model"
                        )
                    self._files[name] = weights
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


def write(folder: Path, stream: Stream, *, max_shard_bytes: int) -> None:
    """Write everything that ``AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`` needs.

    Args:
        folder: temporary folder that becomes the target.
        stream: the tensors; moments are left out.
        max_shard_bytes: maximum size of a weight file; a larger tensor gets a separate file.

    Raises:
        UserError: see :func:`check_mixers`.
    """
    check_mixers(stream.source.model_config)
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
    model = settings(stream.source.model_config)
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
            **model,
            **tokenizer,
        },
    )
    write_json(folder / "generation_config.json", tokenizer | ({"suppress_tokens": unused} if unused else {}))
    for name in CODE:
        shutil.copyfile(Path(hf_model.__file__).parent / name, folder / name)


def settings(config: ModelConfig) -> dict[str, Any]:
    """Return the model's settings in a folder's config.json: all but those of the machine and absent mixers."""
    values = config.model_dump(mode="json")
    left_out = ["kernels", *(name for name in ("letters", "mixers") if values[name] is None)]
    return {name: value for name, value in values.items() if name not in left_out}


def check_mixers(config: ModelConfig) -> None:
    """Check that the exported code has the mixers of all layers.

    Raises:
        UserError: it has not.
    """
    letters = dict(zip(config.pattern, config.branches, strict=True))
    others = sorted(letter for letter, names in letters.items() if not set(names) <= set(_MIXERS))
    if others:
        raise UserError(
            f"the exported code has no mixers of the layers {', '.join(others)}, only {', '.join(_MIXERS)}; convert "
            f"to safetensors"
        )


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
