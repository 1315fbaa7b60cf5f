"""Shuffling documents on the disk: the order is the keys' alone, whatever the buckets and kills."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusiontree.data.build.corpus import Corpus, CorpusOptions, Document, corpus_files
from fusiontree.data.build.progress import BuildProgress
from fusiontree.data.build.shuffle import ShuffledCorpus
from fusiontree.utils.errors import UserError
from fusiontree.utils.hashing import stable_hash


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    folder = tmp_path / "in"
    folder.mkdir()
    number = 0
    for file in range(8):
        with (folder / f"{file}.jsonl").open("w") as lines:
            for _ in range(5 + 9 * file):
                lines.write(json.dumps({"text": f"{number} " * (number % 13)}) + "\n")
                number += 1
    options = CorpusOptions(inputs=[folder])
    return Corpus(corpus_files(options), options)


def fill(shuffled: ShuffledCorpus) -> ShuffledCorpus:
    shuffled.fill(BuildProgress("", 1, lambda line: None))
    return shuffled


@pytest.mark.parametrize("bucket_bytes", [100, 1000, 1 << 20])
def test_the_order_is_that_of_the_keys(corpus: Corpus, tmp_path: Path, bucket_bytes: int) -> None:
    shuffled = fill(ShuffledCorpus(corpus, tmp_path / "s", 7, bucket_bytes=bucket_bytes))
    given = list(corpus)
    order = sorted(range(len(given)), key=lambda number: stable_hash("document", 7, number))
    assert list(shuffled) == [given[number] for number in order]
    assert shuffled.bytes == shuffled.bytes_read > 0
    assert len(list((tmp_path / "s").glob("bucket-*"))) == shuffled.buckets
    assert (shuffled.buckets > 50) == (bucket_bytes == 100)


def test_a_killed_fill_goes_on_behind_the_files_that_are_safe(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(fill(ShuffledCorpus(corpus, tmp_path / "whole", 7, bucket_bytes=500)))
    read: list[str] = []
    original = Corpus.documents_of

    def documents_of(self: Corpus, file: Path) -> Iterator[Document]:
        read.append(file.name)
        for number, document in enumerate(original(self, file)):
            if dying and file.name == "5.jsonl" and number == 20:
                raise KeyboardInterrupt
            yield document

    monkeypatch.setattr(Corpus, "documents_of", documents_of)
    dying = True
    with pytest.raises(KeyboardInterrupt):
        fill(ShuffledCorpus(corpus, tmp_path / "killed", 7, bucket_bytes=500, save_bytes=1000))
    with (tmp_path / "killed" / "bucket-001").open("ab") as file:
        file.write(b"half a document")
    dying = False
    read.clear()
    again = fill(ShuffledCorpus(corpus, tmp_path / "killed", 7, bucket_bytes=500, save_bytes=1000))
    assert list(again) == whole
    assert read in (["5.jsonl", "6.jsonl", "7.jsonl"], ["4.jsonl", "5.jsonl", "6.jsonl", "7.jsonl"])
    read.clear()
    assert list(fill(ShuffledCorpus(corpus, tmp_path / "killed", 7, bucket_bytes=500))) == whole
    assert not read  # a full one is not filled again
    corpus.files[3].write_text('{"text": "changed"}\n')  # unless the corpus changed
    texts = [document.content for document in fill(ShuffledCorpus(corpus, tmp_path / "killed", 7, bucket_bytes=500))]
    assert b"changed" in texts
    assert len(texts) == len(whole) - 31


def test_a_disk_without_room_is_named(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100})())
    with pytest.raises(UserError, match=r"free there; name an --output with more space, or leave out --shuffle"):
        fill(ShuffledCorpus(corpus, tmp_path / "s", 7))
