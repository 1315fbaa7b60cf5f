"""Trains the arms of a study side by side and writes one report: ``python -m fusiontree.study FILE --out DIR``.

The same command goes on after a stop: finished runs are skipped, unfinished ones resume. ``--report RESULTS`` writes
the report again from a results.json alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fusiontree.cli.program import run_program
from fusiontree.tracking.console import short
from fusiontree.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontree.studying.config import StudyConfig
    from fusiontree.studying.runs import Run
    from fusiontree.studying.workers import Workers


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fusiontree.study",
        description="Train the arms of a study side by side, at equal FLOPs or tokens, and write one report. Started "
        "again, the study goes on.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("study", nargs="?", metavar="FILE", help="the study's YAML file, or a packaged name such as blocks")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the runs, results.json and report.md")
    add("--gpus", type=int, metavar="N", help="GPUs to use (default: all)")
    add("--per-gpu", type=int, default=1, metavar="K", help="runs on each GPU at a time (default 1)")
    add("--processes", type=int, metavar="N", help="train on CPUs, N runs at a time, instead of on GPUs")
    add("--only", nargs="+", metavar="PATTERN", help="runs to start, by SIZE/ARM/seed-S, e.g. '60m/*' '*/fused/*'")
    add("--time-limit", type=float, metavar="S", help="seconds after which running runs save a checkpoint and stop")
    known = "results.json of the same study on other machines: what is finished there is not run again"
    add("--known", nargs="+", type=Path, default=[], metavar="RESULTS", help=known)
    add("--every", type=float, default=15.0, metavar="S", help="seconds between lines of progress (default 15)")
    add("--dry-run", action="store_true", help="print the table of runs and exit")
    add("--no-evaluation", action="store_true", help="leave out the study's evaluation")
    add("--no-pictures", action="store_true", help="write report.md without pictures (they need matplotlib)")
    add(
        "--report",
        nargs="+",
        type=Path,
        metavar="RESULTS",
        help="run nothing; write the report of these results.json into --out, with one results.json of all",
    )
    add("--set", nargs="+", default=[], metavar="section.key=value", help="settings of all runs; replace the study's")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study; return the exit code: 0 all selected runs are finished, 1 runs failed, 75 stopped, 2 user error."""
    return run_program(build_parser, run, argv)


def run(args: argparse.Namespace) -> int:
    """Run, plan or report as asked; return the exit code of :func:`main`.

    Raises:
        UserError: an option, the study or a configuration is wrong, or matplotlib is missing.
    """
    if not args.no_pictures and not args.dry_run and importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "matplotlib, which draws the pictures, is not installed; install it, or give --no-pictures and write the "
            "report elsewhere with --report"
        )
    if args.report:
        from fusiontree.studying.report import write_report
        from fusiontree.studying.results import RESULTS, merged, read_results, write_results

        for given, value in (("FILE", args.study), ("--known", args.known), ("--only", args.only)):
            if value:
                shown = value if isinstance(value, str) else " ".join(map(str, value))
                raise UserError(f"{given} '{shown}' is for runs, and --report runs nothing; leave it out")
        results = merged([read_results(path) for path in args.report])
        args.out.mkdir(parents=True, exist_ok=True)
        if len(args.report) > 1:
            write_results(args.out / RESULTS, results)
        print(write_report(results, args.out, pictures=not args.no_pictures))
        return 0
    if not args.study:
        raise UserError("give the study's FILE, or --report RESULTS; see --help")
    from fusiontree.studying.config import load_study
    from fusiontree.studying.runs import plan_runs

    changed = {**dict(map(_setting, args.set)), **({"training.device": "cpu"} if args.processes else {})}
    study = load_study(Path(args.study))
    study = study.model_copy(update={"set": {**study.set, **changed}})
    if args.no_evaluation:
        study = study.model_copy(update={"evaluate": []})
    _check_evaluation(study.evaluate)
    runs = plan_runs(study)
    only = _selection(args.only, runs)
    return run_study(args, study, runs, only)


def run_study(args: argparse.Namespace, study: StudyConfig, runs: list[Run], only: Callable[[Run], bool]) -> int:
    """Train the selected runs, or list them, and write results and report; return the exit code of :func:`main`."""
    from fusiontree.studying.report import write_report
    from fusiontree.studying.results import RESULTS, collect, merged, read_results, write_results
    from fusiontree.studying.workers import Workers

    slots, gpus = (1, 0) if args.dry_run else _slots(args)
    elsewhere = [read_results(path) for path in args.known]
    workers = Workers(
        study,
        runs,
        args.out,
        slots,
        gpus=gpus,
        only=only,
        time_limit_s=args.time_limit,
        say=lambda line: print(line, flush=True),
        every_s=args.every,
        elsewhere=merged(elsewhere)["runs"] if elsewhere else [],
    )
    merged([collect(study, workers.runs(), args.out, workers.is_finished, {}), *elsewhere])  # before hours of training
    if args.dry_run:
        print_table(study, [run for run in workers.runs() if only(run)], workers.is_finished)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    workers.run_all()
    known = workers.runs()
    results = merged([collect(study, known, args.out, workers.is_finished, workers.failed), *elsewhere])
    write_results(args.out / RESULTS, results)
    print(f"{args.out / RESULTS}\n{write_report(results, args.out, pictures=not args.no_pictures)}")
    for name, reason in workers.failed.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return _outcome(study, known, workers, only)


