"""The data order is a property of the run: any world size, any worker count, any restart, the same tokens."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.data.config import DataConfig
from tests.data.batches import SEQ, GlobalBatch, global_batches, open_data
from tests.data.datasets import random_dataset

STEPS = 60  # both sources come to the end of an epoch within it, and every stage of the curriculum
CURRICULUM = [[4, 20], [8, 20]]
WORLD_SIZES = [1, 2, 3, 4, 8]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    base = tmp_path_factory.mktemp("datasets")
    return [random_dataset(base / "a", shards=4, seed=1), random_dataset(base / "b", shards=2, seed=2)]


@pytest.fixture(scope="module")
def mixed(folders: list[Path]) -> dict[str, Any]:
    sources = [{"path": str(folders[0]), "weight": 3.0}, {"path": str(folders[1]), "weight": 1.0}]
    return {"train": sources, "shuffle_shards": 2}


def config_of(values: dict[str, Any], workers: int = 0) -> DataConfig:
    return DataConfig.model_validate({**values, "num_workers": workers})


@pytest.fixture(scope="module")
def reference(mixed: dict[str, Any]) -> list[GlobalBatch]:
    batches, state = global_batches(config_of(mixed), STEPS, curriculum=CURRICULUM)
    assert all(source["epoch"] >= 1 for source in state["sources"])
    assert len({batch.digest for batch in batches}) == STEPS
    assert {batch.seq_len for batch in batches} == {4, 8, 16}
    return batches


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("size", WORLD_SIZES)
def test_any_world_and_workers_give_the_same_batches(
    mixed: dict[str, Any], reference: list[GlobalBatch], size: int, workers: int
) -> None:
    assert global_batches(config_of(mixed, workers), STEPS, size, curriculum=CURRICULUM)[0] == reference


@given(
    stops=st.lists(st.integers(1, STEPS - 1), min_size=1, max_size=4, unique=True),
    sizes=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    workers=st.sampled_from([0, 1, 4]),
    micro=st.integers(1, 7),
)
@settings(max_examples=15, deadline=None)
def test_stops_and_resumes_anywhere(
    mixed: dict[str, Any],
    reference: list[GlobalBatch],
    stops: list[int],
    sizes: list[int],
    workers: int,
    micro: int,
) -> None:
    config = config_of(mixed, workers)
    kind = {"curriculum": CURRICULUM, "micro_batch_size": micro}
    state, batches = None, []
    for part, (begin, end) in enumerate(itertools.pairwise([0, *sorted(stops), STEPS])):
        some, state = global_batches(config, end - begin, sizes[part], state, **kind)
        batches += some
        state = json.loads(json.dumps(state))  # as a checkpoint keeps it
    assert batches == reference


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """A random run: its datasets, order, batches, and how it was interrupted."""
    sources = draw(st.integers(1, 3))
    seq_len = draw(st.sampled_from([8, 12, 24]))
    lengths = [n for n in range(2, seq_len + 1) if seq_len % n == 0]
    return {
        "datasets": [(draw(st.integers(1, 5)), draw(st.integers(0, 99))) for _ in range(sources)],
        "weights": draw(st.lists(st.floats(0.05, 10), min_size=sources, max_size=sources)),
        "shuffle": draw(st.booleans()),
        "shuffle_shards": draw(st.integers(1, 4)),
        "seq_len": seq_len,
        "curriculum": draw(st.lists(st.tuples(st.sampled_from(lengths), st.integers(1, 4)).map(list), max_size=3)),
        "global_batch_size": draw(st.integers(1, 11)),
        "seed": draw(st.integers(0, 2**31)),
        "parts": draw(
            st.lists(
                st.tuples(
                    st.integers(1, 6),  # steps
                    st.integers(1, 9),  # ranks
                    st.sampled_from([0, 1, 4]),  # workers
                    st.integers(1, 5),  # rows of a micro batch
                    st.integers(1, 3),  # steps read ahead
                ),
                min_size=2,
                max_size=4,
            )
        ),
    }


@given(run=runs())
@settings(max_examples=40, deadline=None)
def test_random_runs(run: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as base:
        sources = []
        for index, ((shards, seed), weight) in enumerate(zip(run["datasets"], run["weights"], strict=True)):
            folder = random_dataset(Path(base) / str(index), shards=shards, seed=seed, count=4)
            sources.append({"path": str(folder), "weight": weight})
        values = {"train": sources, "shuffle": run["shuffle"], "shuffle_shards": run["shuffle_shards"]}
        kind = {key: run[key] for key in ("seq_len", "curriculum", "global_batch_size", "seed")}
        steps = sum(part[0] for part in run["parts"])
        whole, last = global_batches(config_of(values), steps, **kind)
        state, pieces = None, []
        for count, size, workers, micro, ahead in run["parts"]:
            config = config_of({**values, "prefetch_steps": ahead}, workers)
            some, state = global_batches(config, count, size, state, micro_batch_size=micro, **kind)
            pieces += some
        assert pieces == whole
        assert state == last
        assert [batch.first for batch in whole] == [0, *itertools.accumulate(b.rows for b in whole[:-1])]


def test_an_epoch_meets_every_row_once_whatever_the_stages(folders: list[Path]) -> None:
    config = DataConfig(train=str(folders[0]), num_workers=0)
    data = open_data(config, curriculum=[[4, 3], [8, 2]], global_batch_size=5)
    total = data.readers[0].rows
    expected = sorted(
        [tuple(part) for part in _pieces(config, total)],
    )
    seen: list[tuple[int, ...]] = []
    for batch, state in data.steps():
        for micro in batch.micro_batches:
            for ids, weight in zip(micro.input_ids_BS.tolist(), micro.row_weight_B.tolist(), strict=True):
                if weight:
                    seen += [tuple(ids[i : i + 4]) for i in range(0, len(ids), 4)]
        if state["sources"][0]["epoch"]:
            break
    extra = state["sources"][0]["row"]  # rows of the second epoch in the last batch
    del seen[len(seen) - extra * SEQ // 4 :]
    assert sorted(seen) == expected


def _pieces(config: DataConfig, total: int) -> list[list[int]]:
    """Every row of the first epoch in pieces of 4 tokens, read without a curriculum or a shuffle."""
    plain = open_data(config.model_copy(update={"shuffle": False}), global_batch_size=1, micro_batch_size=1)
    found = []
    for batch, _ in itertools.islice(plain.steps(), total):
        ids = batch.micro_batches[0].input_ids_BS[0].tolist()
        found += [ids[i : i + 4] for i in range(0, SEQ, 4)]
    return found


def test_another_batch_size_goes_on_with_the_rows_that_are_next(mixed: dict[str, Any]) -> None:
    """Rows are taken in one order; a batch is only how many of them a step takes."""
    config = config_of(mixed)
    _, state = global_batches(config, 5, global_batch_size=6)
    assert (state["row"], state["number"]) == (30, 30)
    resumed = _texts(config, state, 3, global_batch_size=10)
    assert resumed == _texts(config, None, 60, global_batch_size=1)[30:]


def _texts(config: DataConfig, state: Any, steps: int, **kind: Any) -> list[bytes]:
    stream = open_data(config, **{"micro_batch_size": 1, **kind}).steps(state)
    batches = [batch for batch, _ in itertools.islice(stream, steps)]
    return [micro.input_ids_BS.numpy().tobytes() for batch in batches for micro in batch.micro_batches]


def test_mixture_follows_the_weights_and_epochs_are_reported(mixed: dict[str, Any]) -> None:
    data = open_data(config_of(mixed), global_batch_size=8, micro_batch_size=8)
    counts = [0, 0]
    for batch, state in itertools.islice(data.steps(), 50):
        sources = batch.micro_batches[0].sources_B
        assert str(sources.dtype) == "torch.int16"
        for source in sources.tolist():
            counts[source] += 1
        assert batch.epochs == tuple(c / order.total for c, order in zip(counts, data.orders, strict=True))
        for count, order, reported in zip(counts, data.orders, state["sources"], strict=True):
            assert divmod(count, order.total) == (reported["epoch"], reported["row"])
        assert abs(counts[0] - 0.75 * sum(counts)) < 3


def test_the_state_is_small_and_resuming_needs_no_replay(mixed: dict[str, Any]) -> None:
    config = config_of(mixed)
    _, state = global_batches(config, 2)
    far = open_data(config)
    state |= {"step": 10**9, "row": 6 * 10**9, "number": 6 * 10**9}
    batch, after = next(far.steps(state))
    assert len(json.dumps(after)) < 1000
    assert after["step"] == 10**9 + 1
    assert after["sources"][0]["epoch"] > 10**7
    assert batch.micro_batches[0].rows_B.tolist() == [6 * 10**9, 6 * 10**9 + 1]


@pytest.mark.timeout(600)
def test_four_processes_then_three(mixed: dict[str, Any], reference: list[GlobalBatch], tmp_path: Path) -> None:
    """Real ranks: four processes, stopped in the second stage; three go on from what one of them saved."""
    first = run_ranks(mixed, tmp_path, size=4, workers=1, steps=27, state=None)
    state = json.loads((tmp_path / "4-0.json").read_text())["state"]
    second = run_ranks(mixed, tmp_path, size=3, workers=4, steps=STEPS - 27, state=state)
    assert first + second == [(batch.digest, batch.tokens_hash) for batch in reference]


def run_ranks(
    values: dict[str, Any], folder: Path, *, size: int, workers: int, steps: int, state: Any
) -> list[tuple[str, int]]:
    """Run one process per rank and merge what they read."""
    import hashlib

    kind = {"curriculum": CURRICULUM}
    processes = []
    for rank in range(size):
        job = {"config": {**values, "num_workers": workers}, "rank": rank, "size": size, "steps": steps}
        job |= {"state": state, "kind": kind, "output": str(folder / f"{size}-{rank}.json")}
        command = [sys.executable, "-m", "tests.data.rank", json.dumps(job)]
        processes.append(subprocess.Popen(command, cwd=Path(__file__).parent.parent.parent))
    assert [process.wait(280) for process in processes] == [0] * size
    parts = [json.loads((folder / f"{size}-{rank}.json").read_text()) for rank in range(size)]
    assert len({json.dumps(part["state"]) for part in parts}) == 1
    seen = []
    for step in range(steps):
        rows = {int(number): digest for part in parts for number, digest in part["rows"][step].items()}
        digest = hashlib.sha256("".join(rows[number] for number in sorted(rows)).encode()).hexdigest()
        seen.append((digest, sum(part["hashes"][step] for part in parts) & 0xFFFF_FFFF))
    return seen
