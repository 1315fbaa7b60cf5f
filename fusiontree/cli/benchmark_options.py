"""The command line of ``python -m fusiontree.benchmark``, and what is checked of it before any step runs."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fusiontree.config.root import Config
from fusiontree.utils.environment import process_place
from fusiontree.utils.errors import UserError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fusiontree.benchmark", description="Throughput, MFU and memory of training.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="YAML file with the run's configuration")
    add("--steps", type=int, default=10, help="timed steps (default 10)")
    add("--warmup", type=int, default=3, help="steps before, in which kernels compile (default 3)")
    add("--one-document", action="store_true", help="take every row as one document: the most attention possible")
    add("--profile", metavar="FILE", help="write a trace of one step, for chrome://tracing")
    add(
        "--peers",
        nargs="*",
        metavar="NAME",
        help="also train a model of as many parameters: llama (plain Llama, by our trainer), falcon (Hugging Face's "
        "Falcon-H1, one GPU); without names all that run here",
    )
    add(
        "--decode",
        type=int,
        metavar="N",
        help="also decode N tokens after a row of context (with --peers falcon: both)",
    )
    add("--ops", action="store_true", help="also time every operation alone, by each backend, beside its least time")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser


def check_options(config: Config, args: argparse.Namespace) -> None:
    """Check options before any step runs.

    Raises:
        UserError: an option's value is wrong, or needs a GPU, a folder or a package that is missing.
    """
    from fusiontree.training.recorded_passes import RECORDED_STEP
    from fusiontree.utils.device import choose_device

    if args.steps < 1 or args.warmup < 1:
        raise UserError(f"--steps {args.steps} and --warmup {args.warmup} must both be at least 1")
    if args.decode is not None and args.decode < 1:
        raise UserError(f"--decode {args.decode} must be at least 1 token")
    if config.training.activation_checkpointing == "auto" and args.warmup < 2:
        raise UserError(
            f"--warmup {args.warmup} must be at least 2: training.activation_checkpointing=auto measures two steps and "
            f"then keeps its choice"
        )
    device = choose_device(config.training.device, process_place().local_rank, "training.device")
    if device.type == "cuda" and config.training.cuda_graphs != "off" and args.warmup < RECORDED_STEP:
        raise UserError(
            f"--warmup {args.warmup} must be at least {RECORDED_STEP}: that step is recorded as CUDA graphs and would "
            f"be timed; or set training.cuda_graphs=off"
        )
    if args.profile is not None:
        if device.type == "cpu":
            raise UserError("--profile traces the kernels of a GPU, and this run is on the CPU; leave it out")
        if not Path(args.profile).absolute().parent.is_dir():
            raise UserError(f"--profile {args.profile}: its folder does not exist; make it first")
    one_size = (
        "its layers have one size, and model.letter_sizes gives layers others" if config.model.letter_sizes else ""
    )
    if args.ops and one_size:
        raise UserError(f"--ops: {one_size}; leave it out")
    if args.peers is not None or args.decode:
        _check_peers_and_decoding(config, args, device, one_size)


def _check_peers_and_decoding(config: Config, args: argparse.Namespace, device: torch.device, one_size: str) -> None:
    """Check ``--peers``, whose names it completes, and ``--decode``; a text in ``one_size`` excludes Falcon."""
    from fusiontree.benchmarking.llama import llama_config
    from fusiontree.benchmarking.peers import choose_peers, columns_to_decode, falcon_missing
    from fusiontree.planning.cost_model import count_parameters

    no_gpu = ""
    ranks = process_place().world_size
    if device.type == "cpu" or ranks > 1:
        no_gpu = (
            f"it runs on one GPU, and this run has {ranks} process(es) on {device.type}; start one on a machine with "
            f"a GPU"
        )
    if args.decode and no_gpu:
        raise UserError(f"--decode: {no_gpu}")
    no_tp = f"it has no tensor parallelism; set parallel.tp={config.parallel.tp} to 1" if config.parallel.tp > 1 else ""
    args.peers = choose_peers(args.peers, {"llama": no_tp, "falcon": one_size or no_gpu or falcon_missing()})
    if "llama" in args.peers:
        llama_config(config.model, sum(count_parameters(config.model, 1)[:2]))
    if "falcon" in args.peers and not args.one_document:
        log.warning("--peers falcon takes each row as one document; only with --one-document does our training as well")
    if args.decode and config.model.srte_encoding == "learnable":
        columns, limit = columns_to_decode(config.training.seq_len, args.decode), config.model.max_position_embeddings
        if columns > limit:
            raise UserError(
                f"--decode {args.decode} goes on to {columns} tokens, and the learnable SRTE's table ends at "
                f"model.max_position_embeddings={limit}; raise that for the benchmark"
            )