def _outcome(study: StudyConfig, known: list[Run], workers: Workers, only: Callable[[Run], bool]) -> int:
    """Say what is left of the selected runs and why; return the exit code of :func:`main`."""
    if workers.failed:
        return 1
    left = [run for run in known if only(run) and not workers.is_finished(run)]
    if undecided := sorted({run.arm for run in left if run.rate is None}):
        searches = [run for run in known if run.searched and run.arm in undecided]
        waiting = [run.name for run in searches if not workers.is_finished(run)]
        if not waiting:
            print(
                f"failed: arms {', '.join(undecided)}: no loss of the learning rates "
                f"{', '.join(f'{rate:g}' for rate in study.learning_rates)} is finite; give lower learning_rates",
                file=sys.stderr,
            )
            return 1
        if not any(only(run) for run in searches):
            print(f"{len(left)} runs wait for a search that --only leaves out: {', '.join(waiting)}")
            return 75
    if left:
        print(f"{len(left)} runs are not finished; the same command goes on")
        return 75
    return 0


def print_table(study: StudyConfig, runs: Sequence[Run], is_finished: Callable[[Run], bool]) -> None:
    """Print one line per run: parameters, FLOPs per token, steps, tokens and the whole run's FLOPs; then the sums."""
    head = ("run", "parameters", "MFLOPs/token", "steps", "tokens", "FLOPs", "rate")
    width = max([len(head[0]), *(len(run.name) for run in runs)])
    print(f"{head[0]:<{width}}" + "".join(f"{name:>14}" for name in head[1:]))
    left = [run for run in runs if not is_finished(run)]
    for run in runs:
        rate = "of search" if run.rate is None else f"{run.rate:.3g}"
        cells = [short(run.parameters), f"{run.flops_per_token / 1e6:.1f}", f"{run.steps:,}", short(run.tokens)]
        end = "" if run in left else "  finished"
        print(f"{run.name:<{width}}" + "".join(f"{cell:>14}" for cell in (*cells, f"{run.flops:.4g}", rate)) + end)
    tokens, flops = sum(run.tokens for run in left), sum(run.flops for run in left)
    print(f"{len(left)} runs to do, {short(tokens)} tokens, {flops:.4g} FLOPs; equal {study.equal}")


def _setting(text: str) -> tuple[str, Any]:
    from fusiontree.config.load import parse_yaml

    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UserError(f"--set '{text}' is not of the form section.key=value")
    return name, parse_yaml(value, f"--set '{text}'")


def _check_evaluation(options: Sequence[str]) -> None:
    """Raise UserError if ``fusiontree evaluate`` would refuse the study's options after hours of training."""
    if not options:
        return
    from fusiontree.evaluate import build_parser as evaluation_parser

    def refuse(message: str) -> NoReturn:
        raise UserError(f"evaluate {' '.join(options)}: {message}; see fusiontree evaluate --help")

    parser = evaluation_parser()
    parser.add_argument("--plugin", action="append")  # of every program
    parser.error = refuse  # type: ignore[method-assign]
    parser.parse_args(["--checkpoint", "x", *options])


def _selection(patterns: Sequence[str] | None, runs: Sequence[Run]) -> Callable[[Run], bool]:
    """Return whether ``--only`` selects a run.

    Raises:
        UserError: a pattern selects none.
    """
    for pattern in patterns or []:
        if not any(fnmatchcase(run.name, pattern) for run in runs):
            raise UserError(f"--only '{pattern}' selects no run; runs are {', '.join(run.name for run in runs[:6])} …")
    return lambda run: patterns is None or any(fnmatchcase(run.name, pattern) for pattern in patterns)


def _slots(args: argparse.Namespace) -> tuple[int, int]:
    """Return how many runs go side by side, and on how many GPUs; 0 on CPUs.

    Raises:
        UserError: the numbers contradict each other or the machine.
    """
    if args.gpus is not None and args.processes is not None:
        raise UserError("--gpus and --processes exclude each other; give one")
    for option, number in (("--processes", args.processes), ("--per-gpu", args.per_gpu)):
        if number is not None and number < 1:
            raise UserError(f"{option} {number}: give at least 1")
    for option, seconds in (("--time-limit", args.time_limit), ("--every", args.every)):
        if seconds is not None and not seconds > 0:
            raise UserError(f"{option} {seconds:g}: give seconds above 0")
    if args.processes is not None:
        return args.processes, 0
    import torch

    found = torch.cuda.device_count()
    wanted = found if args.gpus is None else args.gpus
    if not found:
        raise UserError("this machine has no GPU that torch can use; give --processes N to train on CPUs")
    if not 1 <= wanted <= found:
        raise UserError(f"--gpus {wanted}: this machine has {found} GPUs; give 1 to {found}, or --processes N for CPUs")
    return wanted * args.per_gpu, wanted


if __name__ == "__main__":
    sys.exit(main())
