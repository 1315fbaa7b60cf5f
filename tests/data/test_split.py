"""The validation split: never empty, known before anything is tokenized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusiontree.data.build.corpus import CorpusOptions, Document
from fusiontree.data.build.dataset import build_dataset
from fusiontree.data.build.options import BuildOptions
from fusiontree.data.build.split import Split, digest_of, plan_split
from fusiontree.data.format import read_dataset
from fusiontree.utils.errors import UserError


def options(fraction: float, **values: Any) -> BuildOptions:
    chosen = {"corpus": CorpusOptions([]), "output": Path("unused"), "tokenizer": "byte", **values}
    return BuildOptions(**chosen, validation_fraction=fraction)


def divide(texts: list[bytes], fraction: float) -> tuple[dict[str, list[bytes]], list[str]]:
    """Return the contents of each split, and the lines that were reported."""
    documents = [Document(text, str(i)) for i, text in enumerate(texts)]
    said: list[str] = []
    split = plan_split(options(fraction), documents, said.append)
    found: dict[str, list[bytes]] = {"train": [], "validation": []}
    for document in documents:
        for name, part in split.parts(document, digest_of(document)):
            found[name].append(part.content)
    return found, said


def test_hashes_alone_decide_where_no_split_is_empty() -> None:
    texts = [b"text %d" % i for i in range(200)]
    found, said = divide(texts, 0.1)
    by_hash = Split(options(0.1))
    assert found["validation"] == [t for t in texts if by_hash.name(digest_of(Document(t, ""))) == "validation"]
    assert 8 < len(found["validation"]) < 35 and not said


def test_a_large_corpus_is_not_read_to_its_end() -> None:
    def endless() -> Any:
        for i in range(10_000):
            assert i < 5_000, "both splits have documents long before"
            yield Document(b"text %d" % i, str(i))

    plan_split(options(0.01), endless(), print)


@pytest.mark.parametrize(
    ("texts", "fraction", "validation"),
    [
        ([b"x" * 10, b"y" * 1000], 1e-6, [b"x" * 10]),  # one whole document
        ([b"a" * 30, b"b" * 40, b"c" * 500], 0.05, [b"a" * 30]),  # that of the size nearest to the fraction
        ([b"ab\n" * 1000], 0.1, [b"ab\n" * 100]),  # the end of a single document, after a line end
        ([b"x" * 1000 + b"\n" + b"z" * 1000], 0.01, [b"z" * 20]),  # unless none is near
        (["é".encode() * 100], 0.255, ["é".encode() * 26]),  # a character stays whole
        ([b"x" * 10] * 3, 0.01, [b"x"] * 3),  # copies of one text are one document
        ([b"x", b"y" * 9, b"y" * 90], 1e-7, [b"x"]),
    ],
)
def test_an_empty_validation_split_gets_a_document_or_an_end(
    texts: list[bytes], fraction: float, validation: list[bytes]
) -> None:
    found, said = divide(texts, fraction)
    assert found["validation"] == validation and found["train"]
    assert len(b"".join(found["train"] + found["validation"])) == len(b"".join(texts))
    assert len(said) == 1 and "no document falls into 'validation' by its hash" in said[0]


def test_an_empty_training_split_gets_a_document() -> None:
    found, said = divide([b"x" * (i + 1) for i in range(10)], 1 - 1e-7)
    assert found["train"] == [b"x"] and len(found["validation"]) == 9
    assert "into 'train'" in said[0]


def test_tokens_are_divided_between_tokens() -> None:
    document = Document(np.arange(100, dtype="<u4").tobytes(), "corpus:0", is_tokens=True)
    split = plan_split(options(0.1), [document], print)
    (_, head), (_, tail) = split.parts(document, digest_of(document))
    assert np.frombuffer(head.content, "<u4").tolist() == list(range(90))
    assert np.frombuffer(tail.content, "<u4").tolist() == list(range(90, 100)) and tail.is_tokens


@pytest.mark.parametrize("texts", [[], [b""], [b"x"], [b"", b"y", b"y"], ["é".encode()]])
def test_too_little_text_is_found_before_anything_is_written(texts: list[bytes], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hold no text|hold too little text"):
        divide(texts, 0.5)
    (tmp_path / "in.txt").write_bytes(b"".join(texts[:1]))
    chosen = options(0.5, corpus=CorpusOptions([tmp_path / "in.txt"]), output=tmp_path / "d")
    with pytest.raises(UserError, match=r"hold no text|hold too little text"):
        build_dataset(chosen, print)
    assert not (tmp_path / "d").exists()


def test_a_single_file_is_built_into_both_splits(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"line\n" * 100)
    chosen = options(0.2, corpus=CorpusOptions([tmp_path / "in.txt"]), output=tmp_path / "d", processes=1)
    build_dataset(chosen, print)
    assert read_dataset(tmp_path / "d" / "train").tokens == 401
    assert read_dataset(tmp_path / "d" / "validation").tokens == 101
