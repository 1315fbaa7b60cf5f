"""Formats of corpora: told from content, read to the end, or refused."""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from fusiontree.data.build import readers
from fusiontree.data.build.corpus import Corpus, CorpusOptions, corpus_files
from fusiontree.utils.errors import UserError

PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
}
LINES = "".join(json.dumps({"text": f"text {i}\r\n\u2028x", "n": i}) + "\n" for i in range(5)).encode()
TEXTS = [f"text {i}\r\n\u2028x" for i in range(5)]


def corpus(*inputs: Path, **options: Any) -> Corpus:
    chosen = CorpusOptions(list(inputs), **options)
    return Corpus(corpus_files(chosen), chosen)


def read(*inputs: Path, **options: Any) -> list[str]:
    return [document.content.decode() for document in corpus(*inputs, **options)]


def file(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize("compression", ["", *PACK])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.jl", "part-00000", "a.txt"])
def test_json_lines_under_any_suffix_and_compression(tmp_path: Path, name: str, compression: str) -> None:
    """The name of the compression may be missing or wrong: the content decides."""
    content = PACK[compression](LINES) if compression else LINES
    for suffix in (f".{compression}" if compression else "", "", ".gz"):
        assert read(file(tmp_path, name + suffix, content)) == TEXTS
    assert read(tmp_path) == TEXTS * len(list(tmp_path.iterdir()))


@pytest.mark.parametrize("compression", PACK)
def test_packed_files_of_several_streams_are_read_to_their_end_or_refused(tmp_path: Path, compression: str) -> None:
    pack = PACK[compression]
    parts = [pack(LINES), pack(LINES)]
    whole = b"".join(parts)
    path = file(tmp_path, "a.jsonl", whole)
    assert read(path) == TEXTS * 2
    for cut in (1, 3, len(parts[1]) - 2):
        path.write_bytes(whole[:-cut])
        with pytest.raises(UserError, match=r"a.jsonl, after line \d+: the compressed file is damaged or cut short"):
            read(path)
    for tail in (b"garbage that is no stream", bytes([*whole[:9], 0, 255, 3])):
        path.write_bytes(whole + tail)
        with pytest.raises(UserError, match="damaged or cut short"):
            read(path)
    path.write_bytes(pack(whole))  # packed twice
    assert read(path) == TEXTS * 2


def test_text_that_begins_like_a_compression_is_text(tmp_path: Path) -> None:
    assert read(file(tmp_path, "a.txt", b"BZhello, (\xc2\xb5\n")) == ["BZhello, (µ\n"]


def test_a_damaged_first_line_does_not_make_json_lines_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"part-0, line 1: no text under 'text'"):
        read(file(tmp_path, "part-0", b'{"text": "a\n{"text": "b"}\n'))


def test_padding_after_streams_is_no_damage(tmp_path: Path) -> None:
    for name in ("gz", "xz"):
        assert (
            read(file(tmp_path, f"a.{name}", PACK[name](LINES) + bytes(8) + PACK[name](LINES) + bytes(4))) == TEXTS * 2
        )


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl"])
def test_json_arrays(tmp_path: Path, name: str, indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{"text": f"é {i} ]}}, [\n", "n": [1, {"text": "no"}]} for i in range(50)]
    content = json.dumps(values, indent=indent, ensure_ascii=False).encode()
    path = file(tmp_path, name, gzip.compress(content) if name.endswith("gz") else content)
    for chunk in (1 << 20, 7):  # across many reads too
        monkeypatch.setattr(readers, "_CHUNK", chunk)
        assert read(path) == [value["text"] for value in values]
    assert read(file(tmp_path, "b.json", b'\xef\xbb\xbf ["one", "two"]\n')) == ["one", "two"]
    assert read(file(tmp_path, "c.json", b'[{"text": "a"}, "b" ]')) == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"text": "a"}, {"text": "b"', "damaged or cut short after element 1"),
        (b'[{"text": "a"} {"text": "b"}]', "damaged or cut short after element 0"),
        (b'[{"text": "a"}] [{"text": "b"}]', "text follows the end of its JSON array after element 1"),
        (b'[{"text": "a"}, {"txt": "b"}]', "element 2: no text under 'text'.*did you mean 'txt'"),
        (b'[{"txt": "a"}]', "element 1: no text under 'text'"),
        (b'[{"text": null}]', "element 1: 'text' is NoneType"),
        (b'{"text": "a"}\n{"text": 5}\n', "line 2: 'text' is int"),
        (b'{"text": "a"}\n"b"\n', "line 2: no text"),
        (b'{"txt": "a"}\n', "line 1: no text under 'text'.*--text-key"),
        (b'{\n "text": "a"\n}\n', "neither JSON lines .* nor an array"),
        (b'{"text": "a"}\n{"text": "b', "line 2: no text"),
    ],
)
def test_json_that_is_named_and_has_no_texts_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(file(tmp_path, "a.json", content))


