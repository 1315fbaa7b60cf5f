"""The one training entry: ``python -m fusiontree.train --config FILE [section.key=value …]``.

torchrun, deepspeed, srun and plain python all reach it; which process this is comes from their environment variables.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from pathlib import Path

from fusiontree.cli.program import run_program
from fusiontree.config.load import config_values, dump_config, load_config
from fusiontree.config.root import Config
from fusiontree.parallel.validate import check_layout
from fusiontree.supervision.signals import STOP_SIGNALS, leave_when_warned
from fusiontree.training.run_folder import check_run_folder
from fusiontree.utils.environment import keep_flight_record, process_place
from fusiontree.utils.errors import UserError

log = logging.getLogger("fusiontree")


class _Help(argparse.Action):
    """Prints the usage and, below it, every setting with its default and meaning."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from fusiontree.config.describe import describe_settings

        print(parser.format_help() + "\nsettings:\n" + describe_settings())
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of the training entry."""
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
        help="for a check: the processes that the run will have (default: there are)",
    )
    parser.add_argument("--print-run-dir", action="store_true", help="check all but the data, print run_dir and exit")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the entry and return the exit code.

    0 the run reached its end (or ``exit_at_step``); 75 it saved and stopped on a signal, start it again to go on;
    2 something the user gave is wrong.
    """
    return run_program(build_parser, run, argv)


def run(args: argparse.Namespace) -> int:
    """Check, print or train as asked; return the exit code of :func:`main`.

    Raises:
        UserError: something the user gave is wrong.
    """
    place = process_place()
    logging.basicConfig(
        level=logging.INFO if place.is_main else logging.WARNING, format="%(message)s", stream=sys.stdout
    )
    config = load_config(args.config, args.overrides)
    if args.print_config:
        print(dump_config(config), end="")
        return 0
    check_layout(config.model, config.parallel, config.training, args.world_size or place.world_size)
    check_run_folder(Path(config.run_dir), config_values(config))
    if args.print_run_dir:
        print(config.run_dir)
        return 0
    if args.check:
        check_data(config)
        print(f"ok: {args.config}, run_dir {config.run_dir}")
        return 0
    leave_when_warned(75)
    return train(config)


def check_data(config: Config) -> None:
    """Open the datasets as training would.

    Raises:
        UserError: one is missing, empty, or made with another tokenizer than the model's vocabulary allows.
    """
    from fusiontree.data.loader import TrainingData

    TrainingData.for_training(config.data, config.training, config.model.vocab_size)


def train(config: Config) -> int:
    """Build layout, engine and data as configured, and train; return the exit code of :func:`main`.

    Raises:
        UserError: the configuration asks for what is not there (a GPU, a dataset, a backend).
    """
    # Reading a configuration needs no torch; training does.
    from fusiontree.checkpoint.saver import Saver
    from fusiontree.data.loader import TrainingData, ValidationData
    from fusiontree.engines.build import build_engine
    from fusiontree.models.flops import training_flops_per_token
    from fusiontree.parallel.layout import Layout
    from fusiontree.supervision.restart_policy import wait_or_refuse
    from fusiontree.supervision.run_lock import RunLock
    from fusiontree.training.loop import Outcome, Trainer
    from fusiontree.training.run_folder import write_config
    from fusiontree.training.settings import RunSettings
    from fusiontree.utils.hardware import peak_flops

    model, training = config.model, config.training
    run_dir = Path(config.run_dir)
    wait_or_refuse(run_dir, config.supervision)
    keep_flight_record()
    parallel = config.parallel
    with Layout(training.device, tp=parallel.tp, cp=parallel.cp, shard_size=parallel.shard_size) as layout:
        train_data = TrainingData.for_training(config.data, training, model.vocab_size, layout.dp_rank, layout.dp_size)
        validation_data = None
        if config.data.validation and training.validation.interval:
            validation_data = ValidationData(
                config.data,
                seq_len=training.seq_len,
                micro_batch_size=training.micro_batch_size,
                max_rows=training.validation.rows,
                vocab_size=model.vocab_size,
                dp_rank=layout.dp_rank,
                dp_size=layout.dp_size,
                training=train_data.sources,
            )
        tokenizer_files: list[Path] = []
        lease = RunLock(run_dir, say=log.warning)
        refusal = ""
        if layout.is_main:
            try:
                lease.acquire()
            except UserError as error:
                refusal = str(error)
        if refusal := layout.gather_text(refusal)[0]:
            raise UserError(refusal)
        if layout.is_main:
            write_config(run_dir, dump_config(config))
            tokenizer_files = train_data.save_tokenizer(run_dir)
        layout.barrier()
        engine = build_engine(config.model, config.parallel, training, layout)
        settings = RunSettings.of(
            run_dir=run_dir,
            model=model,
            training=training,
            supervision=config.supervision,
            checkpoint=config.checkpoint,
            logging=config.logging,
            values=config_values(config),
            flops_per_token=lambda lengths: training_flops_per_token(model, lengths),
            peak_flops=peak_flops(layout.device, training.precision),
            extra_files=tokenizer_files,
        )
        saver = Saver(run_dir / "checkpoints", config.checkpoint, layout.checkpoint_group, lease.refusal)
        try:
            outcome = Trainer(settings, engine, train_data, validation_data, saver).run()
        finally:
            if layout.is_main:
                lease.release()
        if outcome is Outcome.INTERRUPTED:
            # The first rank to leave makes srun end the others with SIGTERM, and launchers repeat the signal that they
            # pass on; all ranks are to leave with their own code.
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            layout.barrier()
    return 75 if outcome is Outcome.INTERRUPTED else 0


if __name__ == "__main__":
    sys.exit(main())
