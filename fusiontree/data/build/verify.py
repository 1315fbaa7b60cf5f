"""Verifies a dataset: every member of every tar, every hash."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fusiontree.data.format import DatasetInfo, ShardDamage, ShardInfo, read_dataset
from fusiontree.data.sources.index import Shard, open_shard
from fusiontree.utils.hashing import sha256_file


def verify_shard(folder: Path, info: ShardInfo) -> list[ShardDamage]:
    """Return all damage of one shard: to documents as training reads them, and to the tar as tar readers see it."""
    try:
        shard = open_shard(folder, info)
    except ShardDamage as damage:
        return [damage]
    found = [*shard.damages(), *_verify_tar(shard)]
    shard.close()
    if not found and info.sha256 and sha256_file(shard.tar) != info.sha256:
        reason = "has other bytes than were written, outside of tokens and names: in a KEY.json or between members"
        found.append(ShardDamage(shard.tar, None, reason))
    return found


def _verify_tar(shard: Shard) -> list[ShardDamage]:
    expected = (f"{shard.key(d)}{suffix}" for d in range(shard.info.documents) for suffix in (".npy", ".json"))
    found: list[ShardDamage] = []
    seen: set[str] = set()
    try:
        with tarfile.open(shard.tar, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    found.append(ShardDamage(shard.tar, member.name, "is not a regular file; shards hold no others"))
                elif member.name.startswith("/") or ".." in Path(member.name).parts:
                    found.append(ShardDamage(shard.tar, member.name, "has a path that leads out of the shard"))
                elif member.name in seen:
                    found.append(ShardDamage(shard.tar, member.name, "is there twice"))
                elif member.name != (wanted := next(expected, None)):
                    found.append(
                        ShardDamage(shard.tar, member.name, f"stands where {wanted or 'the end of the tar'} should")
                    )
                seen.add(member.name)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        found.append(ShardDamage(shard.tar, None, f"its tar headers are damaged: {error}"))
    missing = next(expected, None)
    if missing is not None and not found:
        # A damaged header ends a tar early without an error; the next expected member tells where.
        found.append(ShardDamage(shard.tar, missing, "is missing: the tar ends before it"))
    return found


def verify_dataset(folder: Path, threads: int = 4) -> Iterator[tuple[ShardInfo, list[ShardDamage]]]:
    """Yield every shard with its damage, in order."""
    info = read_dataset(folder)
    with ThreadPoolExecutor(threads) as pool:
        yield from zip(info.shards, pool.map(lambda shard: verify_shard(folder, shard), info.shards), strict=True)


def document_of_dataset(folder: Path, info: DatasetInfo, number: int) -> tuple[str, list[int]]:
    """Return the name of the shard that holds document ``number``, and the document's tokens.

    Raises:
        IndexError: the dataset has fewer documents.
    """
    first = 0
    for shard_info in info.shards if number >= 0 else ():
        if number < first + shard_info.documents:
            shard = open_shard(folder, shard_info)
            tokens = shard.read_document(number - first).tolist()
            shard.close()
            return shard_info.name, tokens
        first += shard_info.documents
    raise IndexError(f"document {number} of {first}")
