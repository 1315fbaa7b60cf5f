"""Global batches put together from the parts of all ranks, as one comparable record a step."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

from fusiontree.data.batch import FILLER, StepBatch
from fusiontree.data.config import DataConfig
from fusiontree.data.loader import TrainingData
from fusiontree.training.config import TrainingConfig

SEQ = 16
DEFAULTS: dict[str, Any] = {
    "seq_len": SEQ,
    "global_batch_size": 6,
    "micro_batch_size": 2,
    "curriculum": None,
    "seed": 3,
    "vocab_size": 264,
}


class GlobalBatch(NamedTuple):
    """The batch of a step, merged over the ranks that read it."""

    digest: str
    """Of every row: number, source, tokens, labels, positions."""
    tokens_hash: int
    seq_len: int
    first: int
    """Number of the first row."""
    rows: int
    epochs: tuple[float, ...]


def open_data(config: DataConfig, rank: int = 0, size: int = 1, **kind: Any) -> TrainingData:
    """The data of one rank."""
    values = DEFAULTS | kind
    vocab_size = values.pop("vocab_size")
    return TrainingData(config, TrainingConfig(max_steps=1, **values), vocab_size, rank, size)


def row_digests(batch: StepBatch) -> dict[int, str]:
    """Hash of every row of one rank's part, by number; checks that fillers are inert."""
    rows = {}
    for micro in batch.micro_batches:
        for i, number in enumerate(micro.rows_B.tolist()):
            if number == FILLER:
                assert micro.row_weight_B[i] == 0
                assert (micro.labels_BS[i] == -100).all()
                continue
            assert number not in rows
            digest = hashlib.sha256(f"{number} {micro.sources_B[i]} {micro.row_weight_B[i]}".encode())
            for tensor in (micro.input_ids_BS, micro.labels_BS, micro.positions_BS):
                assert tensor.shape[1] == batch.seq_len
                digest.update(tensor[i].numpy().tobytes())
            rows[number] = digest.hexdigest()
    return rows


def put_together(parts: list[StepBatch]) -> GlobalBatch:
    """One step's parts of all ranks as one record; checks that they fit."""
    assert len({len(batch.micro_batches) for batch in parts}) == 1
    assert len({micro.input_ids_BS.shape for batch in parts for micro in batch.micro_batches}) == 1
    assert len({(batch.seq_len, batch.epochs) for batch in parts}) == 1
    rows: dict[int, str] = {}
    for part in parts:
        mine = row_digests(part)
        assert not rows.keys() & mine.keys()
        rows |= mine
    numbers = sorted(rows)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    digest = hashlib.sha256("".join(rows[number] for number in numbers).encode()).hexdigest()
    total = sum(batch.tokens_hash for batch in parts) & 0xFFFF_FFFF
    return GlobalBatch(digest, total, parts[0].seq_len, numbers[0], len(numbers), parts[0].epochs)


def global_batches(
    config: DataConfig, steps: int, size: int = 1, state: Any = None, **kind: Any
) -> tuple[list[GlobalBatch], Any]:
    """Train on ``steps`` steps with ``size`` ranks from ``state``; return what each step saw and the last state."""
    streams = [open_data(config, rank, size, **kind).steps(state) for rank in range(size)]
    batches = []
    for _ in range(steps):
        parts = [next(stream) for stream in streams]
        assert len({str(s) for _, s in parts}) == 1
        batches.append(put_together([batch for batch, _ in parts]))
        state = parts[0][1]
    for stream in streams:
        stream.close()
    return batches, state
