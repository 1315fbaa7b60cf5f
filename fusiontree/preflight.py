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
from typing import TYPE_CHECKING, Any

from fusiontree.cli.program import check_output_folders, run_program
from fusiontree.utils.environment import ProcessPlace, fail_on_nccl_timeout, meeting_point, process_place
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import write_output

if TYPE_CHECKING:
    import torch.distributed as dist


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fusiontree.preflight",
        description="Measure the links between the nodes of a job. Start it as training: one process per GPU.",
    )
    add = parser.add_argument
    add("--size-mb", type=float, help="size of the reduced tensor (default 256 on GPUs, 4 on CPUs)")
    add("--budget", type=float, default=120, metavar="S", help="begin no new round after S seconds (default 120)")
    add("--pair-timeout", type=float, default=8, metavar="S", help="seconds for a connection or collective (default 8)")
    add("--join-timeout", type=float, default=60, metavar="S", help="seconds to wait for a node (default 60)")
    slow = "a link below this share of the usual rate is slow (default 0.5)"
    add("--slow-below", type=float, default=0.5, metavar="F", help=slow)
    add("--device", default="auto", choices=["auto", "cuda", "cpu"])
    add("--output", type=Path, metavar="FILE", help="write the JSON object to this file")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the entry; return the exit code: 0 all links are sound, 1 some are not, 2 user error."""
    return run_program(build_parser, run, argv)


def run(args: argparse.Namespace) -> int:
    """Measure, and report on rank 0; return the exit code of :func:`main`.

    Raises:
        UserError: no launcher named a meeting point, this process cannot reach it, or --output has no folder.
    """
    from fusiontree.planning.network_check import Preflight, judge
    from fusiontree.utils.device import choose_device

    check_output_folders(args, "output")
    place = process_place()
    if place.world_size % place.local_world_size:
        raise UserError(f"{place.world_size} processes are not {place.local_world_size} on each node")
    device = choose_device(args.device, place.local_rank)
    fail_on_nccl_timeout()
    began, name = time.monotonic(), socket.gethostname()
    size_mb = args.size_mb or (256 if device.type == "cuda" else 4)
    test = Preflight(
        place,
        device,
        connect(place, args.join_timeout, name),
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
    names = [test.names.get(node, "?") for node in range(place.world_size // place.local_world_size)]
    values = {
        "nodes": names,
        "ranks_per_node": place.local_world_size,
        "device": device.type,
        "size_mb": size_mb,
        "seconds": round(time.monotonic() - began, 1),
        "rounds_left_out": left_out,
        "links": [asdict(m) for m in measured],
        "problems": judge(measured, lost, test.names, args.slow_below),
    }
    print_report(values, args.json)
    if args.output:
        write_output(args.output, json.dumps(values, indent=1) + "\n")
    time.sleep(1)  # this process holds the store, from which the other ranks still read
    return 1 if values["problems"] else 0


def connect(place: ProcessPlace, join_timeout_s: float, name: str) -> dist.Store:
    """Return the key-value store of all processes, which rank 0 holds.

    Raises:
        UserError: no launcher named a meeting point, or this host, ``name``, cannot reach it.
    """
    import torch.distributed as dist

    point = meeting_point()
    if point is None:
        raise UserError(
            "MASTER_ADDR and MASTER_PORT are not set; start it with launchers/preflight.sh in an allocation"
        )
    host, port = point[0], point[1] + 1  # after the port of training, which a launcher may keep busy
    limit = timedelta(seconds=join_timeout_s)
    try:
        return dist.TCPStore(host, port, None, place.is_main, limit, wait_for_workers=False)
    except RuntimeError as error:
        raise UserError(f"{name} cannot reach rank 0 at {host}:{port}: {error}") from None


def print_report(values: dict[str, Any], as_json: bool) -> None:
    """Print one JSON object, or one line per link and the problems."""
    if as_json:
        print(json.dumps(values), flush=True)
        return
    names = values["nodes"]
    print(f"{'link':40} {'all-reduce GB/s':>16} {'all-gather GB/s':>16}")
    for m in values["links"]:
        a, b = m["pair"]
        link = f"inside {names[a]}" if a == b else f"{names[a]} - {names[b]}"
        rates = f"{m['all_reduce_gb_per_s']:16.3f} {m['all_gather_gb_per_s']:16.3f}"
        print(f"{link:40} {f'dead: {error}' if (error := m['error']) else rates}")
    if values["rounds_left_out"]:
        print(f"{values['rounds_left_out']} rounds of pairs were left out; --budget gives them time")
    for problem in values["problems"]:
        print(f"error: {problem}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
