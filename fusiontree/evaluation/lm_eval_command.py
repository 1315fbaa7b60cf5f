"""The part of ``fusiontree evaluate`` that runs tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.evaluation.config import evaluation_settings
from fusiontree.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontree.evaluation.lm_eval_tasks import HarnessTasks

HARNESS_SETTINGS = ("batch_size", "seed")
"""Settings that tasks of lm-evaluation-harness use too."""


def add_harness_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of lm-evaluation-harness's tasks."""
    group = parser.add_argument_group("tasks of lm-evaluation-harness", "in place of --tasks; see docs/evaluation.md")
    add = group.add_argument
    add("--lm-eval", metavar="TASK,…", help="tasks, groups or tags of lm-evaluation-harness, or YAML files of tasks")
    add("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's number)")
    add("--limit", type=float, metavar="N", help="questions per task, or their share if below 1 (default: all)")
    path = "folder of further task files; may be given several times"
    add("--include-path", type=Path, action="append", default=[], metavar="DIR", help=path)


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
    if options:
        raise UserError(f"{options[0]} has no effect on the tasks of --lm-eval; call the command once for each")
    names = [name.strip() for name in args.lm_eval.split(",") if name.strip()]
    tasks = HarnessTasks(names, args.num_fewshot, args.limit, args.include_path)
    tasks.check()
    return tasks


def run_harness(args: argparse.Namespace, tasks: HarnessTasks, folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness with every process; return the JSON object."""
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
        "results": {"lm_eval": results},
    }
    lm.close()
    return values
