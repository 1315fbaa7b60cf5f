"""Where a step's time and memory go: kernels by component, and memory by kind."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)

# The first pattern found in a kernel's name decides its component.
COMPONENTS = (
    ("communication", ("nccl",)),
    ("attention: flash-attn-4", ("FlashAttention",)),  # all of it where the package is installed
    ("attention: FlexAttention", ("flex_attention",)),  # windows, and packed documents
    ("attention: one triangle a row", ("flash", "fmha", "cudnn", "sdpa", "_merge")),  # global heads
    ("convolution", ("causal_conv",)),
    ("loss", ("logsumexp", "nll_loss")),
    ("copies", ("chunk_cat",)),
    ("scan", ("chunk_", "_bmm", "state_passing", "tilelang_")),  # tilelang: FlashQLA
    ("casts to FP8", ("_casts",)),
    ("matrix products", ("gemm", "nvjet", "cutlass", "xmma", "cublas")),
    ("optimizer", ("adam", "FusedOptimizer", "multi_tensor")),
    ("copies", ("Memcpy", "Memset", "copy_kernel", "split_with_sizes_copy", "CatArray")),
    ("fused elementwise", ("triton_", "_norm_forward", "_norm_backward", "_mix_forward", "_mix_backward", "_rotate")),
    ("fused elementwise", ("_again_and_gradient",)),  # of GELU
    ("elementwise", ("at::native",)),
)

_MEASURED = "the measured step"


def component_of(kernel: str) -> str:
    """Return the component to which a kernel of this name belongs."""
    return next((component for component, marks in COMPONENTS if any(mark in kernel for mark in marks)), "other")


def breakdown(step: Any, together: Any, trace: str | None) -> dict[str, float]:
    """Profile one step; return milliseconds of GPU time by component, of idle time, and of the whole step.

    ``together`` waits for the device and all ranks: profilers start at different moments, and a rank that waits for
    another's would count that as communication.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        together()
        with record_function(_MEASURED):
            step()
        together()
    if trace:
        profiler.export_chrome_trace(trace)
    spans: list[tuple[float, float]] = []
    parts: dict[str, float] = {}
    unknown: dict[str, float] = {}
    events = profiler.events()
    measured = next(e.time_range for e in events if e.name == _MEASURED and e.device_type.name == "CPU")
    for event in events:
        if not measured.start <= event.time_range.start < measured.end:
            continue
        if event.device_type.name != "CUDA" or event.is_user_annotation:
            continue
        begin, end = event.time_range.start, event.time_range.end
        spans.append((begin, end))
        name = event.name
        kind = component_of(name)
        parts[kind] = parts.get(kind, 0.0) + (end - begin) / 1e3
        if kind == "other":
            unknown[name] = unknown.get(name, 0.0) + (end - begin) / 1e3
    for name, spent in sorted(unknown.items(), key=lambda item: -item[1])[:5]:
        log.info("other: %.2f ms %s", spent, name[:90])
    busy, reach = 0.0, float("-inf")
    spans.sort()
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reach)) / 1e3
        reach = max(reach, end)
    whole = (reach - spans[0][0]) / 1e3 if spans else 0.0
    parts["overlapped"] = busy - sum(parts.values())  # negative: kernels that ran beside others
    parts["idle"] = whole - busy
    parts["step"] = whole
    return {name: round(value, 3) for name, value in sorted(parts.items())}


def _local_bytes(tensor: Any) -> int:
    """Bytes of a state tensor that this rank holds."""
    parts = [view for _, view in tensor.pieces] if hasattr(tensor, "pieces") else [tensor]
    local = [part.to_local() if hasattr(part, "to_local") else part for part in parts]
    return sum(part.numel() * part.element_size() for part in local)


def memory_by_kind(state: dict[str, Any], peak_gib: float) -> dict[str, float]:
    """Split the peak into optimizer state, master weights and the rest."""
    gib = {"master weights": 0.0, "optimizer": 0.0}
    for name, tensor in state.items():
        kind = "master weights" if name.startswith("model.") else "optimizer"
        gib[kind] += _local_bytes(tensor) / 2**30
    gib["activations, gradients, 16-bit weights, workspace"] = peak_gib - sum(gib.values())
    return {name: round(value, 2) for name, value in gib.items()}
