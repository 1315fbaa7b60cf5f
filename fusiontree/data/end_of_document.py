"""The end-of-document token of a ``tokenizer.json``: from the files beside it, or from its special tokens.

Never an ordinary token that only has a familiar name: in Gemma's vocabulary ``</s>`` is an HTML tag.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fusiontree.utils.errors import UserError, nearest
from fusiontree.utils.hashing import sha256_file

_ENDS = re.compile(r"/s|eo[sdt]|eo[tm]id|sep|imend|end|endof(text|doc|document|sentence|sequence|turn|message)")
"""Letters of the names that ends of documents and of turns have; only special tokens are compared with them."""


def companion(path: Path, name: str) -> dict[str, Any]:
    """Return the values of the file ``name`` beside ``path``; empty if there is none.

    Raises:
        UserError: it is no JSON object.
    """
    file = path.parent / name
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"'{file}' cannot be read ({error}); correct it, or keep the tokenizer without it") from error
    if not isinstance(values, dict):
        raise UserError(f"'{file}' is no JSON object; correct it, or keep the tokenizer without it")
    return values


def choose_end(path: Path, values: dict[str, Any], backend: Any, eos: str | None) -> int:
    """Return the end-of-document token.

    Args:
        path: of the tokenizer.
        values: its content.
        backend: the same as a tokenizer of the tokenizers library, without truncation and padding.
        eos: the token's name, if the user gave it.

    Raises:
        UserError: the token is not in the vocabulary, or none or several tokens can be meant; the message names them.
    """
    if eos is not None:
        number = backend.token_to_id(eos)
        if number is None:
            raise UserError(f"tokenizer '{path}' has no token '{eos}' (--eos){nearest(eos, backend.get_vocab())}")
        return int(number)
    recorded = _recorded(path, backend)
    if recorded is not None:
        return recorded
    named = _named(path, backend)
    listed = _listed(path, backend)
    if named and listed and not set(named) & set(listed):
        raise _uncertain(path, backend, named | listed)
    found = named or listed or _appended(backend) or _special(values, backend)
    if len(found) > 1:
        raise _uncertain(path, backend, found)
    if not found:
        special = [token["content"] for token in values.get("added_tokens") or [] if token.get("special")]
        raise UserError(
            f"tokenizer '{path}' does not say which token ends a document (special tokens: {special or 'none'}); name "
            "it with --eos TOKEN"
        )
    return next(iter(found))


def _uncertain(path: Path, backend: Any, found: dict[int, str]) -> UserError:
    names = ", ".join(f"'{backend.id_to_token(number)}' ({number}, {origin})" for number, origin in found.items())
    return UserError(f"tokenizer '{path}': several tokens can end a document: {names}; choose one with --eos TOKEN")


def _recorded(path: Path, backend: Any) -> int | None:
    """Return the token that a dataset or run has recorded beside its copy of the tokenizer."""
    own = companion(path, "tokenizer_info.json") or companion(path, "dataset.json").get("tokenizer")
    if not isinstance(own, dict) or own.get("sha256") not in (None, sha256_file(path)):
        return None  # of another tokenizer
    number = own.get("eos_id")
    return number if isinstance(number, int) and backend.id_to_token(number) is not None else None


def _named(path: Path, backend: Any) -> dict[int, str]:
    """Return the ids of ``eos_token`` in the configuration of the tokenizer, with the files' names."""
    found: dict[int, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = companion(path, name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if token is None:
            continue
        number = backend.token_to_id(token) if isinstance(token, str) else None
        if number is None:
            raise UserError(
                f"'{path.parent / name}' names the end-of-document token {token!r}, which tokenizer '{path}' lacks; "
                "name it with --eos TOKEN"
            )
        found.setdefault(int(number), name)
    return found


def _listed(path: Path, backend: Any) -> dict[int, str]:
    """Return the ids of ``eos_token_id`` in the configuration of generation, with the file's name."""
    name = "generation_config.json"
    given = companion(path, name).get("eos_token_id")
    numbers = given if isinstance(given, list) else [] if given is None else [given]
    for number in numbers:
        if type(number) is not int or not 0 <= number < 1 << 31 or backend.id_to_token(number) is None:
            raise UserError(
                f"'{path.parent / name}' names the end-of-document token {number!r}, which tokenizer '{path}' lacks; "
                "name it with --eos TOKEN"
            )
    return dict.fromkeys(numbers, name)


def _appended(backend: Any) -> dict[int, str]:
    """Return the ids of the tokens that the post-processor puts after a text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a").ids
    for begin in range(len(whole) - len(plain) + 1 if plain else 0):
        if whole[begin : begin + len(plain)] == plain:
            return dict.fromkeys(whole[begin + len(plain) :], "the post-processor appends it")
    return {}


def _special(values: dict[str, Any], backend: Any) -> dict[int, str]:
    """Return the ids of the special tokens whose names are those of an end."""
    found = {}
    for token in values.get("added_tokens") or []:
        letters = re.sub("[^a-z/]", "", token["content"].lower())
        if token.get("special") and _ENDS.fullmatch(letters):
            found[int(backend.token_to_id(token["content"]))] = "special token"
    return found
