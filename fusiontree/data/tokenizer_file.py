"""Reads a ``tokenizer.json``: what it and the files beside it set is applied, switched off with a note, or refused.

A text becomes the tokens of its own characters: never truncated, padded, or surrounded by special tokens, and a special
token's name that is written in a text is text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusiontree.data.end_of_document import choose_end, companion
from fusiontree.utils.errors import UserError

_PROBES = {
    "capital letters": "A Bcd EF",
    "letters outside ASCII": "é дом",
    "ideographs and emoji": "漢字 😀",
    "characters with compatible forms": "e\u0301 ﬁ ①",
    "line ends": "a\nb\r\nc\n",
    "tabs": "a\tb",
    "runs of spaces": "a  b   c",
    "spaces at the ends": " a ",
    "control characters": "a\x07b\x1bc",
}


@dataclass
class TokenizerFile:
    """A tokenizer of the tokenizers library, ready to encode texts."""

    backend: Any
    eos_id: int
    vocab_size: int
    special: np.ndarray
    """bool by token id: special tokens, which no text may become."""
    unknown_id: int | None
    """Token of text that the vocabulary lacks, or None."""
    literal: Any
    """A tokenizer for texts in which ``backend`` reads a special token: a Unigram model without them. Else None."""
    drops: bool
    """Whether the model leaves out characters that its vocabulary lacks, without a token for them."""
    byte_level: bool = False
    """Whether each character of a token stands for one byte of text (byte-level BPE)."""
    changes_text: bool = False
    """Whether some texts do not come back from their tokens."""
    notes: list[str] = field(default_factory=list)
    """One sentence per setting of the file that was switched off or that changes texts."""


def read_tokenizer(path: Path, eos: str | None = None, eos_id: int | None = None) -> TokenizerFile:
    """Read ``path``.

    Args:
        path: the file.
        eos: name of the end-of-document token.
        eos_id: its id, where a dataset has recorded it; the files beside ``path`` are then not read.

    Raises:
        UserError: the file is no tokenizer or contradicts itself, a file beside it cannot be read, or the
            end-of-document token is missing or not certain.
    """
    try:
        content = path.read_bytes().decode("utf-8")
        values = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"tokenizer '{path}' cannot be read: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise UserError(f"tokenizer '{path}' cannot be read: it is no tokenizer.json of the tokenizers library")
    backend = _load(content, path)
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    _check_ids(values, vocabulary, path)
    notes = _switch_off(backend)
    if eos_id is None:
        eos_id = choose_end(path, values, backend, eos)
        notes += _notes_of_companions(path, values, vocabulary)
    elif eos_id not in vocabulary.values():
        raise UserError(f"tokenizer '{path}' has no token {eos_id}, the recorded end-of-document token")
    if _mark_special(values, backend.id_to_token(eos_id), eos_id):
        backend = _load(json.dumps(values), path)
        _switch_off(backend)
    backend.encode_special_tokens = True  # the name of a special token, written in a text, is text
    literal = None
    if _avoid_special(values):
        literal = _load(json.dumps(values), path)
        _switch_off(literal)
        literal.encode_special_tokens = True
    lost = _lost_text(backend)
    notes += lost
    size = max(vocabulary.values()) + 1  # ids may have gaps
    unknown = _unknown_id(values["model"], vocabulary)
    special = np.zeros(size, bool)
    special[[vocabulary[a["content"]] for a in _added(values) if a.get("special")]] = True
    special[eos_id] = True
    if unknown is not None and unknown != eos_id:
        special[unknown] = False  # counted instead
    drops = unknown is None and _drops_text(values, vocabulary)
    byte_level = not lost and (values.get("decoder") or {}).get("type") == "ByteLevel"
    return TokenizerFile(
        backend, eos_id, size, special, unknown, literal, drops, byte_level, changes_text=bool(lost), notes=notes
    )


def raised_by_library(error: BaseException) -> bool:
    """Return whether the tokenizers library raised ``error``: a plain exception, or a panic of its Rust code."""
    return type(error) is Exception or type(error).__name__ == "PanicException"


def _load(content: str, path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_str(content)
    except BaseException as error:
        if not (isinstance(error, Exception) or raised_by_library(error)):
            raise
        raise UserError(f"tokenizer '{path}' cannot be read: {error}") from error


def _added(values: dict[str, Any]) -> list[dict[str, Any]]:
    return values.get("added_tokens") or []


def _check_ids(values: dict[str, Any], vocabulary: dict[str, int], path: Path) -> None:
    """Refuse ids that the library reads differently from the file, and ids of two tokens."""
    for token in _added(values):
        content, number = token["content"], token["id"]
        if vocabulary.get(content) != number:
            raise UserError(
                f"tokenizer '{path}': added token '{content}' has id {number} in the file, and the tokenizers library "
                f"reads {vocabulary.get(content)}; save the tokenizer again with the program that made it"
            )
    if not vocabulary:
        raise UserError(f"tokenizer '{path}' has an empty vocabulary")
    names: dict[int, str] = {}
    for name, number in vocabulary.items():
        if number in names:
            raise UserError(f"tokenizer '{path}': the tokens '{names[number]}' and '{name}' have the same id {number}")
        names[number] = name


def _switch_off(backend: Any) -> list[str]:
    """Switch off what a text must not depend on; return a note for each such setting."""
    notes = []
    if backend.truncation:
        notes.append(f"truncation to {backend.truncation['max_length']} tokens is switched off: documents stay whole")
        backend.no_truncation()
    if backend.padding:
        notes.append("padding is switched off: documents get no padding tokens")
        backend.no_padding()
    if getattr(backend.model, "dropout", None):
        notes.append(f"dropout {backend.model.dropout:g} of merges is switched off: a text always has the same tokens")
        backend.model.dropout = None
    if backend.post_processor is not None and (count := backend.num_special_tokens_to_add(False)):
        notes.append(
            f"its post-processor adds {count} special token{'s' * (count > 1)} to a text, which documents do not get: "
            "they end with the end-of-document token alone"
        )
    return notes


def _notes_of_companions(path: Path, values: dict[str, Any], vocabulary: dict[str, int]) -> list[str]:
    """Return a note for each setting beside the file that other programs apply when they encode.

    Raises:
        UserError: a file cannot be read, or gives a token another id than the tokenizer.
    """
    notes = []
    place = "tokenizer_config.json"
    config = companion(path, place)
    prepares = _preparation(values)
    ignored = [key for key in ("add_bos_token", "add_eos_token") if config.get(key)]
    space = config.get("add_prefix_space")
    if space is not None and f'"add_prefix_space": {json.dumps(not space)}' in prepares:
        ignored.append("add_prefix_space")
    if config.get("do_lower_case") and "lowercase" not in prepares.lower():
        ignored.append("do_lower_case")
    if ignored:
        notes.append(f"{', '.join(ignored)} of {place} beside it is not applied: tokenizer.json decides")
    missing = []
    for number, token in _listed_tokens(path, config):
        found = vocabulary.get(token)
        if found is None:
            missing.append(token)
        elif found != number:
            raise UserError(
                f"tokenizer '{path}' gives '{token}' id {found}, and the files beside it say {number}; they belong to "
                f"different tokenizers"
            )
    if missing:
        notes.append(
            f"{len(missing)} tokens that files beside it add are not in tokenizer.json and not used ('{missing[0]}')"
        )
    return notes


def _listed_tokens(path: Path, config: dict[str, Any]) -> list[tuple[int, str]]:
    """Return id and name of the tokens that ``tokenizer_config.json`` and ``added_tokens.json`` add."""
    try:
        listed = [(int(n), str(token["content"])) for n, token in (config.get("added_tokens_decoder") or {}).items()]
        return listed + [(int(number), token) for token, number in companion(path, "added_tokens.json").items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"the added tokens in the files beside tokenizer '{path}' cannot be read ({error!r})"
        ) from error


def _preparation(values: dict[str, Any]) -> str:
    """Return the parts of a tokenizer that prepare texts, as JSON."""
    return json.dumps([values.get("normalizer"), values.get("pre_tokenizer")])


def _mark_special(values: dict[str, Any], name: str, eos_id: int) -> bool:
    """Make the end-of-document token special in the definition; return whether it was not."""
    listed = [token for token in _added(values) if token["content"] == name]
    if not listed:
        token = {"id": eos_id, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
        listed = [token | {"normalized": False, "special": False}]
        values["added_tokens"] = sorted([*_added(values), *listed], key=lambda item: int(item["id"]))
    changed = not listed[0].get("special")
    listed[0]["special"] = True
    return changed


def _avoid_special(values: dict[str, Any]) -> bool:
    """Lower the scores of special pieces in a Unigram model's definition; return whether there are any.

    Not in the definition that encodes all other texts: the score of unknown text depends on the lowest score.
    """
    model = values["model"]
    if model.get("type") != "Unigram":
        return False
    special = {token["content"] for token in _added(values) if token.get("special")}
    never = 40 * min(-1.0, min((piece[1] for piece in model["vocab"]), default=0.0))
    found = False
    for number, piece in enumerate(model["vocab"]):
        if piece[0] in special and number != model.get("unk_id"):
            piece[1], found = never, True
    return found


def _unknown_id(model: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    number = model.get("unk_id")
    return number if isinstance(number, int) else vocabulary.get(model.get("unk_token") or "")


def _drops_text(values: dict[str, Any], vocabulary: dict[str, int]) -> bool:
    """Return whether a BPE without an unknown token leaves out characters: bytes and their alphabet are incomplete."""
    from tokenizers import pre_tokenizers

    model = values["model"]
    if model.get("type", "BPE") != "BPE":  # the other models raise
        return False
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)):
        return False
    complete = all(character in vocabulary for character in pre_tokenizers.ByteLevel.alphabet())
    return not (complete and '"ByteLevel"' in _preparation(values))


def _lost_text(backend: Any) -> list[str]:
    """Return a note on the kinds of characters that do not come back from their tokens."""
    lost = []
    for name, text in _PROBES.items():
        try:
            back = backend.decode(backend.encode(text, add_special_tokens=False).ids, skip_special_tokens=True)
        except BaseException as error:  # a model without an unknown token raises
            if not raised_by_library(error):
                raise
            back = None
        if back != text:
            lost.append(name)
    return [f"its tokens do not give back {', '.join(lost)}: training reads changed text"] if lost else []
