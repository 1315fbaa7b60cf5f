"""Datasets at URLs and behind commands give the rows of a local folder; what fails on the way is tried again."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fusiontree.data.config import DataConfig, is_remote
from fusiontree.data.sources.remote import CommandFolder, Retries, local_folder
from fusiontree.data.validation import ValidationData
from fusiontree.utils.errors import UserError
from tests.data.batches import SEQ, GlobalBatch, global_batches, open_data
from tests.data.datasets import random_dataset
from tests.data.http_folder import Fault, HttpFolder

STEPS = 45  # into the second epoch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_dataset(tmp_path_factory.mktemp("remote") / "d", shards=5, seed=4)


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[GlobalBatch]:
    return global_batches(config_of(str(folder)), STEPS)[0]


def config_of(path: str, cache: Path | None = None, **values: Any) -> DataConfig:
    given = {"train": path, "num_workers": 0, "shuffle_shards": 2, "fetch_wait_s": 0.0, "fetch_attempts": 4}
    return DataConfig.model_validate(given | ({"cache_dir": str(cache)} if cache else {}) | values)


@pytest.mark.parametrize("workers", [0, 4])
def test_http_gives_the_rows_of_the_folder(
    folder: Path, wanted: list[GlobalBatch], tmp_path: Path, workers: int
) -> None:
    with HttpFolder(folder) as server:
        config = config_of(server.url, tmp_path, num_workers=workers)
        batches, state = global_batches(config, STEPS, size=2)
        assert batches == wanted
        assert state["sources"][0]["epoch"] > 0
        # Two ranks, several epochs: each file came once.
        tars = {name: count for name, count in server.requests.items() if name.endswith((".tar", ".index"))}
        assert tars == {f"shard-00000{n}.{kind}": 1 for n in range(5) for kind in ("tar", "index")}


def test_object_stores_are_reached_through_fsspec(folder: Path, wanted: list[GlobalBatch], tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(str(folder), "/bucket/data", recursive=True)
    assert global_batches(config_of("memory://bucket/data/", tmp_path), STEPS)[0] == wanted


def test_local_urls_are_folders(folder: Path, wanted: list[GlobalBatch]) -> None:
    assert not is_remote(f"file://{folder}") and not is_remote("C-x/y") and is_remote("s3://a") and is_remote("pipe:x")
    assert local_folder(f"file://{folder}") == folder
    assert global_batches(config_of(f"file://{folder}"), STEPS)[0] == wanted


def test_a_checkpoint_does_not_care_where_the_data_is(folder: Path, wanted: list[GlobalBatch], tmp_path: Path) -> None:
    _, state = global_batches(config_of(str(folder)), 10)
    with HttpFolder(folder) as server:
        assert global_batches(config_of(server.url, tmp_path), STEPS - 10, state=state)[0] == wanted[10:]


def first_times(times: int, *kinds: str) -> Fault:
    """The first ``times`` requests of every file go wrong, in each way in turn."""
    return lambda name, before: kinds[before % len(kinds)] if before < times else None


@pytest.mark.parametrize(
    "fault",
    [
        first_times(3, "500", "503", "429"),
        first_times(2, "cut"),
        first_times(1, "short"),
        lambda name, before: "flip" if name.endswith(".tar") and not before else None,
    ],
    ids=["errors", "cut", "short", "flip"],
)
def test_transfers_that_fail_are_repeated(
    folder: Path, wanted: list[GlobalBatch], tmp_path: Path, fault: Fault
) -> None:
    def shards_only(name: str, before: int) -> str | None:
        return None if name == "dataset.json" and fault(name, before) in ("short", "flip") else fault(name, before)

    with HttpFolder(folder, shards_only) as server:
        assert global_batches(config_of(server.url, tmp_path), STEPS)[0] == wanted
        assert max(server.requests.values()) >= 2
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("on_damage", ["stop", "skip"])
def test_a_place_out_of_reach_ends_the_run_and_is_no_damage(folder: Path, tmp_path: Path, on_damage: str) -> None:
    """Skipping what a network withholds would train on other rows than another day."""
    with HttpFolder(folder, lambda name, before: "503" if name == "shard-000002.tar" else None) as server:
        config = config_of(server.url, tmp_path, on_damage=on_damage, prefetch_shards=0)
        with pytest.raises(UserError, match=r"fetching shard-000002.tar of http.* failed 4 times.*503"):
            global_batches(config, STEPS)
        assert server.requests["shard-000002.tar"] == 4
    with pytest.raises(UserError, match=r"fetching dataset.json of http.* failed 4 times.*ConnectorError"):
        open_data(config_of("http://127.0.0.1:1", tmp_path))


def test_refusals_are_not_repeated(folder: Path, tmp_path: Path) -> None:
    with HttpFolder(folder, lambda name, before: "403") as server:
        with pytest.raises(UserError, match="access is refused"):
            open_data(config_of(server.url, tmp_path))
        assert server.requests["dataset.json"] == 1


def test_damage_at_the_place_is_named_as_in_a_folder(tmp_path: Path) -> None:
    from tests.data.test_damage import flip

    folder = random_dataset(tmp_path / "d", shards=3)
    flip(folder)
    (folder / "shard-000002.tar").unlink()
    values = {"on_damage": "skip", "max_skipped_rows": 1000}
    local = [
        (batch.damage, state)
        for (batch, state), _ in zip(open_data(config_of(str(folder), **values)).steps(), range(40), strict=False)
    ]
    with HttpFolder(folder) as server:
        remote = [
            (batch.damage, state)
            for (batch, state), _ in zip(
                open_data(config_of(server.url, tmp_path / "cache", **values)).steps(), range(40), strict=False
            )
        ]
        assert any(damage for damage, _ in local)
        assert [len(damage) for damage, _ in local] == [len(damage) for damage, _ in remote]
        said = " ".join(text for damage, _ in remote for text in damage)
        assert f"{server.url}/shard-000001.tar, member 000000020: its tokens differ" in said
        assert f"{server.url}/shard-000002.tar: is missing" in said
        # What is damaged at its place is not asked for again with every row.
        assert server.requests["shard-000001.tar"] <= 4
        assert server.requests["shard-000002.tar"] == 1


def test_with_one_attempt_nothing_is_said_to_be_fetched_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tests.data.test_damage import flip

    folder = random_dataset(tmp_path / "d", shards=3)
    flip(folder)
    with HttpFolder(folder) as server:
        values = {"on_damage": "skip", "max_skipped_rows": 1000, "fetch_attempts": 1}
        steps = open_data(config_of(server.url, tmp_path / "cache", **values)).steps()
        assert any(batch.damage for (batch, _), _ in zip(steps, range(40), strict=False))
    assert "its tokens differ" in caplog.text and "; fetching it again" not in caplog.text


def test_a_copy_that_rots_in_the_cache_is_fetched_again(
    folder: Path, wanted: list[GlobalBatch], tmp_path: Path
) -> None:
    with HttpFolder(folder) as server:
        config = config_of(server.url, tmp_path, shuffle_shards=2)
        global_batches(config, STEPS)
        for number, tar in enumerate(sorted(tmp_path.glob("*.tar"))):
            data = bytearray(tar.read_bytes())
            if number % 2:
                del data[len(data) // 2 :]
            else:
                data[1000::64] = bytes(255 ^ b for b in data[1000::64])
            tar.write_bytes(data)
        for index in list(tmp_path.glob("*.index"))[:1]:
            index.write_bytes(b"")
        assert global_batches(config, STEPS)[0] == wanted


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Path]:
    """A command's program: copies a file to standard output, badly at first when told so."""
    path = tmp_path / "cat.py"
    path.write_text(
        "import sys, pathlib\n"
        "data = pathlib.Path(sys.argv[1]).read_bytes()\n"
        "count = pathlib.Path(sys.argv[2]) / (pathlib.Path(sys.argv[1]).name + '.count')\n"
        "before = int(count.read_text()) if count.exists() else 0\n"
        "count.write_text(str(before + 1))\n"
        "bad = sys.argv[3] if before == 0 else ''\n"
        "if bad == 'fail': print('no route', file=sys.stderr); sys.exit(3)\n"
        "if bad == 'killed':\n"
        "    sys.stdout.buffer.write(data[:99]); sys.stdout.flush(); import os; os.kill(os.getpid(), 9)\n"
        "if bad == 'short': data = data[:len(data)//2]\n"
        "sys.stdout.buffer.write(data)\n"
    )
    yield path