def test_json_in_folders_is_text_unless_it_holds_documents(tmp_path: Path) -> None:
    """A folder of source code: settings and notebooks are texts; lines of objects without the field are a mistake."""
    files = {"package.json": b'{"name": "x"}\n', "pretty.json": b'{\n "text": 1\n}\n', "list.json": b'["a", "b"]'}
    files |= {"links.md": b'[{"link"}](there)', "log.txt": b'{"level": 1}\n{"level": 2}\n', "a.py": b"{}\n"}
    for name, content in files.items():
        file(tmp_path, name, content)
    assert read(tmp_path) == [files[name].decode() for name in sorted(files)]
    file(tmp_path, "z.json", b'{"content": "a"}\n{"content": "b"}\n')
    with pytest.raises(UserError, match=r"z.json, line 1: no text under 'text'.*--exclude"):
        read(tmp_path)
    assert read(tmp_path / "z.json", text_key="content") == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04rest", "a zip archive"),
        (gzip.compress(bytes(257) + b"ustar" + bytes(300)), "a tar archive"),
        (b"%PDF-1.4\n% text", "a PDF file"),
        (b"WARC/1.0\r\n", "a web archive"),
        ("text".encode("utf-16"), "UTF-16 text"),
        (b"ARROW1\0\0", "an Arrow file"),
        (bytes(range(1, 32)) * 4, "control characters"),
        (("漢字" * 400).encode("gbk"), "that are not UTF-8"),
        (gzip.compress(gzip.compress(gzip.compress(b"x"))), "compressed several times"),
    ],
    ids=itertools.count(),
)
def test_what_is_no_text_is_refused_or_left_out(tmp_path: Path, content: bytes, reason: str) -> None:
    path = file(tmp_path, "a.txt", content)
    with pytest.raises(UserError, match=rf"input '.*a.txt' is no text: .*{reason}"):
        read(path)
    file(tmp_path, "b.txt", b"text")
    made = corpus(tmp_path)
    assert [document.content for document in made] == [b"text"]
    assert "1 files are no text and were left out" in made.notes()[0] and reason in made.notes()[0]


