"""Time limits that know each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusiontree.config.load import load_config
from fusiontree.config.root import Config
from fusiontree.data.sources.remote import Retries
from fusiontree.supervision.limits import limit_notes, time_limits
from tests.config.test_load import BASE


def config(tmp_path: Path, *overrides: str) -> Config:
    (tmp_path / "run.yaml").write_text(BASE)
    return load_config(tmp_path / "run.yaml", overrides)


@pytest.mark.parametrize(
    "path", ["s3://bucket/x", "https://host/x", "'pipe:cat {name}'", "{a: {path: s3://bucket/v}, b: v}"]
)
def test_a_silent_store_is_retried_to_the_end_before_the_watchdog_acts(tmp_path: Path, path: str) -> None:
    """The scene: a store silent for 120 s is retried, and the watchdog ended the job at 110 s."""
    name = "data.validation" if path.startswith("{") else "data.train"
    for more in ([], ["data.fetch_stall_s=120.0"], ["data.fetch_attempts=20", "data.fetch_wait_s=7.0"]):
        given = config(tmp_path, f"{name}={path}", "data.allow_pipe=true", *more)
        data, limits = given.data, time_limits(given)
        silent = data.fetch_attempts * data.fetch_stall_s
        waits = sum(min(60.0, data.fetch_wait_s * 2**n) for n in range(data.fetch_attempts - 1))
        assert data.longest_read_s == pytest.approx(silent + waits)
        assert limits.step_s == pytest.approx(given.supervision.hang_timeout_s + silent + waits)
        assert limits.slow_s >= limits.step_s or limits.slow_s >= 1800 + silent
        assert limits.collective_s > max(
            limits.step_s, limits.slow_s
        )  # the watchdog names the rank, a collective cannot
        assert any("a hang ends the run after" in note for note in limit_notes(given))


def test_local_data_keeps_the_short_limit(tmp_path: Path) -> None:
    limits = time_limits(config(tmp_path))
    assert (limits.step_s, limits.slow_s) == (110.0, 1800.0)
    assert limits.collective_s > 1800.0
    assert limit_notes(config(tmp_path)) == []
    assert time_limits(config(tmp_path, "data.train=file:///x")).step_s == 110.0


def test_no_limit_stays_none(tmp_path: Path) -> None:
    given = config(tmp_path, "supervision.hang_timeout_s=0.0", "data.train=s3://bucket/x")
    assert time_limits(given).step_s == 0.0
    assert time_limits(given).collective_s >= 86_400.0
    given = config(tmp_path, "supervision.slow_timeout_s=7200.0")
    assert time_limits(given).collective_s > 7200.0  # not ended by the library after its own half hour


def test_limits_that_defeat_each_other_are_named(tmp_path: Path) -> None:
    (note,) = limit_notes(config(tmp_path, "data.fetch_attempts=10"))
    assert "retried for up to 243 s" in note
    (note,) = limit_notes(config(tmp_path, "supervision.slow_timeout_s=60.0"))
    assert "slow_timeout_s 60 is less" in note


def test_many_attempts_are_no_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config(tmp_path, "data.fetch_attempts=100000", "data.train=s3://bucket/x")
    assert 1e7 < given.data.longest_read_s < 2e7
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr("fusiontree.data.sources.remote.time.monotonic", lambda: float(next(clock)))
    Retries(100_000, 1.0).wait(99_999)