@pytest.mark.parametrize("bad", ["", "fail", "killed"])
def test_commands_give_the_rows_of_the_folder(
    folder: Path, wanted: list[GlobalBatch], tmp_path: Path, script: Path, bad: str
) -> None:
    counts = tmp_path / "counts"
    counts.mkdir()
    command = f"pipe:{sys.executable} {script} {shlex.quote(str(folder))}/{{name}} {counts} '{bad}'"
    config = config_of(command, tmp_path / "cache", allow_pipe=True)
    assert global_batches(config, 3)[0] == wanted[:3]


def test_commands_run_only_where_allowed(folder: Path) -> None:
    with pytest.raises(ValidationError, match=r"set data.allow_pipe to true"):
        config_of(f"pipe:cat {folder}/{{name}}")
    with pytest.raises(ValidationError, match=r"does not contain \{name\}; write \{name\} where"):
        config_of(f"pipe:cat {folder}", allow_pipe=True)
    with pytest.raises(ValidationError, match=r"set data.allow_pipe to true"):
        DataConfig(train="x", validation="pipe:cat y/{name}")


def test_names_do_not_reach_the_shell(tmp_path: Path) -> None:
    """A dataset.json from elsewhere chooses the names."""
    CommandFolder("pipe:echo {name}").download("a'; touch /tmp/fusiontree-injected; '", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a'; touch /tmp/fusiontree-injected; '\n"
    assert not Path("/tmp/fusiontree-injected").exists()


def test_a_silent_command_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="sent no data for"):
        CommandFolder("pipe:sleep 60; echo {name}", stall_s=0.2).download("x", tmp_path / "out")


