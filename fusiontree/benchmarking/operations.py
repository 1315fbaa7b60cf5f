"""Every operation of a block alone, by each backend that runs here, beside the least time it could take.

The least time is the larger of operations over the rate of matrix products and bytes over memory bandwidth: inputs
read once, outputs written once, and the same for the gradients. Shape legend: B rows, S tokens, C channels, H heads,
K key/value heads, D channels of a head, G groups, P channels and N state size of a state space head, V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusiontree.models.config import ModelConfig
from fusiontree.models.flops import visible_keys
from fusiontree.ops.attention import ATTENTION, attention
from fusiontree.ops.conv import CONV, causal_conv1d
from fusiontree.ops.cross_entropy import CROSS_ENTROPY, linear_cross_entropy
from fusiontree.ops.dispatch import Operation
from fusiontree.ops.gate import MIX_AND_SUMS, gate_mix
from fusiontree.ops.gated_delta import GATED_DELTA, gated_delta_rule
from fusiontree.ops.gated_delta.formulas import unit_length
from fusiontree.ops.norm import GATED_NORM, NORM, gated_rms_norm, rms_norm
from fusiontree.ops.ssd import SSD, ssd_scan
from fusiontree.utils.errors import UserError

log = logging.getLogger(__name__)

# Measured FLOP/s of 8192^3 bf16 products, and bytes read and written per second by a large copy.
_RATES = {"H100": (700e12, 3.0e12), "H200": (700e12, 4.2e12)}


class Case(NamedTuple):
    """One operation at one size."""

    name: str
    operation: Operation
    run: Callable[..., Any]
    """Called with the inputs and ``backend=``; returns a tensor or a tuple that begins with one."""
    inputs: list[Tensor]
    flops: float
    """Forward; the backward pass needs twice as many."""


def cases(config: ModelConfig, length: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Yield the operations of a block of ``config`` on one row of ``length`` tokens."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=kind).requires_grad_()

    mamba, heads, inner, hidden = config.mamba, config.mamba_heads, config.d_inner, config.hidden_size
    dt = (torch.rand(1, length, heads, device=device) * 0.1).requires_grad_()
    decay = (-1 - 15 * torch.rand(heads, device=device)).requires_grad_()
    b_and_c = [draw(1, length, mamba.n_groups, mamba.d_state) for _ in range(2)]
    inputs = [draw(1, length, heads, mamba.head_dim), dt, decay, *b_and_c, draw(heads, kind=torch.float32)]
    scan = partial(ssd_scan, chunk_size=mamba.chunk_size)
    yield Case("scan", SSD, scan, inputs, 7.0 * length * inner * mamba.d_state)
    if "gated_delta_net" in (config.mixers or {}):
        yield _gated_delta(config, length, draw)
    channels = inner + 2 * mamba.n_groups * mamba.d_state
    inputs = [draw(1, length, channels), draw(channels, mamba.d_conv), draw(channels)]
    yield Case("convolution", CONV, causal_conv1d, inputs, 2.0 * length * mamba.d_conv * channels)
    width = config.attention_head_dim
    for kind, query_heads, kv_heads, window in (
        ("local", config.local_heads, config.local_kv_heads, config.window_size),
        ("global", config.global_heads, config.global_kv_heads, None),
    ):
        if query_heads:
            inputs = [draw(1, length, count, width) for count in (query_heads, kv_heads, kv_heads)]
            flops = 4.0 * width * query_heads * visible_keys(length, window)
            yield Case(f"attention, {kind} heads", ATTENTION, partial(attention, window=window), inputs, flops)
    row = (1, length, hidden)
    yield Case("norm", NORM, partial(rms_norm, eps=config.norm_eps), [draw(*row), draw(hidden)], 0.0)
    gated = partial(gated_rms_norm, groups=mamba.norm_groups, eps=config.norm_eps)
    inputs = [draw(1, length, inner), draw(1, length, inner), draw(inner)]
    yield Case("gated norm", GATED_NORM, gated, inputs, 0.0)
    yield Case("gate mix", MIX_AND_SUMS, gate_mix, [draw(*row), draw(1, length, 2 * hidden)], 0.0)
    labels_N = torch.randint(config.vocab_size, (length,), device=device)
    inputs = [draw(length, hidden), draw(config.vocab_size, hidden)]
    head = partial(linear_cross_entropy, labels_N=labels_N)
    yield Case("head and loss", CROSS_ENTROPY, head, inputs, 2.0 * length * hidden * config.vocab_size)


def _gated_delta(config: ModelConfig, length: int, draw: Callable[..., Tensor]) -> Case:
    """Return the recurrence of Gated DeltaNet at the sizes of ``model.mixers.gated_delta_net``."""
    sizes = (config.mixers or {})["gated_delta_net"]
    heads = round(sizes.expand * config.hidden_size / sizes.value_dim)
    unit = [unit_length(draw(1, length, heads // sizes.heads_per_key, sizes.key_dim).detach()) for _ in range(2)]
    values = draw(1, length, heads, sizes.value_dim)
    log_decay, beta = (draw(1, length, heads, kind=torch.float32).detach().sigmoid() for _ in range(2))
    inputs = [*(t.requires_grad_() for t in unit), values, *(t.requires_grad_() for t in (-0.1 * log_decay, beta))]
    rule = partial(gated_delta_rule, chunk_size=sizes.chunk_size)
    flops = 7.0 * length * heads * sizes.key_dim * sizes.value_dim
    return Case("gated delta rule", GATED_DELTA, rule, inputs, flops)


def time_operations(
    config: ModelConfig, length: int, dtype: torch.dtype, device: torch.device, repeats: int = 10
) -> list[dict[str, Any]]:
    """Return name, backend, milliseconds forward and backward, and the least milliseconds (None: unknown rates).

    Backends without a kernel for the sizes are left out, and on GPUs the references: at these sizes some need more
    memory than there is.
    """
    found = []
    for case in cases(config, length, dtype, device):
        for name, backend in case.operation.backends.items():
            if backend.unavailable(device) is not None or (device.type == "cuda" and name == "reference"):
                continue
            try:
                forward, backward = _time(case, name, device, repeats)
            except UserError as error:
                log.info("%s: %s", case.name, error)
                continue
            least = _least_ms(case, device)
            found.append(
                {"operation": case.name, "backend": name, "forward_ms": forward, "backward_ms": backward, **least}
            )
    return found


def _time(case: Case, backend: str, device: torch.device, repeats: int) -> tuple[float, float]:
    forward, backward = [], []
    grad = None
    for turn in range(repeats + 3):  # kernels compile and tune in the first turns
        times = [_now(device)]
        out = case.run(*case.inputs, backend=backend)
        out = out[0] if isinstance(out, tuple) else out
        times.append(_now(device))
        grad = torch.randn_like(out) if grad is None else grad
        times.append(_now(device))
        torch.autograd.grad(out, case.inputs, grad)
        times.append(_now(device))
        if turn >= 3:
            forward.append(times[1] - times[0])
            backward.append(times[3] - times[2])
    middle = repeats // 2
    return sorted(forward)[middle] * 1e3, sorted(backward)[middle] * 1e3


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _least_ms(case: Case, device: torch.device) -> dict[str, float | None]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rates = next((rates for key, rates in _RATES.items() if key in name), None)
    if rates is None:
        return {"least_forward_ms": None, "least_backward_ms": None}
    with torch.no_grad():
        auto = case.run(*case.inputs)
    output = (auto[0] if isinstance(auto, tuple) else auto).nbytes
    read = sum(t.nbytes for t in case.inputs)
    flops_per_s, bytes_per_s = rates
    forward = max(case.flops / flops_per_s, (read + output) / bytes_per_s)
    backward = max(2 * case.flops / flops_per_s, (2 * read + output) / bytes_per_s)
    return {"least_forward_ms": forward * 1e3, "least_backward_ms": backward * 1e3}
