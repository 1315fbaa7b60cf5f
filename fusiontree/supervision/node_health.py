"""Checks every node before the first step, when a slow or wrongly installed node costs least.

Every rank reports its software and measures its device and memory alone; all ranks measure the link together. Different
code, packages or configurations stop the run; ranks that are slower than most are named with their host.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import socket
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fusiontree
from fusiontree.engines.base import Engine
from fusiontree.supervision.device_speed import Probe
from fusiontree.utils.device import available_memory
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import write_json
from fusiontree.utils.hashing import sha256_file, stable_hash

FILE = "health.json"
_PACKAGES = ("torch", "numpy", "triton", "deepspeed", "mamba-ssm", "flash-attn-4", "fla-core", "nvidia-nccl-cu13")
_EQUAL = ("config", "source", "python", "packages", "cuda", "driver")
"""What must be the same on all ranks."""
_SLOW = 0.75
"""Below this share of the middle rank's rate a device, memory or link is slow."""
_LINK_BYTES = {"cuda": 1 << 26, "cpu": 1 << 20}


def examine(engine: Engine, run_dir: Path, values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every rank's report; all ranks call this together and get the same.

    Args:
        engine: whose device and link are measured.
        run_dir: whose file system's free space is asked for.
        values: the resolved configuration.
    """
    report = {"rank": engine.rank, "host": socket.gethostname(), **_identity(values), **_device(engine.device)}
    report["disk_free_gib"] = round(shutil.disk_usage(run_dir).free / 2**30, 1)
    probe = Probe(engine.device)
    report["matmul_tflops"] = round(probe.matmul_flops() / 1e12, 4)
    report["memory_gb_per_s"] = round(probe.copy_bytes_per_s() / 1e9, 2)
    report["link_gb_per_s"] = round(_link_bytes_per_s(engine) / 1e9, 3)
    return [json.loads(text) for text in engine.gather_text(json.dumps(report))]


def check(reports: list[dict[str, Any]]) -> list[str]:
    """Return what is slower on some ranks than on most, one sentence each.

    Raises:
        UserError: ranks run different code, packages or configurations.
    """
    for key in _EQUAL:
        found: dict[str, list[int]] = {}
        for report in reports:
            found.setdefault(json.dumps(report[key], sort_keys=True), []).append(report["rank"])
        if len(found) > 1:
            majority = max(found.values(), key=len)
            odd = [r for r in reports if r["rank"] not in majority]
            where = ", ".join(f"rank {r['rank']} ({r['host']}): {_shorten(r[key])}" for r in odd[:4])
            most = _shorten(reports[majority[0]][key])
            raise UserError(
                f"the ranks do not run the same {key}: {where}, where rank {majority[0]} "
                f"({reports[majority[0]]['host']}) has {most}; install the same on every node"
            )
    slow = []
    for key, what in (
        ("matmul_tflops", "matrix products, TFLOP/s"),
        ("memory_gb_per_s", "memory, GB/s"),
        ("clock_mhz", "device clock, MHz"),
    ):
        rates = [r[key] for r in reports if r.get(key)]
        # Two ranks have no middle; the faster one is the measure.
        middle = (max(rates) if len(rates) == 2 else median(rates)) if rates else 0.0
        slow += [
            f"rank {r['rank']} ({r['host']}) is slow: {what} {r[key]:g}, the middle rank has {middle:g}"
            for r in reports
            if r.get(key) and r[key] < _SLOW * middle
        ]
    return slow


def write(run_dir: Path, reports: list[dict[str, Any]]) -> None:
    """Write RUN/health.json; the newest start's report replaces the one before."""
    write_json(run_dir / FILE, reports)


def _identity(values: dict[str, Any]) -> dict[str, Any]:
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    root = Path(fusiontree.__file__).parent
    source = stable_hash("source", *(f"{p.relative_to(root)} {sha256_file(p)}" for p in sorted(root.rglob("*.py"))))
    return {
        "config": f"{stable_hash('config', json.dumps(values, sort_keys=True, default=str)):016x}",
        "source": f"{source:016x}",
        "python": platform.python_version(),
        "packages": packages,
        "cuda": torch.version.cuda,
    }


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": platform.processor() or platform.machine(), "driver": None, "memory_free_gib": _free_memory()}
    free, total = torch.cuda.mem_get_info(device)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "memory_free_gib": round(free / 2**30, 1),
        "memory_total_gib": round(total / 2**30, 1),
    }
    try:
        found["clock_mhz"] = torch.cuda.clock_rate(device)
        found["temperature_c"] = torch.cuda.temperature(device)
        found["power_w"] = round(torch.cuda.power_draw(device) / 1000, 1)
    except Exception as error:  # they need nvidia-ml-py, which is no dependency
        found["clocks"] = f"not known: {error}"
    return found


def _driver() -> str | None:
    """Return the version line of NVIDIA's kernel module, where it shows one."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return None


def _free_memory() -> float | None:
    size = available_memory()
    return None if size is None else round(size / 2**30, 1)


def _link_bytes_per_s(engine: Engine, repeats: int = 3) -> float:
    """Return what an all-reduce moves through this rank's link: 2 (n-1)/n of its bytes, each way."""
    if engine.world_size == 1:
        return 0.0
    values = torch.zeros(_LINK_BYTES.get(engine.device.type, 1 << 20) // 4, device=engine.device)
    best = float("inf")
    for _ in range(repeats + 1):  # the first opens connections
        engine.barrier()
        began = time.perf_counter()
        float(engine.sum_over_ranks(values)[0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - began)
    n = engine.world_size
    return values.numel() * 4 * 2 * (n - 1) / n / best


def _shorten(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."
