"""Is a pruned and healed model ahead of its baselines? One command trains, prunes, heals and prints one table.

    python -m tools.compare_pruning --data DATASET --out DIR                  # one GPU, about eight minutes
    python -m tools.compare_pruning --source RUN --out DIR                    # of a trained model

Trains a model on ``DATASET/train``, measures its parts on held-out rows, and writes the plan's model and one with
random parts of the same sizes. Both are healed with the first model as teacher; a model of their shape is trained from
scratch on the same tokens. Losses are of held-out rows that the measurement of the parts did not see. The table goes to
DIR/table.md, its figures to DIR/results.json; the runs are below DIR.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # called by its path, from any folder
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fusiontree.cli.analyze_checkpoint import add_measurement_options, measured
from fusiontree.cli.program import run_program
from fusiontree.cli.prune_checkpoint import costs_table, layers_table, planned, write_run
from fusiontree.config.load import config_values, load_config
from fusiontree.data.format import ShardDamage
from fusiontree.utils.device import choose_device, choose_dtype
from fusiontree.utils.errors import UserError
from fusiontree.utils.files import write_json

if TYPE_CHECKING:
    from fusiontree.data.batch import MicroBatch
    from fusiontree.models.model import FusionTreeModel
    from fusiontree.pruning.statistics import Batches

DECODED_TOKENS = 512
"""Tokens of one text that are decoded; the rate is of the second half, after the recording of CUDA graphs."""
HEALED = ("pruned", "random")
"""Runs that start from weights of the source."""


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="new folder of the runs and the table")
    add("--source", type=Path, metavar="RUN", help="finished run to prune, instead of training one")
    add("--config", default="bench/hybrid_50m_8k", metavar="FILE", help="configuration of the model to train")
    add("--steps", type=int, default=1000, metavar="N", help="its training steps (default 1000)")
    add("--learning-rate", default="1.2e-3", metavar="R", help="its rate, and that of the model from scratch")
    add("--share", type=float, default=0.1, metavar="S", help="share of the source's steps that heals (default 0.1)")
    add("--healing-rate", default="6e-4", metavar="R", help="learning rate of healing (default 6e-4)")
    add("--heal", nargs="*", default=[], metavar="section.key=value", help="more settings of healing")
    add("--set", nargs="*", default=[], metavar="section.key=value", help="more settings of every training")
    add("--target", type=float, default=0.7, metavar="SHARE", help="share of the cost to keep (default 0.7)")
    add("--of", choices=["parameters", "flops", "decode"], default="parameters", help="the cost")
    add("--seed", type=int, default=1, metavar="N", help="of the random parts (default 1)")
    add("--loss-rows", type=int, default=48, metavar="N", help="held-out rows of the losses (default 48)")
    add_measurement_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit code: 0 done, 2 user error or damaged data."""
    return run_program(build_parser, command, argv, errors=(UserError, ShardDamage))


def command(args: argparse.Namespace) -> int:
    """Train, prune, heal and print; return the exit code of :func:`main`.

    Raises:
        UserError: an option is wrong, or a training failed.
    """
    from fusiontree.pruning.plan import check_share

    check_share(args.target)
    if args.out.exists():
        raise UserError(f"--out {args.out} exists; give a new folder")
    if (args.source is None) == (args.data is None):
        raise UserError("give either --data, a folder with the datasets train and validation, or --source, a run")
    args.out.mkdir(parents=True)
    began, source = time.monotonic(), args.source
    if source is None:
        data, source = Path(args.data), args.out / "source"
        paths = [f"data.train={data / 'train'}", f"data.validation={data / 'validation'}"]
        train(args, source, args.config, args.steps, args.learning_rate, paths)
        args.data = None  # the run names its held-out rows
    settings = trained_settings(source)
    steps = max(1, round(args.share * settings["max_steps"]))
    folders = prune(args, source)
    results = {"source": figures(args, source, settings["max_steps"], settings)}
    results |= {f"{name}, before healing": figures(args, folders[name], 0, settings) for name in HEALED}
    for name in HEALED:
        teacher = [f"training.teacher={source}", *args.heal]
        train(args, folders[name], str(folders[name] / "config.yaml"), steps, args.healing_rate, teacher)
    scratch = args.out / "scratch"
    alone = ["training.teacher=null"]  # which the healed run's configuration has by now
    train(args, scratch, str(folders["pruned"] / "config.yaml"), steps, args.learning_rate, alone)
    results |= {f"{name}, healed": figures(args, folders[name], steps, settings) for name in HEALED}
    results["from scratch"] = figures(args, scratch, steps, settings)
    ahead = results["pruned, healed"]["loss"] < min(results[n]["loss"] for n in ("random, healed", "from scratch"))
    write_json(
        args.out / "results.json",
        {"models": results, "pruned_is_ahead": ahead, "device": device_name(args), "seconds": time.monotonic() - began},
    )
    text = table(results)
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{device_name(args)}, {time.monotonic() - began:.0f} s in all")
    print(f"the pruned and healed model is {'ahead of' if ahead else 'not ahead of'} both baselines of its size")
    return 0


