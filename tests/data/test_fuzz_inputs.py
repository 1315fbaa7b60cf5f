"""Mutated tokenizers, corpora and descriptions: an error of one line, or nothing changed without a word."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import zstandard

from fusiontree.data.build.corpus import Corpus, CorpusOptions, corpus_files
from fusiontree.data.format import read_dataset
from fusiontree.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer
from fusiontree.utils.errors import UserError
from tests.data.datasets import documents, write
from tests.data.test_tokenizer_files import END, byte_level, companions

VALUES: list[Any] = [None, True, 0, -1, 7, 1 << 40, 0.5, "", "x", "</s>", "<|endoftext|>", [], [[]], {}, {"type": "x"}]
TEXTS = ["plain text", "é漢😀", "a\r\n b\t\tc ", "<|endoftext|></s>", "A" * 40]
runs = pytest.mark.parametrize("cases", [40, pytest.param(1200, marks=pytest.mark.slow)])


def mutate_value(values: Any, draw: random.Random) -> None:
    """Replace, remove, repeat or add a value somewhere in a JSON object."""
    place = values
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        if len(keys) > 50:
            keys = draw.sample(list(keys), 50)
        key = draw.choice(list(keys))
        inner = place[key]
        if isinstance(inner, (dict, list)) and inner and draw.random() < 0.8:
            place = inner
            continue
        change = draw.randrange(4)
        if change == 0:
            del place[key]
        elif change == 1 and isinstance(place, list):
            place.append(inner)
        elif change == 2 and isinstance(place, dict):
            place[str(draw.choice(VALUES))] = inner
        else:
            place[key] = draw.choice(VALUES)
        return


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip, remove, repeat or insert bytes, or cut the end off."""
    begin = draw.randrange(len(content))
    end = min(len(content), begin + draw.choice([1, 1, 2, 9, 100]))
    change = draw.randrange(5)
    if change == 0:
        flipped = bytes(byte ^ draw.choice([1, 4, 32, 128, 255]) for byte in content[begin:end])
        return content[:begin] + flipped + content[end:]
    if change == 1:
        return content[:begin] + content[end:]
    if change == 2:
        return content[:end] + content[begin:]
    if change == 3:
        return content[:begin] + draw.randbytes(end - begin) + content[begin:]
    return content[:begin]


@runs
def test_tokenizers(tmp_path: Path, cases: int) -> None:
    """Of an accepted tokenizer, texts come back from their tokens, or a note or the number of lost tokens says so."""
    draw, accepted = random.Random(1), 0
    base = byte_level(tmp_path / "tokenizer.json", lambda t: t.enable_truncation(9)).read_text()
    beside = {"tokenizer_config": {"eos_token": END, "added_tokens_decoder": {"256": {"content": END}}}}
    beside |= {"generation_config": {"eos_token_id": [256]}, "added_tokens": {END: 256}}
    for _ in range(cases):
        values, files = json.loads(base), json.loads(json.dumps(beside))
        target = draw.choice([values, values, values, files])
        with contextlib.suppress(IndexError):  # a mutation before emptied it
            for _ in range(draw.choice([1, 1, 3])):
                mutate_value(target, draw)
        for name in beside:
            (tmp_path / f"{name}.json").unlink(missing_ok=True)
        companions(tmp_path, **{name: content for name, content in files.items() if name in beside})
        content = json.dumps(values).encode()
        (tmp_path / "tokenizer.json").write_bytes(content if draw.random() < 0.8 else mutate_bytes(content, draw))
        try:
            tokenizer = HuggingFaceTokenizer(tmp_path / "tokenizer.json")
            encoded = tokenizer.encode_utf8([text.encode() for text in TEXTS])
        except UserError as error:
            assert "\n" not in str(error).strip()
            continue
        accepted += 1
        for text, tokens in zip(TEXTS, encoded, strict=True):
            assert tokenizer.eos_id not in tokens
            if tokenizer.decode(tokens.tolist()) != text:
                said = [note for note in tokenizer.notes if "do not give back" in note]
                assert said or tokenizer.count_lost(text.encode(), tokens)
    assert 0.1 * cases < accepted < 0.95 * cases, accepted


PACK: list[Callable[[bytes], bytes]] = [gzip.compress, bz2.compress, lzma.compress, zstandard.compress]


@runs
def test_json_lines(tmp_path: Path, cases: int) -> None:
    """Damage of a compressed file is an error or changes nothing; lines never become plain text."""
    draw = random.Random(2)
    texts = [f"text {i} {'é' * i}" for i in range(30)]
    plain = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    pack_zst = zstandard.ZstdCompressor(write_checksum=True).compress
    for case in range(cases):
        pack = draw.choice([None, *PACK[:3], pack_zst])
        path = tmp_path / draw.choice(["a.jsonl", "a.json", "part-0"] if pack is None else ["a.jsonl", "a.gz"])
        path.write_bytes(mutate_bytes(plain if pack is None else pack(plain), draw))
        options = CorpusOptions([path])
        corpus = Corpus(corpus_files(options), options)
        try:
            found = [document.content.decode() for document in corpus if document.content]
        except UserError:
            continue
        if pack is not None:
            assert found == texts or (not found and not path.stat().st_size), (case, path.name)
        elif path.suffix:
            assert not any('{"text"' in text for text in found) or b'\\"' in path.read_bytes(), case


@runs
def test_descriptions(tmp_path: Path, cases: int) -> None:
    """A mutated dataset.json describes the same dataset or is refused; a tokenizer_info.json gives no traceback."""
    draw = random.Random(3)
    folder = write(tmp_path / "d", [documents(4, 0), documents(5, 1)])
    before, whole = read_dataset(folder), (folder / "dataset.json").read_text()
    for _ in range(cases):
        values = json.loads(whole)
        mutate_value(values, draw)
        content = json.dumps(values).encode()
        (folder / "dataset.json").write_bytes(content if draw.random() < 0.7 else mutate_bytes(content, draw))
        try:
            assert read_dataset(folder).fingerprint == before.fingerprint
        except UserError as error:
            assert "dataset.json" in str(error)
        values = asdict(ByteTokenizer.info)
        mutate_value(values, draw)
        (tmp_path / "tokenizer_info.json").write_text(json.dumps(values))
        with contextlib.suppress(UserError):
            load_tokenizer(tmp_path)
