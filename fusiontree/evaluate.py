"""Evaluates a checkpoint: ``python -m fusiontree.evaluate --checkpoint DIR --tasks perplexity needle …``.

With ``--lm-eval TASK,TASK`` it runs tasks of lm-evaluation-harness in place of ours, under torchrun on several GPUs.

Prints a table on a terminal. With ``--json``, or where standard output is no terminal, it prints one JSON object with
the same numbers in full precision there; without ``--json`` the table is then on standard error.

Under ``torchrun`` every process loads the model and computes a share of the rows; with ``--cp N``, each group of N
processes computes its rows together, each a chunk of the tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.cli.program import add_device_options, check_output_folders, run_program
from fusiontree.data.format import ShardDamage
from fusiontree.evaluation.config import EvaluationConfig, evaluation_settings
from fusiontree.evaluation.lm_eval_command import add_harness_options, harness_tasks, run_harness
from fusiontree.tracking.json_lines import finite
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import write_output

if TYPE_CHECKING:
    from fusiontree.parallel.layout import Layout


def build_parser() -> argparse.ArgumentParser:
    """Return the command line; options that are not given come from the run's ``evaluation`` section."""
    parser = argparse.ArgumentParser(
        prog="python -m fusiontree.evaluate",
        description="Measure a checkpoint. Settings that are not given come from the run's 'evaluation' section.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", required=True, type=Path, metavar="DIR", help="a run folder (its newest checkpoint) or one step"
    )
    fields = EvaluationConfig.model_fields

    def setting(name: str, metavar: str, **options: Any) -> None:
        parser.add_argument(
            f"--{name.replace('_', '-')}", default=None, metavar=metavar, help=fields[name].description, **options
        )

    setting("tasks", "TASK", nargs="+")
    setting("data", "DIR")
    setting("text", "FILE", nargs="+")
    setting("seq_len", "N", type=int)
    setting("max_rows", "N", type=int)
    setting("stride", "N", type=int)
    setting("lengths", "N", nargs="+", type=int)
    setting("depths", "D", nargs="+", type=float)
    parser.add_argument("--alphabet", choices=["vocabulary", "data"], help=fields["alphabet"].description)
    setting("rows", "N", type=int)
    setting("needle_tokens", "N", type=int)
    setting("recall_pairs", "N", type=int)
    setting("distractors", "N", type=int)
    setting("needles", "N", type=int)
    setting("hops", "N", type=int)
    setting("batch_size", "N", type=int)
    setting("seed", "N", type=int)
    add_harness_options(parser)
    json_help = "print one JSON object instead of a table, as where standard output is no terminal"
    parser.add_argument("--json", action="store_true", help=json_help)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON object to this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw loss by context and accuracy by length as PNG")
    parser.add_argument(
        "--cp",
        type=int,
        default=1,
        metavar="N",
        help="processes that compute a row together (default 1); needs torchrun",
    )
    parser.add_argument("--check", action="store_true", help="check options, checkpoint and data, then exit")
    add_device_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0 done, 2 user error."""
    return run_program(build_parser, run, argv, errors=(UserError, ShardDamage))


def run(args: argparse.Namespace) -> int:
    """Evaluate a checkpoint; return the exit code of :func:`main`.

    Raises:
        UserError: an option, the checkpoint or a dataset is wrong; found before the first task runs.
        CheckpointDamage: a file of the checkpoint differs from its recorded hash.
        ShardDamage: the dataset cannot be read.
    """
    from fusiontree.checkpoint.load import find_checkpoint
    from fusiontree.utils.environment import process_place

    check_output_folders(args, "output", "plot")
    options = {name: getattr(args, name, None) for name in EvaluationConfig.model_fields}
    given = {name: value for name, value in options.items() if value is not None}
    settings = evaluation_settings(given)  # errors in the options need no checkpoint
    folder = find_checkpoint(args.checkpoint)
    harness = harness_tasks(args, given)
    if args.check:
        check_inputs(settings)
        print(f"ok: {folder}")
        return 0
    if harness is not None:
        values, is_main = run_harness(args, harness, folder, given), process_place().is_main
    else:
        with evaluation_layout(args.device, args.cp) as layout:
            values, is_main = evaluate(args, folder, given, layout), layout is None or layout.is_main
    if is_main:
        show(args, values)
    return 0


@contextmanager
def evaluation_layout(device: str, cp: int) -> Iterator[Layout | None]:
    """Join the other processes for the ``with`` block; a process alone needs no process group.

    Raises:
        UserError: the processes do not divide by ``cp``, or the device is not there.
    """
    from fusiontree.utils.device import choose_device
    from fusiontree.utils.environment import process_place

    place = process_place()
    if cp < 1 or place.world_size % cp:
        raise UserError(f"--cp {cp} does not divide {place.world_size} processes; start a multiple of it with torchrun")
    if place.world_size == 1:
        yield None
        return
    from fusiontree.parallel.layout import Layout

    choose_device(device, place.local_rank)  # errors name the option
    with Layout(device, cp=cp) as layout:
        yield layout


def evaluate(args: argparse.Namespace, folder: Path, given: dict[str, Any], layout: Layout | None) -> dict[str, Any]:
    """Evaluate ``folder`` on this process or, all processes together, on ``layout``; return the JSON object.

    Raises:
        UserError: an option or a dataset is wrong, or the model cannot be split along the tokens.
        CheckpointDamage: a file of the checkpoint differs from its recorded hash.
        ShardDamage: the dataset cannot be read.
    """
    from fusiontree.checkpoint.load import load_model, row_length
    from fusiontree.data.tokenizers import load_tokenizer
    from fusiontree.evaluation.plots import check_plot
    from fusiontree.evaluation.scorer import ModelScorer
    from fusiontree.evaluation.tasks import Setup, run_tasks
    from fusiontree.parallel.context_parallel import apply_context_parallel
    from fusiontree.utils.device import choose_device, choose_dtype

    device = choose_device(args.device) if layout is None else layout.device
    dtype = choose_dtype(args.dtype, device)
    model, resolved = load_model(folder, device, dtype)
    if layout is not None:
        apply_context_parallel(model, layout)
    settings = evaluation_settings({**resolved.get("evaluation", {}), **given})
    if args.plot:
        check_plot(settings.tasks)
    seq_len = row_length(settings.seq_len, resolved, folder)
    is_main = layout is None or layout.is_main

    def report(text: str) -> None:
        if is_main:
            print(text, file=sys.stderr, flush=True)

    processes = "" if layout is None else f", {layout.place.world_size} processes, cp {layout.cp_size}"
    report(f"{folder}: {device}, {dtype}{processes}")
    began = time.perf_counter()
    tokenizer = load_tokenizer(folder)
    scorer = ModelScorer(model, tokenizer.unknown_ids(model.config.vocab_size), layout)
    setup = Setup(model.config, tokenizer, settings, seq_len, scorer, resolved.get("data", {}))
    results = run_tasks(setup, lambda task: report(f"{task} …"))
    return {
        "checkpoint": str(folder),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "processes": scorer.dp_size * args.cp,
        "cp": args.cp,
        "seconds": round(time.perf_counter() - began, 3),
        "settings": settings.model_dump(mode="json"),
        "results": results,
    }


def show(args: argparse.Namespace, values: dict[str, Any]) -> None:
    """Print the results of :func:`evaluate`, and write the files that options name."""
    from fusiontree.evaluation.plots import plot_results
    from fusiontree.evaluation.tasks import table

    results = values["results"]
    values = finite(values)
    if args.json or not sys.stdout.isatty():
        print(json.dumps(values))
    if not args.json:
        print(table(results), file=sys.stdout if sys.stdout.isatty() else sys.stderr)
    if args.output:
        write_output(args.output, json.dumps(values, indent=1) + "\n")
    if args.plot:
        plot_results(results, args.plot)


def check_inputs(settings: EvaluationConfig) -> None:
    """Check that the data named on the command line exist; paths in ``settings`` are expanded.

    Raises:
        UserError: a file or folder does not exist.
    """
    from fusiontree.data.config import is_remote
    from fusiontree.data.sources.remote import local_folder

    for option, paths in (("--data", [settings.data]), ("--text", settings.text)):
        for path in paths:
            if path is not None and not is_remote(path) and not local_folder(path).exists():
                raise UserError(f"{option} {path}: there is no such file or folder")


if __name__ == "__main__":
    sys.exit(main())
