"""The corpus tool: inputs, tokenizers, restarts, refusals."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard

from fusiontree.cli.show_dataset import inspect_main
from fusiontree.data.build.corpus import CorpusOptions, corpus_files
from fusiontree.data.build.statistics import bigram_entropy
from fusiontree.data.build.verify import document_of_dataset
from fusiontree.data.format import read_dataset
from fusiontree.data.tokenizers import ByteTokenizer, load_tokenizer, save_tokenizer, tokenizer_of, train_bpe
from fusiontree.utils.errors import UserError
from fusiontree.utils.file_lock import FileLock
from tools.build_shards import main

ROOT = Path(__file__).resolve().parent.parent.parent


def texts_of(folder: Path) -> list[str]:
    info = read_dataset(folder)
    tokenizer = tokenizer_of(info.tokenizer, folder)
    return [tokenizer.decode(document_of_dataset(folder, info, n)[1]) for n in range(info.documents)]


def build(*arguments: object) -> int:
    return main([str(a) for a in arguments] + ["--processes", "1"])


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for i in range(12):
        (folder / ("sub" if i % 3 else ".") / f"{i:02d}.txt").write_text(f"text {i} äöü " * (i + 1))
    (folder / "skip.md").write_text("not wanted")
    (folder / "empty.txt").write_text("")
    return folder


def test_folder_to_shards_and_back(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("--input", texts, "--include", "*.txt", "--output", tmp_path / "d", "--shard-mb", 0.0003) == 0
    assert len(read_dataset(tmp_path / "d").shards) > 2
    assert sorted(texts_of(tmp_path / "d")) == sorted(f"text {i} äöü " * (i + 1) for i in range(12))
    assert sorted(p.suffix for p in (tmp_path / "d").iterdir()).count(".json") == 1  # no leftovers
    capsys.readouterr()
    assert main(["--inspect", str(tmp_path / "d"), "--document", "3"]) == 0
    assert texts_of(tmp_path / "d")[3] in capsys.readouterr().out
    assert main(["--verify", str(tmp_path / "d")]) == 0
    tar = tmp_path / "d" / "shard-000001.tar"
    content = bytearray(tar.read_bytes())
    content[641] ^= 4
    tar.write_bytes(content)
    assert main(["--verify", str(tmp_path / "d")]) == 1
    assert "shard-000001.tar, member" in capsys.readouterr().out


def test_a_damaged_document_is_one_error(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("--input", texts, "--output", tmp_path / "d") == 0
    tar = tmp_path / "d" / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[641] ^= 1  # a token of the first document
    tar.write_bytes(content)
    capsys.readouterr()
    assert inspect_main([str(tmp_path / "d")]) == 2
    assert "error: " in (said := capsys.readouterr().err) and "its tokens differ from their recorded hash" in said


def test_inspect_as_json_holds_the_facts_of_the_table(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "d"
    assert build("--input", texts, "--include", "*.txt", "--output", folder, "--shard-mb", 0.0003) == 0
    capsys.readouterr()
    assert inspect_main([str(folder), "--document", "3", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    info = read_dataset(folder)
    statistics = values["statistics"]
    assert values["dataset"] == str(folder)
    assert (values["documents"], values["tokens"], values["shards"]) == (12, info.tokens, len(info.shards))
    assert values["dtype"] == "uint16"
    tokenizer = values["tokenizer"]
    assert (tokenizer["name"], tokenizer["vocab_size"], tokenizer["eos_id"]) == ("byte", 257, 256)
    assert sum(statistics["length_histogram_log2"]) == 12
    assert statistics["text_bytes"] == sum(len((f"text {i} äöü " * (i + 1)).encode()) for i in range(12))
    shard, tokens = document_of_dataset(folder, info, 3)
    assert values["document"] == {"number": 3, "shard": shard, "tokens": len(tokens), "text": texts_of(folder)[3]}
    assert inspect_main([str(folder)]) == 0
    table = capsys.readouterr().out
    assert f"12 documents, {values['tokens']:,} tokens in {values['shards']} shards (uint16)" in table
    assert f"{statistics['bytes_per_token']:.2f} bytes per token" in table
    assert f"{statistics['bigram_entropy_nats']:.3f} nats" in table
    assert inspect_main([str(folder), "--document", "12", "--json"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "--document 12: the dataset has 12 documents" in shown.err


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst"])
def test_jsonl(tmp_path: Path, suffix: str) -> None:
    lines = "".join(json.dumps({"content": f"line {i}\nmore"}) + "\n" for i in range(9)).encode()
    packed = {"jsonl": lines, "jsonl.gz": gzip.compress(lines), "jsonl.zst": zstandard.compress(lines)}[suffix]
    file = tmp_path / f"in.{suffix}"
    file.write_bytes(packed)
    assert build("--input", file, "--text-key", "content", "--output", tmp_path / "d") == 0
    assert texts_of(tmp_path / "d") == [f"line {i}\nmore" for i in range(9)]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_packed_files_are_read_to_their_end_or_refused(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several members or frames in a file are all read; a cut is named, wherever it is."""
    pack = gzip.compress if suffix == "gz" else zstandard.compress
    parts = [json.dumps({"text": f"{i} {'x' * 50}"}).encode() + b"\n" for i in range(6)]
    packed = [pack(b"".join(parts[i : i + 2])) for i in (0, 2, 4)]
    file = tmp_path / f"in.jsonl.{suffix}"
    file.write_bytes(b"".join(packed))
    assert build("--input", file, "--output", tmp_path / "d") == 0
    assert len(texts_of(tmp_path / "d")) == 6
    for cut in (1, 5, len(packed[2]) - 3):
        file.write_bytes(b"".join(packed)[:-cut])
        assert build("--input", file, "--output", tmp_path / "cut") == 2
        assert f"in.jsonl.{suffix}, after line" in capsys.readouterr().err
    damaged = bytearray(b"".join(packed))
    damaged[len(packed[0]) + len(packed[1]) // 2] ^= 0x55
    file.write_bytes(damaged)
    assert build("--input", file, "--output", tmp_path / "damaged") == 2
    assert f"in.jsonl.{suffix}" in capsys.readouterr().err


def test_what_is_no_text_stays_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Binary files of a folder, even if a pattern selects them, and the output where it lies inside the input."""
    (tmp_path / "module.pyc").write_bytes(b"\x00\x01 not text")
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))
    assert build("--input", tmp_path, "--output", tmp_path / "d") == 0
    said = capsys.readouterr().out
    assert "1 files are no text and were left out" in said and "module.pyc first: a NUL byte" in said
    assert "1 documents had bytes that are not UTF-8" in said
    assert texts_of(tmp_path / "d") == ["gr\ufffd\ufffder"]
    assert build("--input", tmp_path, "--include", "*.pyc", "--output", tmp_path / "e", "--exclude", "d") == 2
    assert "hold no text" in capsys.readouterr().err
    assert build("--input", tmp_path / "module.pyc", "--output", tmp_path / "f") == 2
    assert "module.pyc' is no text: a NUL byte" in capsys.readouterr().err


def test_an_index_is_left_out_only_beside_its_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "words.idx").write_text("an index of words")
    (tmp_path / "in" / "lonely.idx").write_bytes(b"MMIDIDX\0\0" + bytes(40))
    assert build("--input", tmp_path / "in", "--output", tmp_path / "d") == 0
    assert texts_of(tmp_path / "d") == ["an index of words"]
    assert "lonely.idx first: the index of a Megatron corpus (name its .bin)" in capsys.readouterr().out
    assert build("--input", tmp_path / "in" / "lonely.idx", "--output", tmp_path / "e") == 2
    assert "lonely.idx' is no text: the index of a Megatron corpus (name its .bin)" in capsys.readouterr().err
    (tmp_path / "in" / "words.bin").write_bytes(bytes(8))
    corpus = CorpusOptions([tmp_path / "in"])
    assert [file.name for file in corpus_files(corpus)] == ["lonely.idx", "words.bin"]


def test_a_broken_json_line_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "good"}\n{"txt": "no"}\n')
    assert build("--input", file, "--output", tmp_path / "d") == 2
    message = capsys.readouterr().err
    assert "in.jsonl, line 2" in message
    assert "did you mean 'txt'" in message


def test_the_split_follows_the_text_alone(texts: Path, tmp_path: Path) -> None:
    for name, options in (("a", []), ("b", ["--shuffle", "--seed", 0, "--shard-mb", 0.0002])):
        assert build("--input", texts, "--output", tmp_path / name, "--validation-fraction", 0.3, *options) == 0
    for split in ("train", "validation"):
        assert set(texts_of(tmp_path / "a" / split)) == set(texts_of(tmp_path / "b" / split))
    assert not set(texts_of(tmp_path / "a" / "train")) & set(texts_of(tmp_path / "a" / "validation"))


def test_duplicates_are_removed_once(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"text": f"t{i % 4}"}) + "\n" for i in range(10)))
    assert build("--input", file, "--output", tmp_path / "d", "--remove-duplicates") == 0
    assert texts_of(tmp_path / "d") == ["t0", "t1", "t2", "t3"]
    assert read_dataset(tmp_path / "d").statistics["duplicates_removed"] == 6


def test_bpe_is_trained_saved_and_loaded(texts: Path, tmp_path: Path) -> None:
    assert build("--input", texts, "--include", "*.txt", "--output", tmp_path / "d", "--tokenizer", "bpe:300") == 0
    info = read_dataset(tmp_path / "d")
    assert info.tokenizer.vocab_size <= 300
    assert info.statistics["bytes_per_token"] > 2
    assert sorted(texts_of(tmp_path / "d"))[0] == "text 0 äöü "
    again = tmp_path / "again"
    assert build("--input", texts, "--output", again, "--tokenizer", tmp_path / "d" / "tokenizer.json") == 0
    assert read_dataset(again).tokenizer.sha256 == info.tokenizer.sha256
    run = tmp_path / "run"
    run.mkdir()
    save_tokenizer(info.tokenizer, tmp_path / "d", run)
    tokenizer = load_tokenizer(run)
    assert tokenizer.decode(tokenizer.encode("text äöü!")) == "text äöü!"
    (run / "tokenizer.json").write_text((run / "tokenizer.json").read_text() + " ")
    with pytest.raises(UserError, match="SHA-256 differs"):
        load_tokenizer(run)


def test_bytes_round_trip_and_survive_lone_surrogates() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([*tokenizer.encode("grüße\n"), 256]) == "grüße\n"
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "{texts}x"], "does not exist; did you mean 'texts'"),
        (["--input", "{texts}", "--include", "*.rst"], "no file matching ['*.rst']"),
        (["--input", "{texts}", "--tokenizer", "bite"], "tokenizer 'bite' is no file"),
        (["--input", "{texts}", "--tokenizer", "bpe:many"], "'many' is not a vocabulary size"),
        (["--input", "{texts}", "--tokenizer", "bpe:10"], "at least 257"),
        (["--input", "{texts}/empty.txt"], "hold no text"),
        (["--input", "{texts}", "--validation-fraction", "1.5"], "outside [0, 1)"),
        (["--input", "{texts}", "--tokenizer", "byte", "--eos", "</s>"], "--eos </s> is for a tokenizer.json"),
        (["--input", "{texts}", "--shard-mb", "0"], "--shard-mb 0.0 is no size"),
        (["--input", "{texts}", "--shard-mb", "nan"], "--shard-mb nan is no size"),
        ([], "give --input and --output"),
    ],
)
def test_mistakes_are_named(
    texts: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [a.replace("{texts}", str(texts)) for a in arguments]
    assert build(*filled, *(["--output", tmp_path / "d"] if filled else [])) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "d" / "dataset.json").exists()


def test_an_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        build("--tokeniser", "byte")
    assert ended.value.code == 2
    assert "unknown argument '--tokeniser'; did you mean '--tokenizer'" in capsys.readouterr().err


def test_folders_of_others_are_left_alone(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("--input", texts, "--output", tmp_path / "d") == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()}
    assert build("--input", texts, "--output", tmp_path / "d") == 2
    assert "complete dataset already" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in (tmp_path / "d").iterdir()} == before
    assert build("--input", texts, "--output", texts) == 2
    assert "holds other files" in capsys.readouterr().err


def run(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "tools/build_shards.py", "--output", str(folder), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Processes of its session but itself."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[3]) == process.pid != int(stat.parent.name) and fields[0] != "Z":
                found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("options", [[], ["--shuffle", "--validation-fraction", "0.2"]])
def test_killed_builds_go_on_without_redoing_shards(tmp_path: Path, options: list[str]) -> None:
    rng = np.random.default_rng(0)
    file = tmp_path / "in.jsonl"
    with file.open("w") as lines:
        for _ in range(3000):
            lines.write(json.dumps({"text": rng.integers(97, 122, 1000, dtype=np.uint8).tobytes().decode()}) + "\n")
    arguments = ["--input", str(file), "--shard-mb", "0.1", "--processes", "2", *options]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(whole, *arguments).wait() == 0
    stamps: dict[Path, int] = {}
    for records in (0, 4):
        process = run(killed, *arguments)
        deadline = time.monotonic() + 60
        while not (killed / "build.json").exists() or len(list(killed.rglob("*.record.json"))) < records:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()  # alone; its workers have to notice
        process.wait()
        assert not list(killed.rglob("dataset.json"))
        for tar in killed.rglob("*.tar"):
            if Path(f"{tar}.record.json").exists():
                assert stamps.setdefault(tar, tar.stat().st_mtime_ns) == tar.stat().st_mtime_ns
        while workers_of(process):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert len(stamps) >= 4
    assert run(killed, *arguments).wait() == 0
    assert {tar: tar.stat().st_mtime_ns for tar in stamps} == stamps
    names = {path.relative_to(whole) for path in whole.rglob("*")}
    assert {path.relative_to(killed) for path in killed.rglob("*")} == names  # nothing is left over
    assert all((killed / n).is_dir() or (killed / n).read_bytes() == (whole / n).read_bytes() for n in names)


def _die(job: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_named(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusiontree.data.build.pool.write_shard", _die)
    assert build("--input", texts, "--output", tmp_path / "d") == 2
    assert "a worker process was killed" in capsys.readouterr().err


def test_an_unfinished_build_is_not_mixed_with_another(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither other options, nor another tokenizer under the same name, nor two builds at once."""
    bpe, output = tmp_path / "tokenizer.json", tmp_path / "d"
    train_bpe((f"text {i % 7} " for i in range(50)), 270, bpe)
    (texts / "zz.jsonl").write_text('{"text": "late"}\n{"no": "text"}\n')
    arguments = ["--input", texts, "--output", output, "--tokenizer", bpe, "--shard-mb", 0.0003]
    assert build(*arguments) == 2
    assert "zz.jsonl, line 2" in capsys.readouterr().err
    assert len(list(output.glob("*.record.json"))) > 0
    assert build(*arguments, "--seed", 5) == 2
    assert "unfinished build with other options" in capsys.readouterr().err
    (texts / "zz.jsonl").unlink()
    train_bpe((f"äöü {i % 5} " for i in range(50)), 280, bpe)
    with contextlib.closing(FileLock(output / ".build.lock")) as lock:
        assert lock.acquire()
        assert build(*arguments) == 2
        assert "another process is building" in capsys.readouterr().err
    assert build(*arguments) == 0
    assert sorted(texts_of(output)) == sorted(["not wanted", *(f"text {i} äöü " * (i + 1) for i in range(12))])


def test_a_build_that_made_nothing_yet_gives_way(texts: Path, tmp_path: Path) -> None:
    assert build("--input", texts / "empty.txt", "--output", tmp_path / "d", "--shuffle") == 2
    assert build("--input", texts, "--output", tmp_path / "d", "--shuffle") == 0
    assert len(texts_of(tmp_path / "d")) == 13


def test_shuffled_documents_are_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(200)))
    arguments = ["--input", str(file), "--shard-mb", "0.0003"]
    shuffled = [*arguments, "--shuffle"]
    kinds = {"plain": arguments, "one": shuffled, "three": shuffled, "other": [*shuffled, "--seed", "1"]}
    for name, options in kinds.items():
        assert main([*options, "--output", str(tmp_path / name), "--processes", "3" if name == "three" else "1"]) == 0
    read = {name: texts_of(tmp_path / name) for name in kinds}
    assert read["one"] == read["three"]
    assert len({tuple(texts) for texts in read.values()}) == 3
    assert len({tuple(sorted(texts)) for texts in read.values()}) == 1
    places = [int(text.split()[1]) for text in read["one"]]
    assert abs(np.corrcoef(np.arange(200), places)[0, 1]) < 0.25


