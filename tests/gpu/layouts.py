"""Layouts on several GPUs: throughput of each beside one GPU's, loss curves of each beside one GPU's.

    python -m tests.gpu.layouts OUT speed:one-gpu curve:one-gpu       # the reference
    torchrun --nproc-per-node=2 -m tests.gpu.layouts OUT speed:fsdp2-cp2 curve:fsdp2-cp2 …
    torchrun --nproc-per-node=4 -m tests.gpu.layouts OUT small:ddp-dp4 graphs:ddp-cp4 …
    python -m tests.gpu.layouts OUT                                   # the table of what was measured

``OUT`` is a folder; curves train on data/bench/train, token shards of real text. Each layout keeps as many
activations as fit its memory.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fusiontree import benchmark
from fusiontree.cli.benchmark_options import build_parser
from fusiontree.config.load import load_config
from fusiontree.parallel.validate import check_layout
from fusiontree.train import train
from fusiontree.utils import gc_control
from fusiontree.utils.environment import process_place
from tests.end_to_end.runs import write_texts
from tools.build_shards import main as build_shards

SPEED = "configs/bench/hybrid_1b_32k.yaml"
SMALL = "configs/bench/hybrid_150m_8k.yaml"
CURVE = "tests/gpu/curve.yaml"
STEPS = 200

PARALLEL: dict[str, tuple[str, ...]] = {
    "one-gpu": ("parallel.engine=ddp",),
    "fsdp2-dp2": ("parallel.engine=fsdp2",),
    "fsdp2-tp2": ("parallel.engine=fsdp2", "parallel.tp=2"),
    "fsdp2-cp2": ("parallel.engine=fsdp2", "parallel.cp=2"),
    "ddp-tp2": ("parallel.engine=ddp", "parallel.tp=2"),
    "ddp-cp2": ("parallel.engine=ddp", "parallel.cp=2"),
    "zero3-dp2": ("parallel.engine=zero3",),
    "fsdp2-cp2-128k": ("parallel.engine=fsdp2", "parallel.cp=2"),
    "ddp-dp2": ("parallel.engine=ddp",),
    "ddp-dp4": ("parallel.engine=ddp",),
    "fsdp2-dp4": ("parallel.engine=fsdp2",),
    "zero3-dp4": ("parallel.engine=zero3",),
    "ddp-cp4": ("parallel.engine=ddp", "parallel.cp=4"),
    "ddp-tp2-cp2": ("parallel.engine=ddp", "parallel.tp=2", "parallel.cp=2"),
}
BATCHES: dict[str, tuple[str, ...]] = {  # of the speed figures; the curves' global batch is the same for all
    "one-gpu": (),
    "fsdp2-dp2": ("training.global_batch_size=2", "training.recompute_layers=8"),
    "fsdp2-tp2": ("training.activation_checkpointing=none", "parallel.reshard_after_forward=false"),
    "fsdp2-cp2": ("training.activation_checkpointing=none", "parallel.reshard_after_forward=false"),
    "ddp-tp2": ("training.activation_checkpointing=none",),
    "ddp-cp2": ("training.activation_checkpointing=none",),
    "zero3-dp2": ("training.global_batch_size=2",),
    "fsdp2-cp2-128k": (
        "training.seq_len=131072",
        "model.max_position_embeddings=131072",
        "training.activation_checkpointing=full",
        "training.recompute_layers=9",
    ),
    "ddp-dp2": ("training.global_batch_size=2", "training.recompute_layers=8"),
    "ddp-dp4": ("training.global_batch_size=4", "training.recompute_layers=8"),
    "fsdp2-dp4": ("training.global_batch_size=4", "training.recompute_layers=8"),
    "zero3-dp4": ("training.global_batch_size=4",),
    "ddp-cp4": ("training.activation_checkpointing=none",),
    "ddp-tp2-cp2": ("training.activation_checkpointing=none",),
}


def speed(out: Path, name: str) -> None:
    """Time a layout at 32K tokens per row with recorded steps; rank 0 writes ``OUT/speed-NAME.json``."""
    steps = "3" if name.endswith("128k") else "8"  # the allocator settles in the first few
    settings = [*PARALLEL[name], *BATCHES[name], f"training.cuda_graphs={_recorded(name)}"]
    time_steps(out, f"speed-{name}", SPEED, steps, settings)


def eager(out: Path, name: str) -> None:
    """Time a layout at 32K tokens per row without recorded steps; rank 0 writes ``OUT/eager-NAME.json``."""
    settings = [*PARALLEL[name], *BATCHES[name], "training.cuda_graphs=off"]
    time_steps(out, f"eager-{name}", SPEED, "8", settings)


def _recorded(name: str) -> str:
    return "auto" if name.startswith("zero") else "on"


def small(out: Path, name: str) -> None:
    """Time the small model with recorded steps; rank 0 writes ``OUT/small-NAME.json``."""
    split = [int(word[2:]) for word in name.split("-") if word[:2] in ("tp", "cp")]
    rows = 4 * process_place().world_size // math.prod(split)
    settings = [f"training.global_batch_size={rows}", f"training.cuda_graphs={_recorded(name)}"]
    time_steps(out, f"small-{name}", SMALL, "12", [*PARALLEL[name], *settings])


def time_steps(out: Path, name: str, config_file: str, steps: str, overrides: list[str]) -> None:
    """Time training steps; rank 0 writes ``OUT/NAME.json``."""
    args = build_parser().parse_args(
        ["--config", config_file, "--steps", steps, "--warmup", steps, "--one-document", *overrides]
    )
    config = load_config(args.config, args.overrides)
    check_layout(config.model, config.parallel, config.training, process_place().world_size)
    result = benchmark.run(config, args)
    if process_place().is_main:
        (out / f"{name}.json").write_text(json.dumps(result))
        print(name, json.dumps(result), flush=True)


def curve(out: Path, name: str) -> None:
    """Train the small model on real text; the run is ``OUT/curve-NAME``. The global batch is the same for all."""
    run_dir = out / f"curve-{name}"
    rows = 2 if name.endswith("dp2") else 4  # of the global batch's four
    settings = [f"run_dir={run_dir}", f"training.max_steps={STEPS}", f"training.micro_batch_size={rows}"]
    config = load_config(CURVE, [*PARALLEL[name], *settings])
    assert train(config) == 0


def graphs(out: Path, name: str) -> None:
    """Compare recorded steps with eager ones: packed rows, two micro-batches per step, clipping, branch dropout.

    Every row holds several short documents. A micro-batch of whole-row documents would take cuDNN's attention in an
    eager step, whose backward pass adds in no fixed order, and FlexAttention in a recorded one.
    """
    found = []
    data = _short_documents(out)
    port = int(os.environ.get("MASTER_PORT", "29500"))
    for mode in ("off", "off", "on"):  # the first run compiles kernels
        os.environ["MASTER_PORT"] = str(port + 100 * (len(found) + 1))  # the processes of each run meet anew
        run_dir = out / f"graphs-{name}-{len(found)}-{mode}"
        settings = [f"run_dir={run_dir}", "training.max_steps=50", "training.micro_batch_size=2"]
        settings += [f"training.cuda_graphs={mode}", "model.drop_branch_prob=0.1", "model.kernels.attention=flex"]
        settings += [f"data.train={data / 'train'}"]
        assert train(load_config(CURVE, [*PARALLEL[name], *settings])) == 0
        found.append([(record["loss"], record["grad_norm"]) for record in _records(run_dir) if "grad_norm" in record])
    assert found[1], "no step was logged"
    assert found[2] == found[1], f"recorded steps differ from step {_first_difference(found[1], found[2])} on"


def _short_documents(out: Path) -> Path:
    """Return a folder of token shards of short texts, which rank 0 builds once."""
    built = out / "short"
    done = built / "done"
    if process_place().is_main and not done.exists():
        texts = write_texts(built / "texts", count=2000)
        words = ["--input", str(texts), "--output", str(built / "train"), "--processes", "1"]
        assert build_shards(words) == 0
        done.touch()
    while not done.exists():
        time.sleep(0.2)
    return built


def _first_difference(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> int:
    return next(step for step, (a, b) in enumerate(zip(one, other, strict=False), start=1) if a != b)


JOBS = {"speed": speed, "eager": eager, "small": small, "curve": curve, "graphs": graphs}


def measure(out: Path, jobs: list[str]) -> list[str]:
    """Run jobs named ``speed:LAYOUT`` and ``curve:LAYOUT``; a failed one is said and returned, and the next begins."""
    known = [f"{kind}:{name}" for kind in JOBS for name in PARALLEL]
    if wrong := [job for job in jobs if job not in known]:
        sys.exit(f"no such job: {', '.join(wrong)}; there are {', '.join(known)}")
    out.mkdir(parents=True, exist_ok=True)
    port = int(os.environ.get("MASTER_PORT", "29500"))
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # each job's processes meet anew, at a port of their own
    failed = []
    for index, job in enumerate(jobs):
        kind, _, name = job.partition(":")
        os.environ["MASTER_PORT"] = str(port + 1 + index)
        began = time.perf_counter()
        try:
            JOBS[kind](out, name)
        except Exception:
            traceback.print_exc()
            failed.append(job)
            if dist.is_initialized():
                dist.destroy_process_group()
        gc_control.unfreeze()
        gc.collect()
        torch.cuda.empty_cache()
        if process_place().is_main:
            print(f"{job}: {'failed after ' * (job in failed)}{time.perf_counter() - began:.0f} s", flush=True)
    return failed


def table(out: Path) -> None:
    """Print both tables from what was written."""
    speeds = {file.stem: json.loads(file.read_text()) for file in sorted(out.glob("[se]*-*.json"))}
    for name, figures in speeds.items():
        one_gpu = speeds.get(f"{name.partition('-')[0]}-one-gpu")
        rate = figures["tokens_per_s_per_gpu"]
        of_one = f", {rate / one_gpu['tokens_per_s_per_gpu']:.1%} of one GPU" if one_gpu else ""
        print(
            f"{name:24s} {rate:10,.0f} tokens/s/GPU {figures['peak_memory_gib']:7.1f} GiB, "
            f"MFU {figures['mfu']:.1%}{of_one}"
        )
    curves = {folder.name: _losses(folder) for folder in sorted(out.glob("curve-*"))}
    reference = curves.get("curve-one-gpu", [])
    for name, mine in curves.items():
        off = [abs(a - b) / b for a, b in zip(mine, reference, strict=False)]
        far, usual = (max(off), sum(off) / len(off)) if off else (math.nan, math.nan)
        print(
            f"{name:24s} {len(mine)} steps, loss {mine[:1]} to {mine[-1:]}, from one GPU's {far:.2%} at most and "
            f"{usual:.2%} on average"
        )


def _losses(run_dir: Path) -> list[float]:
    return [record["lm_loss"] for record in _records(run_dir) if "lm_loss" in record]


def _records(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in (file.read_text().splitlines() if file.exists() else [])]


if __name__ == "__main__":
    folder, *named = sys.argv[1:]
    if named:
        sys.exit(bool(measure(Path(folder), named)))
    else:
        table(Path(folder))
