"""The index says what ``.metadata`` says; damage in it, and what contradicts the rest of a checkpoint, is refused."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from fusiontree.checkpoint.hashed_file import HashedFile
from fusiontree.checkpoint.index import INDEX, TensorIndex
from fusiontree.checkpoint.load import load_checkpoint
from fusiontree.checkpoint.manifest import CheckpointDamage, FileEntry, read_manifest, write_manifest
from fusiontree.checkpoint.metadata import Chunk, read_metadata
from fusiontree.checkpoint.open_files import OpenFiles
from fusiontree.checkpoint.reader import CheckpointReader
from fusiontree.checkpoint.retention import has_all_files
from fusiontree.checkpoint.rows import Tensors
from fusiontree.checkpoint.tables import Files, write_tables, written_rows
from fusiontree.checkpoint.verify import verify
from fusiontree.checkpoint.write_files import Written
from fusiontree.parallel.global_tensor import GlobalTensor
from tests.helpers import save_checkpoint

TENSORS: Tensors = {
    "empty": ((0, 3), torch.float32),
    "scalar": ((), torch.float64),
    "row": ((500,), torch.bfloat16),
    "matrix": ((300, 7), torch.float32),
    "none": ((4, 0), torch.int64),
    "cube": ((3, 4, 5), torch.float16),
    "last": ((0,), torch.float32),
}


def grid(shape: tuple[int, ...], steps: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a tensor into rectangles of at most ``steps``."""
    places: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for size, step in zip(shape, steps, strict=True):
        places = [
            ((*offset, at), (*held, min(step, size - at)))
            for offset, held in places
            for at in range(0, size, max(1, step))
        ]
    return places


def written(tensors: Tensors) -> list[Written]:
    """Return two files with the rectangles of all tensors, mixed."""
    steps = {"row": (3,), "matrix": (2, 5), "cube": (1, 4, 2), "huge": (1 << 31, 1)}
    chunks: list[list[tuple[str, Chunk]]] = [[], []]
    places = [(name, *place) for name, (shape, _) in tensors.items() for place in grid(shape, steps.get(name, shape))]
    random.Random(4).shuffle(places)
    for number, (name, offset, shape) in enumerate(places):
        file = chunks[number % 2]
        digest = f"{number:064x}"
        file.append((name, Chunk(offset, shape, f"__{number % 2}_0.distcp", 10 * len(file), 10, digest)))
    return [Written(f"__{number}_0.distcp", 10 * len(part), part) for number, part in enumerate(chunks)]


def tables(folder: Path, tensors: Tensors, parts: list[Written], cuts: tuple[int, ...]) -> Files:
    rows = written_rows(parts, tensors)
    rounds = np.split(rows, np.searchsorted(rows["tensor"], cuts))
    return write_tables(folder, tensors, {part.name: part.size for part in parts}, rounds)


@pytest.mark.parametrize("tensors", [TENSORS, {**TENSORS, "huge": (((1 << 33) + 1, 1), torch.int8)}, {}])
@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 3, 5)])
def test_index_and_metadata_say_what_was_written(tmp_path: Path, tensors: Tensors, cuts: tuple[int, ...]) -> None:
    parts = written(tensors)
    entries = tables(tmp_path, tensors, parts, cuts)
    index = TensorIndex(tmp_path, entries, OpenFiles(tmp_path)).tensors
    metadata = read_metadata(tmp_path)
    theirs = FileSystemReader(tmp_path).read_metadata()
    assert list(index) == list(metadata) == list(tensors) == list(theirs.planner_data or {})
    for name, (shape, dtype) in tensors.items():
        expected = sorted((chunk for part in parts for of, chunk in part.chunks if of == name), key=lambda c: c.offset)
        assert list(index[name].chunks) == expected and index[name].pieces == len(expected)
        plain = [Chunk(c.offset, c.shape, c.file, c.start, c.length) for c in expected]
        assert list(metadata[name].chunks) == plain
        assert (index[name].shape, index[name].dtype) == (metadata[name].shape, metadata[name].dtype) == (shape, dtype)
    count = sum(len(part.chunks) for part in parts)
    assert len(theirs.storage_data) == count and (count > 400 or not tensors)


def test_near_is_what_overlaps(tmp_path: Path) -> None:
    entries = tables(tmp_path, TENSORS, written(TENSORS), ())
    matrix = TensorIndex(tmp_path, entries, OpenFiles(tmp_path)).tensors["matrix"]
    rng = random.Random(1)
    for _ in range(100):
        row, column = rng.randrange(300), rng.randrange(7)
        rows, columns = rng.randint(1, 300 - row), rng.randint(1, 7 - column)
        inside = [
            chunk
            for chunk in matrix.chunks
            if chunk.offset[0] < row + rows
            and chunk.offset[0] + chunk.shape[0] > row
            and chunk.offset[1] < column + columns
            and chunk.offset[1] + chunk.shape[1] > column
        ]
        assert list(matrix.near((row, column), (rows, columns))) == inside


