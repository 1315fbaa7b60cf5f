"""Where a step's time went, by the kernels that a profiler saw."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusiontree.benchmarking.breakdown import breakdown, component_of, memory_by_kind


def event(name: str, start: float, end: float, device: str = "CUDA", annotation: bool = False) -> Any:
    """An event of the profiler; microseconds."""
    return SimpleNamespace(
        name=name,
        device_type=SimpleNamespace(name=device),
        time_range=SimpleNamespace(start=start, end=end),
        is_user_annotation=annotation,
    )


EVENTS = [
    event("the measured step", 1000, 3000, device="CPU"),
    event("the measured step", 1100, 2700, annotation=True),
    event("nvjet_tst_128x256", 200, 900),  # of the step before
    event("ncclDevKernel_ReduceScatter", 1100, 1400),
    event("nvjet_tst_128x256", 1300, 1900),  # beside the exchange for 100
    event("_chunk_scan_fwd_kernel", 1900, 2000),
    event("a kernel nobody knows", 2400, 2700),
    event("aten::mm", 1200, 2900, device="CPU"),
]


def test_parts_add_up_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Profile:
        def __init__(self, **_: Any) -> None:
            pass

        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def events(self) -> list[Any]:
            return EVENTS

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    calls: list[str] = []
    parts = breakdown(lambda: calls.append("step"), lambda: calls.append("wait"), None)
    assert calls == ["wait", "step", "wait"]
    assert parts == {
        "communication": 0.3,
        "matrix products": 0.6,
        "scan": 0.1,
        "other": 0.3,
        "overlapped": -0.1,
        "idle": 0.4,
        "step": 1.6,
    }
    assert sum(parts.values()) - parts["step"] == pytest.approx(parts["step"])


@pytest.mark.parametrize(
    ("kernel", "component"),
    [
        ("_chunk_scan_fwd_kernel", "scan"),
        ("chunk_bwd_kernel_dqkwg", "scan"),
        ("tilelang_prepare_h_kernel_kernel", "scan"),
        ("tilelang_fused_chunk_gdr_bwd_kernel_kernel", "scan"),
        ("_casts", "casts to FP8"),
        ("_casts_by_row", "casts to FP8"),
        ("_again_and_gradient", "fused elementwise"),
        ("_gated_norm_backward", "fused elementwise"),
        ("memcpy128", "other"),
    ],
)
def test_kernels_have_components(kernel: str, component: str) -> None:
    assert component_of(kernel) == component


def test_memory_adds_up_to_the_peak() -> None:
    state = {"model.a": torch.zeros(1 << 26), "optimizer.a": torch.zeros(2 << 26)}
    kinds = memory_by_kind(state, peak_gib=2.0)
    assert (kinds["master weights"], kinds["optimizer"]) == (0.25, 0.5)
    assert sum(kinds.values()) == 2.0
