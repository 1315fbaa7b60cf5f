"""Curves, plot and page of a run, from its record files."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fusiontree.cli.plot_run import main as plot
from fusiontree.report import main as report
from fusiontree.tracking.curves import read_curves, smooth, task_curves

STEPS, LAYERS = 1500, 3


def make_run(folder: Path) -> Path:
    """A run of 1,500 logged steps, one of them not finite, with validations and one resume."""
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        loss = math.nan if step == 700 else 5.0 / math.sqrt(step) + 1
        gates = {"mean": [0.5, 0.5 + step / 5000, 0.5 - step / 10000]}
        lines.append({"step": step, "tokens": step * 100, "loss": loss, "lm_loss": loss, "lr": 1e-3, "gates": gates})
        lines[-1] |= {"tokens_per_s": 1000.0 + step}
        if step % 500 == 0:
            lines.append({"step": step, "validation_loss": loss + 0.1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    events = [
        {"event": "start", "step": 0, "world_size": 2, "time": "t", "unix_time": 0.0},
        {"event": "resume", "step": 900, "world_size": 4, "time": "t", "unix_time": 60.0},
        {"event": "finished", "step": STEPS, "reason": "finished", "time": "t", "unix_time": 99.0},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "config.yaml").write_text("run_dir: </script><b>\nmodel: {mamba: {d_state: 16}, layer_pattern: FMA}\n")
    return folder


def page_data(page: str) -> dict[str, Any]:
    found = re.search(r"^const DATA = (.*)$", page, re.MULTILINE)
    assert found
    return json.loads(found.group(1))


def test_curves_are_thinned_evenly_and_keep_the_end(tmp_path: Path) -> None:
    curves = read_curves(make_run(tmp_path))
    thin = curves.thinned(400)
    assert thin["step_N"] == list(range(STEPS % 4 or 4, STEPS + 1, 4))
    assert thin["step_N"][-1] == STEPS
    assert {len(thin[name]) for name in ("loss_N", "smoothed_N", "lr_N", "tokens_per_s_N", "gate_NL")} == {375}
    assert thin["gate_range"] == pytest.approx(STEPS / 5000)
    assert thin["resumes"] == [900]
    assert all(math.isfinite(value) for value in curves.smoothed_N)


def test_smoothing_does_not_lag() -> None:
    slope = [100.0 - step for step in range(100)]
    assert smooth(slope)[50] == pytest.approx(slope[50], abs=0.5)


def test_plot_writes_a_picture(tmp_path: Path) -> None:
    from matplotlib.image import imread

    assert plot([str(make_run(tmp_path)), "--reference", "bigram", "2.5"]) == 0
    height, width, _ = imread(tmp_path / "loss.png").shape
    assert width > height > 600


def test_plot_without_a_logged_step_is_an_error(tmp_path: Path) -> None:
    assert plot([str(tmp_path)]) == 2


def test_the_page_is_self_contained(tmp_path: Path) -> None:
    assert report([str(make_run(tmp_path))]) == 0
    page = (tmp_path / "report.html").read_text()
    sources: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            sources.extend(value or "" for name, value in attrs if name in ("src", "href"))

    Links().feed(page)
    assert sources == []
    assert "@import" not in page and "url(http" not in page
    assert page.count("</script>") == 1, "data and configuration cannot end the script"
    assert "<td>mamba.d_state</td><td>16</td>" in page
    assert "&lt;/script&gt;&lt;b&gt;" in page
    data = page_data(page)
    assert data["curves"]["validation_step_V"] == [500, 1000, 1500]
    assert [(s["from"], s["ranks"]) for s in data["sessions"]] == [(0.0, 2), (60.0, 4)]
    assert [(i["to"], i["step"]) for i in data["interruptions"]] == [(60.0, 900)]


def test_the_page_of_a_run_without_steps_has_no_curves(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    assert report([str(tmp_path)]) == 0
    assert page_data((tmp_path / "report.html").read_text())["curves"] is None


def test_report_names_the_tokens_of_training_and_of_each_validation_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    assert report([str(run)]) == 0
    assert "validation tokens" not in capsys.readouterr().out, "make_run records none, as earlier versions did"
    sizes = {"validation_loss": 2.0, "validation_tokens": 12_345}
    for step, named, shown in (
        (STEPS, {}, "12,345"),
        (STEPS + 1, {"validation_tokens/web": 12_345, "validation_tokens/books": 678}, "web 12,345, books 678"),
    ):
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "tokens": 150_000} | sizes | named) + "\n")
        assert report([str(run)]) == 0
        text, page = capsys.readouterr().out, (run / "report.html").read_text()
        assert re.search(rf"^  validation tokens +{shown}$", text, re.MULTILINE)
        assert re.search(r"^  training tokens +150,000 seen$", text, re.MULTILINE)
        assert f"<dt>validation tokens</dt><dd>{shown}</dd>" in page
        assert "<dt>training tokens</dt><dd>150,000 seen</dd>" in page


EVALUATIONS: list[dict[str, Any]] = [
    {
        "step": step,
        "evaluation/needle/found": 0.25 * n,
        "evaluation/needle/nats_per_token": 3.0,
        "evaluation/needle/found/depth_0.5": 0.5 * n,
        **({"evaluation/<b>/bits": None} if n == 2 else {}),
        "evaluation_s": 0.5,
        "evaluation_share": 0.001 * n,
    }
    for n, step in ((1, 500), (2, 1000))
]


def test_each_task_has_a_curve_of_its_first_measure_and_of_each_cell() -> None:
    needle, bits = task_curves([{"step": 1, "loss": 2.0}, *EVALUATIONS])
    assert (needle.task, needle.measure, needle.steps) == ("needle", "found", [500, 1000])
    assert needle.values == {"mean": [0.25, 0.5], "depth_0.5": [0.5, 1.0]}
    assert bits.steps == [500, 1000]
    assert all(math.isnan(value) for value in bits.values["mean"])


def test_the_report_has_a_chart_per_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in EVALUATIONS)
    assert report([str(run)]) == 0
    text, page = capsys.readouterr().out, (run / "report.html").read_text()
    assert re.search(r"^  last evaluation +needle found 0\.5, <b> bits nan at step 1000$", text, re.MULTILINE)
    assert re.search(r"^  evaluation cost +0\.15% of the step time$", text, re.MULTILINE)
    assert '<h2>needle <small>found</small></h2><div id="task0"' in page
    assert '<h2>&lt;b&gt; <small>bits</small></h2><div id="task1"' in page
    assert [task["task"] for task in page_data(page)["curves"]["tasks"]] == ["needle", "<b>"]
