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
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from fusiontree.cli.program import add_device_options, run_program
from fusiontree.data.format import ShardDamage
from fusiontree.evaluation.config import EvaluationConfig
from fusiontree.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontree.evaluation.lm_eval_tasks import HarnessTasks
    from fusiontree.parallel.layout import Layout

HARNESS_SETTINGS = ("batch_size", "seed")
"""Settings that tasks of lm-evaluation-harness use too."""


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
    _add_harness(parser)
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


def _add_harness(parser: argparse.ArgumentParser) -> None:
    """Add the options of lm-evaluation-harness's tasks."""
    group = parser.add_argument_group("tasks of lm-evaluation-harness", "in place of --tasks; see docs/evaluation.md")
    add = group.add_argument
    add("--lm-eval", metavar="TASK,…", help="tasks, groups or tags of lm-evaluation-harness, or YAML files of tasks")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's number)")
    add("--limit", type=float, metavar="N", help="questions per task, or their share if below 1 (default: all)")
    path = "folder of further task files; may be given several times"
    add("--include-path", type=Path, action="append", default=[], metavar="DIR", help=path)


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

    for option, file in (("--output", args.output), ("--plot", args.plot)):
        if file and not file.parent.is_dir():
            raise UserError(f"{option} {file}: the folder '{file.parent}' does not exist")
    options = {name: getattr(args, name, None) for name in EvaluationConfig.model_fields}
    given = {name: value for name, value in options.items() if value is not None}
    evaluation_settings(given)  # errors in the options need no checkpoint
    folder = find_checkpoint(args.checkpoint)
    harness = harness_tasks(args, given)
    if args.check:
        check_inputs(given)
        print(f"ok: {folder}")
        return 0
    if harness is not None:
        return run_harness(args, harness, folder, given)
    with evaluation_layout(args.device, args.cp) as layout:
        values = evaluate(args, folder, given, layout)
    if layout is None or layout.is_main:
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
    from fusiontree.checkpoint.load import load_model
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
    seq_len = settings.seq_len or resolved["training"]["seq_len"]
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


def harness_tasks(args: argparse.Namespace, given: dict[str, Any]) -> HarnessTasks | None:
    """Return the tasks of lm-evaluation-harness; None without ``--lm-eval``.

    Raises:
        UserError: a task or option is wrong, or the harness is not installed.
    """
    from fusiontree.evaluation.lm_eval_tasks import HarnessTasks

    if args.lm_eval is None:
        unused = {"--num-fewshot": args.num_fewshot, "--limit": args.limit, "--include-path": args.include_path}
        for option, value in unused.items():
            if value not in (None, []):
                raise UserError(f"{option} is for tasks of lm-evaluation-harness; give --lm-eval TASK,… too")
        return None
    options = [f"--{name.replace('_', '-')}" for name in given if name not in HARNESS_SETTINGS]
    options += ["--cp"] * (args.cp != 1) + ["--plot"] * (args.plot is not None)
    for option in options:
        raise UserError(f"{option} has no effect on the tasks of --lm-eval; call the command once for each")
    names = [name.strip() for name in args.lm_eval.split(",") if name.strip()]
    tasks = HarnessTasks(names, args.num_fewshot, args.limit, args.include_path)
    tasks.check()
    return tasks


def run_harness(args: argparse.Namespace, tasks: HarnessTasks, folder: Path, given: dict[str, Any]) -> int:
    """Run tasks of lm-evaluation-harness; the first of several processes prints their results."""
    from fusiontree.checkpoint.load import read_state
    from fusiontree.evaluation.lm_eval_model import FusionTreeLM

    settings = evaluation_settings({**read_state(folder)["config"].get("evaluation", {}), **given})
    lm = FusionTreeLM(folder, args.device, args.dtype, settings.batch_size, seed=settings.seed)
    if lm.rank == 0:
        print(f"{folder}: {lm.world_size} x {lm.device.type}, {lm.dtype}", file=sys.stderr, flush=True)
    began = time.perf_counter()
    results = tasks.run(lm)
    values = {
        "checkpoint": str(folder),
        "device": str(lm.device),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "seconds": round(time.perf_counter() - began, 3),
        "processes": lm.world_size,
        "settings": {name: getattr(settings, name) for name in HARNESS_SETTINGS},
        "lm_eval": tasks.settings(),
    }
    if lm.rank == 0:
        show(args, {**values, "results": {"lm_eval": results}})
    lm.close()
    return 0


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
        args.output.write_text(json.dumps(values, indent=1) + "\n")
    if args.plot:
        plot_results(results, args.plot)


def check_inputs(given: dict[str, Any]) -> None:
    """Check that the data named on the command line exist.

    Raises:
        UserError: a file or folder does not exist.
    """
    for option, paths in (("--data", [given.get("data")]), ("--text", given.get("text") or [])):
        for path in paths:
            if path is not None and "://" not in str(path) and not Path(path).exists():
                raise UserError(f"{option} {path}: there is no such file or folder")


def evaluation_settings(values: dict[str, Any]) -> EvaluationConfig:
    """Validate settings from the run and the command line.

    Raises:
        UserError: an option is invalid; the message names all of them.
    """
    try:
        return EvaluationConfig.model_validate(values)
    except ValidationError as error:
        problems = [
            f"--{str(problem['loc'][0]).replace('_', '-')} {problem['input']}: {problem['msg'].lower()}"
            for problem in error.errors()
        ]
        raise UserError("; ".join(problems)) from None


def finite(value: Any) -> Any:
    """Replace numbers that JSON cannot represent (infinite, NaN) by None."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