def test_what_is_missing_is_said(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HttpFolder(tmp_path) as server, pytest.raises(UserError, match=r"has no dataset.json"):
        open_data(config_of(server.url, tmp_path / "cache"))
    with pytest.raises(UserError, match=r"protocol 'htpp' is unknown; did you mean 'http'"):
        open_data(config_of("htpp://host/data", tmp_path / "cache"))

    import fsspec

    def absent(protocol: str, **options: Any) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    with pytest.raises(UserError, match="pip install s3fs"):
        open_data(config_of("s3://bucket/data", tmp_path / "cache"))


def test_options_reach_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    seen = {}

    def record(protocol: str, **options: Any) -> Any:
        seen.update(options, protocol=protocol)
        raise ImportError

    monkeypatch.setattr(fsspec, "filesystem", record)
    with pytest.raises(UserError):
        open_data(config_of("s3://b/d", tmp_path, storage_options={"anon": True, "endpoint_url": "http://x"}))
    assert seen == {"protocol": "s3", "anon": True, "endpoint_url": "http://x"}


def test_validation_may_be_remote(folder: Path, tmp_path: Path) -> None:
    def rows(path: str) -> list[list[int]]:
        config = DataConfig(train="x", validation=path, cache_dir=str(tmp_path))
        data = ValidationData(config, seq_len=SEQ, micro_batch_size=4, max_rows=0, vocab_size=264)
        return [row for micro in data.micro_batches() for row in micro.input_ids_BS.tolist()]

    with HttpFolder(folder) as server:
        assert rows(server.url) == rows(str(folder))


def test_the_tokenizer_of_a_remote_dataset_is_kept(tmp_path: Path, folder: Path) -> None:
    import hashlib
    from dataclasses import replace

    import numpy as np

    from fusiontree.data.tokenizers import load_tokenizer, train_bpe
    from tests.data.datasets import TOKENIZER, write

    bpe = tmp_path / "tokenizer.json"
    train_bpe(["some words to learn from"], 300, bpe)
    digest = hashlib.sha256(bpe.read_bytes()).hexdigest()
    info = replace(TOKENIZER, kind="huggingface", vocab_size=300, eos_id=0, sha256=digest, file="tokenizer.json")
    made = write(tmp_path / "d", [[np.arange(200)]], info)
    bpe.rename(made / "tokenizer.json")
    with HttpFolder(made) as server:
        data = open_data(config_of(server.url, tmp_path / "cache"), vocab_size=300)
        (tmp_path / "run").mkdir()
        data_files = data.save_tokenizer(tmp_path / "run")
        assert len(data_files) == 2
        tokenizer = load_tokenizer(tmp_path / "run")
        assert tokenizer.decode(tokenizer.encode("some words")) == "some words"
        (made / "tokenizer.json").write_text("{}")
        with pytest.raises(UserError, match="is not the tokenizer that made the dataset"):
            data.save_tokenizer(tmp_path / "run")


def test_waits_grow_and_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    clock = [0.0]

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr("fusiontree.data.sources.remote.time.sleep", sleep)
    monkeypatch.setattr("fusiontree.data.sources.remote.time.monotonic", lambda: clock[0])
    totals = []
    for attempt in range(1, 12):
        slept.clear()
        Retries(99, 1.0).wait(attempt)
        totals.append(sum(slept))
    for attempt, total in enumerate(totals):
        assert min(60, 2**attempt) / 2 - 0.2 <= total <= min(60, 2**attempt) + 0.2