def test_text_is_kept_byte_by_byte(tmp_path: Path) -> None:
    content = "\ufeffa\r\nb\rc\u2028d\x85e\x0cf\t \x1b[0m\n\n".encode()
    assert [d.content for d in corpus(file(tmp_path, "a.txt", content))] == [content]
    assert [d.content for d in corpus(file(tmp_path, "b.txt.xz", lzma.compress(content)))] == [content]
    assert read(file(tmp_path, "c.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')) == ["a", "b"]


def test_lines_that_look_like_separators_point_at_the_option(tmp_path: Path) -> None:
    file(tmp_path, "a.txt", b"one <|endoftext|>\n <|endoftext|>\n")
    file(tmp_path, "b.txt", b"one\n<|endoftext|>\ntwo\r\n<|endoftext|>\r\nthree\n</s>")
    made = corpus(tmp_path)
    assert len(list(made)) == 2
    (first, second) = made.notes()
    assert first.startswith("2 lines are '<|endoftext|>' alone") and "b.txt first" in first
    assert "--separator '<|endoftext|>'" in first and "--separator '</s>'" in second
    made = corpus(tmp_path, separator="<|endoftext|>")
    assert len(list(made)) == 4 and not made.notes()


@pytest.mark.parametrize("compression", ["", "zst"])
def test_separator_lines_divide_text_files(tmp_path: Path, compression: str) -> None:
    content = b"one\r\nmore\n<|endoftext|>\ntwo <|endoftext|> still\n<|endoftext|>\r\n<|endoftext|>\nthree"
    path = file(tmp_path, "a.txt", PACK[compression](content) if compression else content)
    made = corpus(path, separator="<|endoftext|>")
    documents = [d for d in made if d.content]
    assert [d.content for d in documents] == [b"one\r\nmore\n", b"two <|endoftext|> still\n", b"three"]
    assert [d.source.rpartition(":")[2] for d in documents] == ["1", "4", "7"]
    assert not made.notes()
    assert [t for t in read(file(tmp_path, "b.txt", b"a\nb\n\nc\n"), separator="") if t] == ["a\nb\n", "c\n"]
    nothing = corpus(path, separator="<eos>")
    assert len(list(nothing)) == 1
    assert "no line of a text file is --separator '<eos>'" in nothing.notes()[0]


def test_documents_beyond_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT", 100)
    long = "x" * 200
    for name, content in {
        "a.txt": long,
        "b.jsonl": json.dumps({"text": "a"}) + "\n" + json.dumps({"text": long}),
        "c.json": json.dumps(["a", long]),
    }.items():
        with pytest.raises(UserError, match=rf"{name}'.*is a document of more than .*--separator"):
            read(file(tmp_path, name, content.encode()))
    with pytest.raises(UserError, match="the document from line 3 on is a document of more"):
        read(file(tmp_path, "d.txt", f"a\n-\n{'y' * 60}\n{'y' * 60}\n".encode()), separator="-")


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    for name in ("in", "in/sub", "real", "real/deep"):
        (tmp_path / name).mkdir()
    file(tmp_path, "in/a.txt", b"a")
    file(tmp_path, "in/sub/s.txt", b"s")
    file(tmp_path, "real/b.txt", b"b")
    file(tmp_path, "real/deep/d.txt", b"d")
    (tmp_path / "in/link").symlink_to(tmp_path / "real")
    (tmp_path / "in/zlink").symlink_to(tmp_path / "real")  # the same folder again
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "real/up").symlink_to(tmp_path / "real")
    (tmp_path / "in/file.txt").symlink_to(tmp_path / "real/deep/d.txt")
    assert read(tmp_path / "in") == ["a", "d", "b", "d", "s"]
    assert [d.source for d in corpus(tmp_path / "in")][2] == str(tmp_path / "in/link/b.txt")


def test_inputs_that_overlap_or_are_no_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = file(tmp_path, "in/a.txt", b"a")
    (tmp_path / "other").symlink_to(tmp_path / "in")
    for inputs in ([tmp_path / "in", path], [path, path], [tmp_path / "in", tmp_path / "other"]):
        with pytest.raises(UserError, match=r"several --input lead to '.*a.txt'"):
            corpus(*inputs)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is neither a file nor a folder"):
        corpus(tmp_path / "pipe")


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is an extra: fusiontree[parquet]")
    from pyarrow import parquet

    table = pyarrow.table({"text": TEXTS * 200, "n": range(1000)})
    path = tmp_path / "shard"  # the content decides, not the name
    parquet.write_table(table, path, row_group_size=300)
    documents = list(corpus(path))
    assert [d.content.decode() for d in documents] == TEXTS * 200
    assert documents[999].source.endswith("shard:1000")
    with pytest.raises(
        UserError, match=r"has no column 'texts'; did you mean 'text'\?; name the column with --text-key"
    ):
        read(path, text_key="texts")
    with pytest.raises(UserError, match="row 1: 'n' is int, not a text"):
        read(path, text_key="n")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="the Parquet file is damaged"):
        read(path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"is a Parquet file, and pyarrow is not installed; pip install 'fusiontree\["):
        read(file(tmp_path, "a", b"PAR1 and more"))