def test_a_rank_reads_its_pages_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = tables(tmp_path, TENSORS, written(TENSORS), ())
    index = TensorIndex(tmp_path, entries, OpenFiles(tmp_path))
    pages: list[int] = []
    real = TensorIndex._read_page

    def counting(self: TensorIndex, tensor: object, page: int) -> np.ndarray:
        pages.append(page)
        return real(self, tensor, page)  # type: ignore[arg-type]

    monkeypatch.setattr(TensorIndex, "_read_page", counting)
    matrix = index.tensors["matrix"]
    assert matrix.pieces == 300
    for row in (100, 101):
        assert len(matrix.near((row, 0), (1, 7))) == 2
    assert len(pages) == 1
    assert matrix.near((300, 0), (1, 7)) == [] and len(pages) == 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    whole = torch.arange(400.0).view(200, 2)
    pieces = [((row, 0), whole[row : row + 1]) for row in range(200)]
    tensors = {"w": GlobalTensor((200, 2), pieces, torch.float32), "v": torch.ones(3)}
    return save_checkpoint(tmp_path, 1, tensors, {"config": {}})


def blank() -> dict[str, torch.Tensor]:
    return {"w": torch.zeros(200, 2), "v": torch.zeros(3)}


def resealed(folder: Path, data: bytes, list_length: int) -> None:
    """Write another index with a manifest that fits, as a faulty writer would."""
    (folder / INDEX).unlink()
    out = HashedFile(folder / INDEX)
    out.write(data[:-list_length])
    out.end_part()
    out.write(data[-list_length:])
    entries = read_manifest(folder) | {INDEX: out.finish()}
    out.close()
    write_manifest(folder, {name: entry.to_dict() for name, entry in entries.items()})


def test_every_byte_of_the_index_matters(folder: Path) -> None:
    data = (folder / INDEX).read_bytes()
    load_checkpoint(folder, blank())
    for at in range(0, len(data), 401):
        (folder / INDEX).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(CheckpointDamage, match=INDEX):
            load_checkpoint(folder, blank())
        with pytest.raises(CheckpointDamage, match=INDEX):
            verify(folder)


@pytest.mark.parametrize("kind", ["outside", "file", "negative", "overflow", "count", "type", "json"])
def test_an_index_that_makes_no_sense_is_damage(folder: Path, kind: str) -> None:
    data = bytearray((folder / INDEX).read_bytes())
    length = read_manifest(folder)[INDEX].parts[-1][0]
    row = len(data[:-length]) // 201
    text = data[-length:]
    if kind == "outside":
        struct.pack_into("<I", data, 4, 200)  # the offset of a row of height 1
    elif kind == "overflow":
        struct.pack_into("<I", data, 4, (1 << 32) - 1)
    elif kind == "file":
        struct.pack_into("<I", data, 20, 7)
    elif kind == "negative":
        struct.pack_into("<q", data, 24, -5)
    elif kind == "count":
        text = text.replace(b'"float32", 200', b'"float32", 199')
    elif kind == "type":
        text = text.replace(b'"float32", 200', b'"flaot32", 200')
    else:
        text[8] = ord("x")
    # A page's hash has to fit as well, where the page was changed.
    if data[: 64 * row] != (folder / INDEX).read_bytes()[: 64 * row]:
        digest = hashlib.sha256(bytes(data[: 64 * row])).digest()
        old = hashlib.sha256((folder / INDEX).read_bytes()[: 64 * row]).digest()
        assert text.count(old) == 1
        text = text.replace(old, digest)
    resealed(folder, bytes(data[:-length] + text), length)
    with pytest.raises(CheckpointDamage, match=INDEX):
        load_checkpoint(folder, blank())


def test_an_index_that_is_not_listed_or_names_other_files(folder: Path) -> None:
    entries = {name: entry.to_dict() for name, entry in read_manifest(folder).items()}
    write_manifest(folder, {name: entry for name, entry in entries.items() if name != INDEX})
    for check in (verify, lambda place: load_checkpoint(place, blank())):
        with pytest.raises(CheckpointDamage, match="an index that it does not list"):
            check(folder)
    write_manifest(folder, {name: entry for name, entry in entries.items() if name != "__0_0.distcp"})
    with pytest.raises(CheckpointDamage, match=r"'__0_0\.distcp', which is not in"):
        load_checkpoint(folder, blank())


def test_bytes_of_a_tensor_file_that_no_rectangle_covers_are_damage(folder: Path) -> None:
    with (folder / "__0_0.distcp").open("ab") as file:
        file.write(b"more")
    entries = {name: entry.to_dict() for name, entry in read_manifest(folder).items()}
    entries["__0_0.distcp"]["bytes"] += 4
    write_manifest(folder, entries)
    with pytest.raises(CheckpointDamage, match="are not its"):
        verify(folder)


def test_checkpoints_of_version_2_load(folder: Path) -> None:
    """As former versions wrote them: the hashes of the parts in the manifest, and no index."""
    reader = CheckpointReader(folder)
    parts = sorted((c.start, c.length, c.digest) for t in reader.tensors.values() for c in t.chunks)
    size = reader.files["__0_0.distcp"].size
    entries = {name: entry.to_dict() for name, entry in reader.files.items() if name != INDEX}
    file = FileEntry(size, tuple((length, str(digest)) for _, length, digest in parts), whole=False)
    write_manifest(folder, entries | {"__0_0.distcp": file.to_dict()})
    (folder / INDEX).unlink()
    assert json.loads((folder / "manifest.json").read_text())["version"] == 2
    found = blank()
    load_checkpoint(folder, found)
    assert torch.equal(found["w"], torch.arange(400.0).view(200, 2)) and torch.equal(found["v"], torch.ones(3))
    verify(folder)
    assert has_all_files(folder)
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "__0_0.distcp").write_bytes(data)
    for check in (verify, lambda place: load_checkpoint(place, blank())):
        with pytest.raises(CheckpointDamage, match="differs from the SHA-256"):
            check(folder)
