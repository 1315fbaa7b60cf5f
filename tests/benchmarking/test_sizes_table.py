"""The table of docs/speed.md over sizes and layouts: it agrees with its figures and takes the benchmark's results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
RESULT: dict[str, Any] = {
    "parameters": 165_115_488,
    "seq_len": 8192,
    "rows_per_pass": 4,
    "documents_per_row": 1.0,
    "world_size": 1,
    "engine": "ddp",
    "layout": {"dp": 1, "cp": 1, "tp": 1},
    "device": "NVIDIA H100 80GB HBM3",
    "step_time_s": 0.1,
    "tokens_per_s_per_gpu": 327_680.0,
    "mfu": 0.3925,
    "peak_memory_gib": 21.04,
    "breakdown_ms": {"idle": 3.2, "step": 99.0},
    "others": {"llama": {"tokens_per_s_per_gpu": 218_453.0}},
}


@pytest.fixture(scope="module")
def sizes() -> Any:
    spec = importlib.util.spec_from_file_location("sizes", ROOT / "docs" / "images" / "sizes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table_of_the_figures(sizes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = sizes.PAGE.read_text(encoding="utf-8")
    assert page.count(sizes.BEGIN) == page.count(sizes.END) == 1
    assert sizes.with_table(page, sizes.read()) == page, "run python docs/images/sizes.py"
    rows, written = sizes.read(), sizes.FIGURES.read_text(encoding="utf-8")
    monkeypatch.setattr(sizes, "FIGURES", tmp_path / "again.csv")
    sizes.write(rows)
    assert sizes.FIGURES.read_text(encoding="utf-8") == written


def test_results_are_added_and_replaced(sizes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "PAGE", tmp_path / "speed.md")
    monkeypatch.setattr(sizes, "FIGURES", tmp_path / "sizes.csv")
    sizes.PAGE.write_text(f"before\n{sizes.BEGIN}{sizes.END}after\n")
    sizes.write([])
    two = RESULT | {"world_size": 2, "layout": {"dp": 2, "cp": 1, "tp": 1}, "tokens_per_s_per_gpu": 311_296.0}
    bare = {key: value for key, value in two.items() if key not in ("others", "breakdown_ms", "peak_memory_gib")}
    packed = RESULT | {"documents_per_row": 3.7, "rows_per_pass": 1, "seq_len": 32768}
    files = []
    for number, result in enumerate((RESULT | {"mfu": 0.1}, RESULT, bare, packed)):
        files.append(tmp_path / f"{number}.out")
        files[-1].write_text(f"a table\n{json.dumps(result)}\n")
    sizes.main([str(file) for file in files])
    *_, one, double, long = sizes.PAGE.read_text().removesuffix(f"{sizes.END}after\n").splitlines()
    name = "| 165M | 4 × 8,192 |"
    assert one == (
        f"{name} 1 × H100 80GB HBM3 | one GPU | 100 ms | 327,680 | 39.2% | 3 ms, 3.2% | 21.0 GiB |  | 218,453 | 1.50 |"
    )
    assert double == f"{name} 2 × H100 80GB HBM3 | ddp, dp 2 | 100 ms | 311,296 | 39.2% |  |  | 95.0% |  |  |"
    assert long.startswith("| 165M | 32,768 in 4 documents |")
