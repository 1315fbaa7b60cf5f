"""Time of each kernel of a decoding step beside the bytes it must read and write (``pytest -s`` prints the table).

Shape legend: B rows, S tokens.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from fusiontree.benchmarking.decoding import bandwidth, bytes_per_step
from fusiontree.cli.benchmark_decoding import on_gpu, random_model
from fusiontree.config.load import load_config
from fusiontree.models.cuda_graph import GraphedStep
from fusiontree.models.fused_step import prepare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CONTEXT, LAYERS, REPLAYS = 32768, 4, 20


def kernel_times(step: GraphedStep, ids_B1: torch.Tensor) -> tuple[dict[str, list[float]], list[Any], float]:
    """Return microseconds of every launch by kernel and grid, a replay's launches in order, and its microseconds."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(REPLAYS):
        step(ids_B1)
    begin.record()
    for _ in range(REPLAYS):
        step(ids_B1)
    end.record()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            step(ids_B1)
        torch.cuda.synchronize()
    launches = sorted(
        (e for e in profile.events() if "cuda" in str(e.device_type).lower()), key=lambda e: e.time_range.start
    )
    times: dict[str, list[float]] = defaultdict(list)
    last = launches[-len(launches) // 3 :]
    for launch in last:
        times[launch.name].append(launch.time_range.elapsed_us())
    return times, last, 1e3 * begin.elapsed_time(end) / REPLAYS


def test_kernels_of_a_step_and_their_bound(capsys: pytest.CaptureFixture[str]) -> None:
    """A few layers of the reference size: the sum of a step's kernels, and the launches of the layers in order.

    The profiler ends each launch before the next starts in its record only; overlapping times mean early starts.
    """
    overrides = [f"model.num_layers={LAYERS}"]
    config = load_config("configs/bench/hybrid_1b_32k.yaml", overrides).model
    model = on_gpu(random_model(config), "bf16", torch.device("cuda"))
    ids_1S = torch.randint(config.vocab_size, (1, CONTEXT), generator=torch.Generator().manual_seed(0)).cuda()
    with torch.inference_mode():
        columns = CONTEXT + 4 * REPLAYS
        cache = model.new_cache(1, columns)
        for part_1S in ids_1S.split(16384, dim=1):
            model(part_1S, cache=cache, logits_to_keep=1)
        cache.fix(columns)
        plain = cache.rehearsal()
        want = model(ids_1S[:, :1], cache=plain).logits_BSV[:, -1]
        prepare(model)
        step = GraphedStep(model, cache)
        got = step(ids_1S[:, :1]).clone()
        times, launches, micros = kernel_times(step, ids_1S[:, :1])
    rate = bandwidth(ids_1S.device) or float("nan")
    needed = bytes_per_step(model, cache)
    with capsys.disabled():
        print(f"\n{LAYERS} layers: {micros:.1f} us a step, bandwidth allows {1e6 * needed / rate:.1f} us")
        start = launches[0].time_range.start
        for launch in launches:
            span = launch.time_range
            print(f"{span.start - start:9.1f} {span.elapsed_us():7.1f} us  {launch.name[:70]}")
        for (name, each), most in zip(times.items(), map(sum, times.values()), strict=True):
            print(f"{most:9.1f} us in {len(each):3} launches  {name[:70]}")
        for what, matrices in products(model):
            size = sum(matrix.nbytes for matrix in matrices)
            print(f"{what:40} {size / 2**20:7.1f} MiB {1e6 * size / rate:7.1f} us at the memory's bandwidth")
    torch.testing.assert_close(got, want, atol=0.1, rtol=0.1)
    assert sum(sum(each) for each in times.values()) > 0


def products(model: Any) -> list[tuple[str, list[torch.Tensor]]]:
    """Return name and weights of each product of a layer, in the order of its launches."""
    fused, block = model.fused_step.blocks[0], model.layers[0]
    outputs = [(f"output of {fused._names[mixer]}", [weight.values_NK]) for mixer, weight in fused._outputs.items()]
    joined = [("inputs of all mixers", [fused._projections.values_NK]), *outputs]
    if block.align is not None:
        joined += [("alignment, up", [fused._align_up.values_NK]), ("alignment, down", [fused._align_down.values_NK])]
    joined.append(("gate down and MLP up", [fused._gate_down.values_NK]))
    joined.append(("gate up and mix", [fused._gate_up.values_NK]))
    joined.append(("output and MLP down", [fused._out.values_NK, fused._mlp_down.values_NK]))
    return [*joined, ("head", [model.head.weight])]