def test_bigram_entropy_by_hand() -> None:
    # After 0 comes 0 or 1 equally often, after 1 always 0.
    assert bigram_entropy(np.array([[2, 2], [4, 0]])) == pytest.approx(0.5 * np.log(2))


def test_training_a_bpe_is_deterministic(tmp_path: Path) -> None:
    for name in "ab":
        train_bpe((f"word{i % 7} and word{i % 5}" for i in range(200)), 280, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_megatron_corpus_keeps_its_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    indexed = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="megatron-core is an extra: fusiontree[megatron]"
    )
    import torch

    docs = [[5, 6, 7, 256], [8, 9], [10] * 300]
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "corpus.bin"), dtype=np.uint16)
    for doc in docs:
        builder.add_item(torch.tensor(doc[:2]))
        if doc[2:]:
            builder.add_item(torch.tensor(doc[2:]))
        builder.end_document()
        builder.end_document()  # a document without sequences is left out
    builder.finalize(str(tmp_path / "corpus.idx"))
    assert build("--input", tmp_path / "corpus.bin", "--output", tmp_path / "d") == 0
    info = read_dataset(tmp_path / "d")
    got = [document_of_dataset(tmp_path / "d", info, n)[1] for n in range(info.documents)]
    assert got == [[5, 6, 7, 256], [8, 9, 256], [10] * 300 + [256]]
    bpe = tmp_path / "tokenizer.json"
    train_bpe((f"word{i % 7}" for i in range(50)), 257, bpe)
    (tmp_path / "corpus.idx").rename(tmp_path / "other.idx")
    (tmp_path / "corpus.bin").rename(tmp_path / "other.bin")
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "big.bin"), dtype=np.int32)
    builder.add_item(torch.tensor([1, 70000]))
    builder.end_document()
    builder.finalize(str(tmp_path / "big.idx"))
    assert build("--input", tmp_path / "big.bin", "--tokenizer", bpe, "--output", tmp_path / "e") == 2
    assert "holds token 70000" in capsys.readouterr().err
    (tmp_path / "big.idx").write_bytes(b"not an index")
    assert build("--input", tmp_path / "big.bin", "--output", tmp_path / "f") == 2
    assert "cannot be read as a Megatron corpus" in capsys.readouterr().err
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "real.bin"), dtype=np.float32)
    builder.add_item(torch.tensor([1.5, 2.0]))
    builder.end_document()
    builder.finalize(str(tmp_path / "real.idx"))
    assert build("--input", tmp_path / "real.bin", "--output", tmp_path / "g") == 2
    assert "is a Megatron corpus of float32 values, not of tokens" in capsys.readouterr().err