def train(args: argparse.Namespace, run: Path, config: str, steps: int, rate: str, more: Sequence[str]) -> None:
    """Train in a process of its own: its memory is free afterwards.

    Raises:
        UserError: it failed; its output names the cause.
    """
    settings = [
        f"run_dir={run}",
        f"training.max_steps={steps}",
        f"training.learning_rate={rate}",
        f"training.warmup_steps={min(100, -(-steps // 10))}",
        "training.min_lr_ratio=0.1",
        "training.validation.interval=0",
        "checkpoint.save_interval=0",
        f"training.device={args.device}",
        *more,
        *args.set,
    ]
    print(f"training {run} for {steps} steps", flush=True)
    log = args.out / f"{run.name}.log"
    with open(log, "w", encoding="utf-8") as output:
        words = [sys.executable, "-m", "fusiontree.train", "--config", config, *settings]
        code = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        last = log.read_text(encoding="utf-8").strip().rpartition("\n")[2]
        raise UserError(f"the training of {run} ended with code {code}; see {log}. Its last line: {last}")


def trained_settings(run: Path) -> dict[str, Any]:
    """Return the ``training`` section of a run."""
    return config_values(load_config(str(run / "config.yaml")))["training"]


def prune(args: argparse.Namespace, source: Path) -> dict[str, Path]:
    """Measure the source's parts once, and write the plan's model and one with random parts of the same sizes."""
    from fusiontree.convert.dcp import TrainingCheckpoint
    from fusiontree.pruning.pictures import plot_analysis
    from fusiontree.pruning.plan import random_plan

    checkpoint = TrainingCheckpoint(source)
    training, parallel = checkpoint.config["training"], checkpoint.config["parallel"]
    length = args.seq_len or training["seq_len"]
    print(f"measuring the parts of {checkpoint.folder}", flush=True)
    analysis, config = measured(args, checkpoint.folder)
    plot_analysis(analysis, args.out / "parts.png")
    plan = planned(args, analysis, config, parallel["tp"] or 1, length)
    print(costs_table(config, plan, length))
    print(layers_table(config, plan), flush=True)
    kept = {"pruned": plan, "random": random_plan(config, plan, args.seed)}
    for name, seed in zip(HEALED, (None, args.seed), strict=True):
        record = {"target": args.target, "of": args.of, "random": seed, "tp": parallel["tp"]}
        write_run(checkpoint, kept[name], analysis, args.out / name, record)
    return {name: args.out / name for name in HEALED}


def figures(args: argparse.Namespace, run: Path, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Return parameters, tokens, held-out loss in nats and decoding speed of a run's newest checkpoint.

    Args:
        args: of the command line.
        run: the run.
        steps: for which it was trained.
        settings: the ``training`` section of the source.
    """
    import torch

    from fusiontree.checkpoint.load import find_checkpoint, load_model
    from fusiontree.pruning.run import open_held_out
    from fusiontree.pruning.statistics import mean_loss

    device, folder = choose_device(args.device), find_checkpoint(run)
    model, resolved = load_model(folder, device, choose_dtype(args.dtype, device))
    length, rows = args.seq_len or settings["seq_len"], args.rows + args.loss_rows
    vocabulary = model.config.vocab_size
    batches = list(open_held_out(folder, resolved, args.data, rows, args.batch_size, length, vocabulary)())
    unseen = batches[-(-args.rows // args.batch_size) :]  # by the measurement of the parts
    if not unseen:
        raise UserError(f"the held-out dataset has at most --rows {args.rows} rows of {length} tokens; lower --rows")
    found = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": steps * settings["global_batch_size"] * settings["seq_len"],
        "loss": mean_loss(model, held_out(unseen)),
        "decoded_per_s": decoding_speed(model, unseen[0].input_ids_BS[0].tolist()),
    }
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def held_out(batches: list[MicroBatch]) -> Batches:
    """Return a function that reads the batches."""
    return lambda: iter(batches)


def decoding_speed(model: FusionTreeModel, row: list[int]) -> float:
    """Return the tokens per second of one text that goes on after half of ``row``."""
    from fusiontree.generation.decoding import generate

    prompt, times = row[: max(1, len(row) // 2)], []
    tokens = min(DECODED_TOKENS, model.config.max_position_embeddings - len(prompt))
    generate(model, [prompt], max_new_tokens=tokens, on_token=lambda token: times.append(time.perf_counter()))
    half = len(times) // 2
    return (len(times) - 1 - half) / (times[-1] - times[half])


def device_name(args: argparse.Namespace) -> str:
    """Return the name of the device."""
    import torch

    device = choose_device(args.device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a table in Markdown."""
    lines = [
        "| model | parameters | trained on tokens | held-out loss (nats) | tokens/s decoding |",
        "|---|---|---|---|---|",
    ]
    for name, found in results.items():
        cells = [f"{found['parameters']:,}", f"{found['tokens']:,}", f"{found['loss']:.4f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {found['decoded_per_s']:,.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
