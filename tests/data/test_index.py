"""Shards: what is written is read back, by us and by webdataset; damage is named."""

from __future__ import annotations

import hashlib
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest

from fusiontree.data.build.verify import verify_dataset, verify_shard
from fusiontree.data.format import ShardDamage, read_dataset
from fusiontree.data.sources.index import open_shard
from fusiontree.utils.errors import UserError
from tests.data.datasets import documents, random_dataset, write


def test_every_token_comes_back(tmp_path: Path) -> None:
    docs = documents(30, seed=1)
    folder = write(tmp_path / "d", [docs])
    info = read_dataset(folder)
    shard = open_shard(folder, info.shards[0])
    whole = np.concatenate(docs)
    positions = np.concatenate([np.arange(len(d)) for d in docs])
    rng = random.Random(0)
    for _ in range(200):
        begin = rng.randrange(len(whole))
        end = rng.randrange(begin + 1, len(whole) + 1)
        span = shard.read(begin, end)
        assert np.array_equal(span.tokens, whole[begin:end])
        assert np.array_equal(span.starts, np.flatnonzero(positions[begin:end] == 0))
    for number in (0, 7, 29):
        assert np.array_equal(shard.read_document(number), docs[number])


def test_webdataset_reads_our_shards(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    docs = [documents(10, seed=1), documents(7, seed=2)]
    folder = write(tmp_path / "d", docs)
    urls = [str(p) for p in sorted(folder.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [s["__key__"] for s in samples] == [f"{i:09d}" for i in range(17)]
    for sample, doc in zip(samples, docs[0] + docs[1], strict=True):
        assert np.array_equal(sample["npy"], doc)
        assert sample["json"] == {"n": len(doc)}


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / name, [documents(10, seed=1)])
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["dataset.json", "shard-000000.index", "shard-000000.tar"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    from dataclasses import replace

    from tests.data.datasets import TOKENIZER

    doc = np.array([70000, 5, 128000])
    folder = write(tmp_path / "d", [[doc]], replace(TOKENIZER, vocab_size=128001))
    info = read_dataset(folder)
    assert info.dtype == "uint32"
    assert np.array_equal(open_shard(folder, info.shards[0]).read_document(0), doc)


def test_unreadable_datasets_are_user_errors(tmp_path: Path) -> None:
    folder = random_dataset(tmp_path / "train")
    with pytest.raises(UserError, match="did you mean 'train'"):
        read_dataset(tmp_path / "trian")
    values = json.loads((folder / "dataset.json").read_text())
    for broken, match in [
        (values | {"version": 9}, "version 9"),
        (values | {"shards": []}, "changed after it was written"),
        (with_shard(values, name="../other/shard-000000.tar"), "not a plain file name"),
        (with_shard(values, name="/etc/passwd"), "not a plain file name"),
        (with_shard(values, index_sha256="../../outside"), "the entry of shard-000000.tar is invalid"),
        (with_shard(values, documents=-1), "the entry of shard-000000.tar is invalid"),
        (
            values | {"tokenizer": values["tokenizer"] | {"file": "../../.profile"}},
            "a tokenizer's file is called tokenizer.json",
        ),
        ({"format": "fusiontree-shards"}, "cannot be read"),
    ]:
        (folder / "dataset.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=match):
            read_dataset(folder)


def with_shard(values: dict, **changes: object) -> dict:
    """A dataset.json whose first shard says something else, with a fingerprint that fits."""
    first = values["shards"][0] | changes
    shards = [first, *values["shards"][1:]]
    content = [values["tokenizer"], values["dtype"], shards]
    fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return values | {"shards": shards, "fingerprint": fingerprint}


def damage(rng: random.Random, folder: Path, tar: Path) -> str:
    """Damage a shard in a random way and say how."""
    data = bytearray(tar.read_bytes())
    kind = rng.choice(["truncate", "flip", "hole", "missing", "swap", "duplicate", "link", "absolute", "dots", "index"])
    if kind == "truncate":
        tar.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "flip":
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        tar.write_bytes(data)
    elif kind == "hole":
        at, size = rng.randrange(len(data)), rng.randrange(1, 3000)
        data[at : at + size] = bytes(len(data[at : at + size]))
        tar.write_bytes(data)
    elif kind == "missing":
        tar.unlink()
    elif kind == "swap":
        other = folder / "shard-000001.tar"
        tar.write_bytes(other.read_bytes())
    elif kind == "index":
        index = tar.with_suffix(".index")
        content = bytearray(index.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        index.write_bytes(content)
    else:
        members = []
        with tarfile.open(tar) as source:
            for member in source:
                members.append((member, source.extractfile(member).read()))
        victim = rng.randrange(len(members))
        member, content = members[victim]
        if kind == "duplicate":
            members.insert(victim, (member, content))
        elif kind == "link":
            link = tarfile.TarInfo(member.name)
            link.type, link.linkname = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]), "/etc/passwd"
            members[victim] = (link, b"")
        else:
            member.name = ("/" if kind == "absolute" else "../../") + member.name
        with tarfile.open(tar, "w", format=tarfile.USTAR_FORMAT) as out:
            import io

            for info, body in members:
                out.addfile(info, io.BytesIO(body))
    return kind


def campaign(tmp_path: Path, count: int, seed: int) -> dict[str, int]:
    """Damage one shard ``count`` times; every time it is reported, or all documents come back right."""
    rng = random.Random(seed)
    docs = [documents(8, seed=1), documents(8, seed=2)]
    folder = write(tmp_path / "d", docs)
    info = read_dataset(folder)
    tar = folder / info.shards[0].name
    originals = {p: p.read_bytes() for p in (tar, tar.with_suffix(".index"))}
    outcomes = {"reported": 0, "harmless": 0}
    for case in range(count):
        kind = damage(rng, folder, tar)
        problems = verify_shard(folder, info.shards[0])
        assert all(info.shards[0].name.split(".")[0] in str(p) for p in problems)
        # What training would read must be right or refused, whatever verification of the tar says.
        try:
            shard = open_shard(folder, info.shards[0])
        except ShardDamage:
            assert problems, (case, kind)
        else:
            for number, doc in enumerate(docs[0]):
                try:
                    tokens = shard.read_document(number)
                except ShardDamage as error:
                    assert error.member == f"{number:09d}"
                    assert problems, (case, kind)
                else:
                    assert np.array_equal(tokens, doc), (case, kind)
            shard.close()
        changed = any(not path.exists() or path.read_bytes() != content for path, content in originals.items())
        assert bool(problems) == changed, (case, kind)
        outcomes["reported" if problems else "harmless"] += 1
        for path, content in originals.items():
            path.write_bytes(content)
    assert not verify_shard(folder, info.shards[0])
    return outcomes


def test_random_damage_is_reported_or_harmless(tmp_path: Path) -> None:
    outcomes = campaign(tmp_path, 150, seed=0)
    assert outcomes["reported"] > 90


@pytest.mark.slow
def test_three_thousand_random_damages(tmp_path: Path) -> None:
    outcomes = campaign(tmp_path, 3000, seed=1)
    print(outcomes)
    assert outcomes["reported"] > 2000


@pytest.mark.parametrize("kind", ["duplicate", "link", "absolute", "dots"])
def test_members_that_other_readers_would_trip_over(tmp_path: Path, kind: str) -> None:
    class Fixed(random.Random):
        def choice(self, seq):  # type: ignore[no-untyped-def]
            return kind if "truncate" in seq else seq[0]

    folder = random_dataset(tmp_path / "d")
    damage(Fixed(0), folder, folder / "shard-000000.tar")
    reports = {info.name: problems for info, problems in verify_dataset(folder)}
    assert reports["shard-000000.tar"]
    assert not any(problems for name, problems in reports.items() if name != "shard-000000.tar")
