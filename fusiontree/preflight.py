"""Checks the network between the nodes of a Slurm allocation: ``launchers/preflight.sh``.

Times an all-reduce and an all-gather between every two nodes, in at most about two minutes, prints a table (or with
``--json`` one JSON object) and names slow and dead links and nodes.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from fusiontree.cli.program import run_program
from fusiontree.utils.environment import fail_on_nccl_timeout, meeting_point, process_place
from fusiontree.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontree.planning.network_check import Measured


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fusiontree.preflight",
        description="Measure the links between the nodes of a job. Start it as training is started, one process a GPU.",
    )
    parser.add_argument("--size-mb", type=float, help="size of the reduced tensor (default 256 on GPUs, 4 on CPUs)")
    parser.add_argument(
        "--budget", type=float, default=120, metavar="S", help="no new round begins after (default 120)"
    )
    parser.add_argument(
        "--pair-timeout", type=float, default=8, metavar="S", help="of a connection and a collective (default 8)"
    )
    parser.add_argument("--join-timeout", type=float, default=60, metavar="S", help="a node is lost after (default 60)")
    parser.add_argument(
        "--slow-below",
        type=float,
        default=0.5,
        metavar="F",
        help="slow is below this share of a sound link (default 0.5)",
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON object to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the entry; return the exit code: 0 all links are fit, 1 some are not, 2 something given is wrong."""
    return run_program(build_parser, run, argv)


def run(args: argparse.Namespace) -> int:
    """Measure, and on rank 0 report; return the exit code of :func:`main`.

    Raises:
        UserError: nobody said where the processes meet, or they cannot reach that place.
    """
    import torch.distributed as dist

    from fusiontree.parallel.layout import choose_device
    from fusiontree.planning.network_check import Preflight, judge

    place, point = process_place(), meeting_point()
    if point is None:
        raise UserError(
            "MASTER_ADDR and MASTER_PORT are not set; start it with launchers/preflight.sh in an allocation"
        )
    if place.world_size % place.local_world_size:
        raise UserError(f"{place.world_size} processes are not {place.local_world_size} on each node")
    device = choose_device(args.device, place)
    fail_on_nccl_timeout()
    began, name = time.monotonic(), socket.gethostname()
    try:
        # The port after training's own, which a launcher may keep busy.
        store = dist.TCPStore(
            point[0], point[1] + 1, None, place.is_main, timedelta(seconds=args.join_timeout), wait_for_workers=False
        )
    except RuntimeError as error:
        raise UserError(f"{name} cannot reach rank 0 at {point[0]}:{point[1] + 1}: {error}") from None
    size_mb = args.size_mb or (256 if device.type == "cuda" else 4)
    test = Preflight(
        place,
        device,
        store,
        name,
        size_bytes=int(size_mb * 2**20),
        pair_timeout_s=args.pair_timeout,
        join_timeout_s=args.join_timeout,
        budget_s=args.budget,
    )
    result = test.run()
    if result is None:
        return 0
    measured, lost, left_out = result
    problems = judge(measured, lost, test.names, args.slow_below)
    names = {node: test.names.get(node, "?") for node in range(place.world_size // place.local_world_size)}
    values = {
        "nodes": [names[node] for node in sorted(names)],
        "ranks_per_node": place.local_world_size,
        "device": device.type,
        "size_mb": size_mb,
        "seconds": round(time.monotonic() - began, 1),
        "rounds_left_out": left_out,
        "links": [asdict(m) for m in measured],
        "problems": problems,
    }
    if args.json:
        print(json.dumps(values), flush=True)
    else:
        print_table(measured, names)
        if left_out:
            print(f"{left_out} rounds of pairs were left out; --budget gives them time")
        for problem in problems:
            print(f"error: {problem}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(values, indent=1) + "\n")
    time.sleep(1)  # this process holds the store, from which the other ranks still read
    return 1 if problems else 0


def print_table(measured: Sequence[Measured], names: dict[int, str]) -> None:
    """Print one line per link."""
    print(f"{'link':40} {'all-reduce GB/s':>16} {'all-gather GB/s':>16}")
    for m in measured:
        link = f"inside {names[m.pair[0]]}" if m.pair[0] == m.pair[1] else f"{names[m.pair[0]]} - {names[m.pair[1]]}"
        rates = f"{m.all_reduce_gb_per_s:16.3f} {m.all_gather_gb_per_s:16.3f}"
        print(f"{link:40} {f'dead: {m.error}' if m.error else rates}")


if __name__ == "__main__":
    sys.exit(main())
