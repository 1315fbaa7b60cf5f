"""Estimates memory and speed of a configuration and of other layouts: ``python -m fusiontree.plan --config FILE --gpus
N``. Runs nothing, needs no GPU.

Prints the assumptions and a table of layouts, the configured layout first, or with ``--json`` one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fusiontree.cli.program import run_program
from fusiontree.cli.run_teacher import check_teacher_layout
from fusiontree.config.load import load_config
from fusiontree.config.root import Config
from fusiontree.parallel.validate import check_layout, valid_tp
from fusiontree.tracking.console import short
from fusiontree.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontree.training.teacher import TeacherCheckpoint

_ASSUMPTIONS = (
    "bf16 rates of one profiled step of hybrid_1b_32k on one H100 SXM (docs/speed.md); other devices differ",
    "one document per row; the longest stage of a curriculum; {usable:.0%} of the memory is usable; half of the "
    "communication that could hide behind computation does; links {node:g} GB/s in a node, {network:g} between nodes, "
    "per GPU",
)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fusiontree.plan", description="Estimate memory and speed of a configuration; nothing is run."
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="YAML file with the run's configuration")
    add("--gpus", required=True, type=int, metavar="N", help="number of GPUs of the job")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
    add("--memory-gib", type=float, default=80, metavar="G", help="memory of one GPU (default 80)")
    add("--node-gb-per-s", type=float, default=300, metavar="R", help="link of one GPU in its node (default 300)")
    add("--network-gb-per-s", type=float, default=40, metavar="R", help="link of one GPU between nodes (default 40)")
    add("--rows", type=int, default=8, metavar="N", help="other layouts to show (default 8)")
    add("--tokens", metavar="N", help="token budget, such as 300B (default: training.max_steps)")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser


def layouts(
    config: Config, gpus: int, gpus_per_node: int, teacher: TeacherCheckpoint | None = None
) -> Iterator[Config]:
    """Yield the configuration in every layout that it and its teacher allow: tp inside a node, cp, recomputation.

    A configuration with ``auto`` keeps it.
    """
    automatic = config.training.activation_checkpointing == "auto"
    modes = ("auto",) if automatic else ("none", "selective", "full")
    for tp in valid_tp(config.model, limit=gpus_per_node):
        for cp in (2**power for power in range(gpus.bit_length())):
            for mode in modes:
                parallel = config.parallel.model_copy(update={"tp": tp, "cp": cp})
                update = {"activation_checkpointing": mode, "recompute_layers": None}
                candidate = config.model_copy(
                    update={"parallel": parallel, "training": config.training.model_copy(update=update)}
                )
                try:
                    check_layout(candidate.model, parallel, candidate.training, gpus)
                    if teacher is not None:
                        check_teacher_layout(teacher, candidate, gpus)
                except UserError:
                    continue
                # A step has only the rows of its batch: further ranks would idle.
                if gpus // (tp * cp) <= config.training.global_batch_size:
                    yield candidate


def main(argv: Sequence[str] | None = None) -> int:
    """Run the entry; return the exit code: 0 the configuration fits, 1 it does not, 2 user error."""
    return run_program(build_parser, run, argv)


def run(args: argparse.Namespace) -> int:
    """Estimate and print; return the exit code of :func:`main`.

    Raises:
        UserError: the configuration, the layout or an option is wrong.
    """
    from fusiontree.planning.advice import days, idle_note, parse_tokens, recommendation
    from fusiontree.planning.cost_model import Hardware, count_parameters, estimate, usable_share
    from fusiontree.training.teacher import read_teacher

    _check_numbers(args)
    budget = parse_tokens(args.tokens) if args.tokens else None
    config = load_config(args.config, args.overrides)
    check_layout(config.model, config.parallel, config.training, args.gpus)
    hardware = Hardware(args.memory_gib, args.gpus_per_node, args.node_gb_per_s, args.network_gb_per_s)
    taught = read_teacher(config)
    if taught is not None:
        check_teacher_layout(taught, config, args.gpus)
    teacher = taught.model if taught else None

    def estimated(one: Config) -> dict[str, Any]:
        return estimate(one.model, one.parallel, one.training, args.gpus, hardware, teacher).values()

    training = config.training
    tokens = budget or float(training.max_steps * training.global_batch_size * training.seq_len)
    own = estimated(config)
    others = [estimated(one) for one in layouts(config, args.gpus, args.gpus_per_node, taught)]
    others.sort(key=lambda one: (not one["fits"], -one["tokens_per_s"]))
    best, advice = recommendation(own, [one for one in others if one["fits"]], training.global_batch_size)
    needed = [days(tokens, own)] + ([days(tokens, best)] if best is not own else [])
    idle = idle_note(own, training.global_batch_size)
    parameters = sum(count_parameters(config.model, tp=1)[:2])
    rates = {"node": args.node_gb_per_s, "network": args.network_gb_per_s, "usable": usable_share(training)}
    assumptions = [text.format(**rates) for text in _ASSUMPTIONS]
    shown = others[: args.rows]
    if args.json:
        values = {"gpus": args.gpus, "assumptions": assumptions, "configured": own, "others": shown}
        values |= {"parameters": parameters, "tokens": tokens, "days": needed[0], "idle": idle}
        print(json.dumps(values | {"recommended": best, "recommended_days": needed[-1], "advice": advice}))
        return 0 if own["fits"] else 1
    for text in assumptions:
        print(f"assumed: {text}")
    print_table(own, shown)
    fits = "fits" if own["fits"] else "does not fit"
    print(f"the configured layout {fits} {args.memory_gib:g} GiB{'' if own['fits'] else ' (marked !)'}")
    if taught:
        print(
            f"teacher: {own['teacher_gib']:.2g} of the total GiB and {own['teacher_s']:.2g} of the step's seconds are "
            f"of {taught.folder}"
        )
    if idle:
        print(f"idle: {idle}")
    in_days = " days, recommended ".join(f"{number:.3g}" for number in needed)
    print(f"{short(parameters)} parameters, {short(tokens)} tokens on {args.gpus} GPUs: configured {in_days} days")
    print(advice)
    return 0 if own["fits"] else 1


def _check_numbers(args: argparse.Namespace) -> None:
    """Raise UserError if an option's number is not possible."""
    for option, least in (("gpus", 1), ("gpus_per_node", 1), ("rows", 0)):
        if getattr(args, option) < least:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)}: give at least {least}")
    for option in ("memory_gib", "node_gb_per_s", "network_gb_per_s"):
        if not getattr(args, option) > 0:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option):g}: give a number above 0")


def layout_name(one: dict[str, Any]) -> str:
    """Return engine and sizes of an estimated layout."""
    return f"{one['engine']} dp{one['dp']} cp{one['cp']} tp{one['tp']}"


def print_table(own: dict[str, Any], others: Sequence[dict[str, Any]]) -> None:
    """Print one line per layout; ``!`` marks layouts that need too much memory."""
    head = ("layout", "recompute", "passes", "states", "gathered", "activations", "total GiB", "step s", "tokens/s/GPU")
    print(("{:24}{:>11}{:>8}" + "{:>13}" * 6).format(*head))
    for one in (own, *others):
        layout = layout_name({**one, "engine": "configured"} if one is own else one)
        memory = [f"{one[key]:.1f}" for key in ("states_gib", "gathered_gib", "activations_gib", "total_gib")]
        memory[-1] += "" if one["fits"] else " !"
        speed = [f"{one['step_s']:.2f}", f"{one['tokens_per_s_per_gpu']:,.0f}"]
        cells = (layout, one["activation_checkpointing"], one["accumulation"], *memory, *speed)
        print(("{:24}{:>11}{:>8}" + "{:>13}" * 6).format(*cells))


if __name__ == "__main__":
    sys.exit(main())
