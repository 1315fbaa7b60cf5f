"""The one training entry: ``python -m fusiontree.train --config FILE [section.key=value …]``.

It can be started by torchrun, deepspeed, srun or plain python. It reads rank and world size from the environment
variables that these launchers set.
This module imports torch, and modules that need torch, inside functions, so that ``--help`` and errors in settings
appear without that delay.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.cli.program import run_program
from fusiontree.cli.run_checks import check_data, check_kernels, check_trackers, notes
from fusiontree.cli.run_teacher import add_teacher
from fusiontree.cli.task_evaluation import check_run_tasks, check_tasks, task_evaluation
from fusiontree.config.load import config_values, dump_config, load_config
from fusiontree.config.root import Config
from fusiontree.parallel.validate import check_layout
from fusiontree.supervision.limits import time_limits
from fusiontree.supervision.signals import STOP_SIGNALS, exit_on_sigusr1
from fusiontree.tracking.console import NOTICE, Console
from fusiontree.training.lost_checkpoints import check_nothing_lost
from fusiontree.training.run_folder import check_run_folder, check_same_data, report_changes
from fusiontree.utils.environment import flight_record, keep_flight_record, process_place
from fusiontree.utils.errors import UserError
from fusiontree.utils.layer_metrics import LAYER_METRICS

if TYPE_CHECKING:
    from fusiontree.data.loader import TrainingData
    from fusiontree.data.validation import ValidationData
    from fusiontree.engines.base import Engine
    from fusiontree.parallel.layout import Layout
    from fusiontree.supervision.run_lock import RunLock
    from fusiontree.training.initial_state import InitialState
    from fusiontree.training.loop import Trainer

log = logging.getLogger("fusiontree")


class _Help(argparse.Action):
    """Prints the usage and, below it, every setting with its default and meaning."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from fusiontree.config.describe import describe_settings

        print(parser.format_help() + "\nsettings:\n" + describe_settings())
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this program's command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fusiontree.train",
        description="Train a FusionTree model. Starting again with the same run_dir resumes it.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=_Help, nargs=0, help="show this and every setting, then exit")
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file with the run's configuration")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument(
        "--check", action="store_true", help="check configuration, run folder and data as training would, then exit"
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="with --check: check the layout for N processes (default: the processes of this launch)",
    )
    parser.add_argument("--print-run-dir", action="store_true", help="check all but the data, print run_dir and exit")
    parser.add_argument("--quiet", action="store_true", help="print warnings, validations and the end of the run only")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the entry and return the exit code.

    0: the run reached ``max_steps`` or ``exit_at_step``. 75: a signal stopped the run; the same command resumes it.
    2: an argument, a setting or an input file is invalid.
    """
    return run_program(build_parser, run, argv)


def run(args: argparse.Namespace) -> int:
    """Check, print or train as asked; return the exit code of :func:`main`.

    Raises:
        UserError: an argument, a setting or an input file is invalid.
    """
    place = process_place()
    level = NOTICE if args.quiet else logging.INFO
    answers = args.print_config or args.print_run_dir  # launchers read what these print
    logging.basicConfig(
        level=level if place.is_main else logging.WARNING,
        format="%(message)s",
        stream=sys.stderr if answers else sys.stdout,
    )
    logging.getLogger("fusiontree.ops.dispatch").setLevel(logging.WARNING)  # the console summarizes the backends
    if args.world_size is not None and (args.world_size < 1 or not (args.check or args.print_run_dir)):
        raise UserError(f"--world-size {args.world_size}: give a number above 0, together with --check")
    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(dump_config(config), end="")
        return 0
    world_size = args.world_size or place.world_size
    check_layout(config.model, config.parallel, config.training, world_size)
    for name in config.logging.layer_metrics:
        LAYER_METRICS.get(name)
    check_run_folder(Path(config.run_dir), config_values(config))
    if place.is_main and (loss := check_nothing_lost(Path(config.run_dir), config.checkpoint)):
        log.warning(loss)
    if args.print_run_dir:
        print(config.run_dir)
        return 0
    if place.is_main:
        for note in notes(config, world_size):
            log.warning("note: %s", note)
    if args.check:
        check_data(config, world_size)
        check_tasks(config)
        check_trackers(config)
        if unchecked := check_kernels(config):
            log.warning("note: %s", unchecked)
        print(f"ok: {args.config}, run_dir {config.run_dir}")
        return 0
    exit_on_sigusr1(75)
    return train(config)


def train(config: Config) -> int:
    """Train as configured; return the exit code of :func:`main`.

    Raises:
        UserError: a GPU, dataset or backend that the configuration names is missing, or another process trains in
            the run folder.
    """
    from fusiontree.engines.build import build_engine
    from fusiontree.parallel.layout import Layout
    from fusiontree.supervision.restart_policy import apply_restart_policy
    from fusiontree.training.loop import Outcome

    apply_restart_policy(Path(config.run_dir), config.supervision)
    keep_flight_record()
    parallel = config.parallel
    with Layout(
        config.training.device,
        time_limits(config).collective_s,
        tp=parallel.tp,
        cp=parallel.cp,
        shard_size=parallel.shard_size,
    ) as layout:
        train_data, validation_data = open_data(config, layout)
        with lock_run_folder(config, layout) as lock:
            initial = initial_state(config, layout, train_data)
            tokenizer_files, changes = write_run_folder(config, layout, train_data)
            check_run_tasks(config, Path(config.run_dir))
            engine = build_engine(config.model, parallel, config.training, layout)
            trainer = build_trainer(config, layout, engine, train_data, validation_data, tokenizer_files, lock, initial)
            report_changes(trainer.records, trainer.console, changes)
            outcome = trainer.run()
        if outcome is Outcome.INTERRUPTED:
            # When the first rank exits, srun sends SIGTERM to the others, and launchers may forward a signal more than
            # once. Ignore stop signals, so that every rank exits with code 75.
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            layout.barrier()
    return 75 if outcome is Outcome.INTERRUPTED else 0


def open_data(config: Config, layout: Layout) -> tuple[TrainingData, dict[str, ValidationData]]:
    """Open this rank's part of the training data, and of the validation data if the run validates.

    Raises:
        UserError: a dataset is missing or does not fit the model or the other datasets.
    """
    from fusiontree.data.loader import TrainingData
    from fusiontree.data.validation import ValidationData

    training, vocab_size = config.training, config.model.vocab_size
    ranks = (layout.dp_rank, layout.dp_size)
    train_data = TrainingData(config.data, training, vocab_size, *ranks)
    check_same_data(Path(config.run_dir), config_values(config), train_data.order)
    return train_data, ValidationData.for_training(config.data, training, vocab_size, *ranks, train_data.sources)


@contextmanager
def lock_run_folder(config: Config, layout: Layout) -> Iterator[RunLock]:
    """Hold the lock of the run folder, so that no second process trains in it.

    Raises:
        UserError: another process trains there; raised on every rank.
    """
    from fusiontree.supervision.run_lock import RunLock

    lock = RunLock(Path(config.run_dir), say=log.warning)
    layout.on_main_rank(lock.acquire)
    try:
        yield lock
    finally:
        if layout.is_main:
            lock.release()


def initial_state(config: Config, layout: Layout, train_data: TrainingData) -> InitialState | None:
    """Return the checkpoint of another run that this one starts from, if any; the same one on every rank.

    Raises:
        UserError: it is missing, damaged or does not fit; raised on every rank.
    """
    from fusiontree.training.initial_state import InitialState, find_initial_state

    def find() -> str:
        found = find_initial_state(config, train_data.sources[0].tokenizer)
        return json.dumps(found.record()) if found else ""

    found = layout.on_main_rank(find)
    return InitialState.of_record(json.loads(found)) if found else None


def write_run_folder(
    config: Config, layout: Layout, train_data: TrainingData
) -> tuple[list[Path], dict[str, tuple[Any, Any]]]:
    """Write configuration and tokenizer into the run folder, on the main rank.

    Returns:
        The tokenizer's files there, and the settings that changed since the last start.
    """
    from fusiontree.training.run_folder import write_config

    files: list[Path] = []
    changes: dict[str, tuple[Any, Any]] = {}
    if layout.is_main:
        changes = write_config(Path(config.run_dir), dump_config(config))
        files = train_data.save_tokenizer(Path(config.run_dir))
    layout.barrier()
    return files, changes


def build_trainer(
    config: Config,
    layout: Layout,
    engine: Engine,
    train_data: TrainingData,
    validation_data: dict[str, ValidationData],
    tokenizer_files: list[Path],
    lock: RunLock,
    initial: InitialState | None,
) -> Trainer:
    """Give the engine its teacher and return the trainer, whose observers are called in the order of the list below."""
    from fusiontree.checkpoint.saver import Saver
    from fusiontree.cli.start_summary import start_summary
    from fusiontree.models.flops import training_flops_per_token
    from fusiontree.ops.dispatch import chosen_backends
    from fusiontree.supervision.watchdog import Watchdog
    from fusiontree.tracking.records import Records
    from fusiontree.training.loop import Trainer
    from fusiontree.training.observers import HealthMonitor, PeerWatch, StepLog
    from fusiontree.training.settings import RunSettings
    from fusiontree.utils.device import peak_flops

    settings = RunSettings(
        config=config,
        values=config_values(config),
        flops_per_token=lambda lengths: training_flops_per_token(config.model, lengths),
        peak_flops=peak_flops(layout.device, config.training.precision),
        extra_files=tokenizer_files,
        initial=initial,
    )
    teacher = add_teacher(config, layout, engine, train_data)
    records = Records(settings.run_dir, enabled=layout.is_main)
    watchdog = Watchdog(settings.run_dir, engine.rank, engine.world_size, flight_record=flight_record)
    console = Console(config.training.max_steps, enabled=layout.is_main, backends=chosen_backends)
    engine.checkpointing.announce = lambda line: console.say(f"recompute  {line}")
    if layout.is_main:
        for line in start_summary(config, train_data, layout, teacher):
            console.say(line)
    observers = [
        StepLog(engine, settings, records, watchdog, console),
        HealthMonitor(engine, settings, records, watchdog),
        PeerWatch(engine, watchdog),
        *task_evaluation(settings, engine, records, watchdog, console),
    ]
    saver = Saver(settings.run_dir / "checkpoints", config.checkpoint, layout.checkpoint_group, lock.lost_reason)
    return Trainer(settings, engine, train_data, validation_data, saver, records, watchdog, console, observers)


if __name__ == "__main__":
    sys.exit(main())
