"""The tokenizer of an exported Hugging Face folder: texts get the tokens that they had in training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fusiontree.convert.reader import TOKENIZER_FILES
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import write_json

TRAINING_TOKENIZER = "training_tokenizer"
"""Folder with a tokenizer's files as training had them, if transformers would tokenize otherwise by them."""


def tokenizer_files(path: Path) -> list[Path]:
    """Return the files that FusionTree reads a tokenizer from; empty if no file gives the end-of-document token."""
    if (path / TRAINING_TOKENIZER).is_dir():
        path = path / TRAINING_TOKENIZER
    info = path / TOKENIZER_FILES[0]
    if not info.is_file():
        return []
    return [info] if read_json(info).get("file") is None else [info, path / TOKENIZER_FILES[1]]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: the file cannot be read, or does not contain an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object")
    return values


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
            "model_input_names": ["input_ids", "attention_mask"],
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
