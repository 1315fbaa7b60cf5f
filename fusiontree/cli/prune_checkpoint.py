"""Writes a smaller model from a trained one, as the first checkpoint of a new run.

fusiontree checkpoint prune RUN NEW --target 0.7
fusiontree checkpoint prune RUN NEW --target 0.7 --of decode --seq-len 32768
fusiontree checkpoint prune RUN NEW --target 0.7 --random 1
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.cli.analyze_checkpoint import add_measurement_options, measured
from fusiontree.cli.program import run_program
from fusiontree.data.format import ShardDamage
from fusiontree.tracking.console import report_bytes
from fusiontree.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontree.convert.dcp import TrainingCheckpoint
    from fusiontree.convert.formats import Options
    from fusiontree.models.config import ModelConfig
    from fusiontree.pruning.analysis import Analysis
    from fusiontree.pruning.shapes import KeptLayer
    from fusiontree.pruning.weights import PrunedWeights


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Prune a model: measure its parts as 'checkpoint analyze' does, remove the cheapest, and write "
        "what is left as a new run at step 0. Layers whose branch is removed become M or A.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("path", type=Path, metavar="RUN", help="run folder (its newest checkpoint) or checkpoint folder")
    add("target_path", type=Path, metavar="NEW", help="new run folder")
    add("--target", type=float, required=True, metavar="SHARE", help="wanted share of the cost, such as 0.7")
    add(
        "--of",
        choices=["parameters", "flops", "decode"],
        default="parameters",
        help="the cost: parameters (default), FLOPs per token, or bytes that decoding reads per token",
    )
    add("--tp", type=int, metavar="N", help="tensor parallel size to allow (default: the run's parallel.tp)")
    add("--random", type=int, metavar="SEED", help="keep random parts of the same sizes: a baseline")
    add("--dry-run", action="store_true", help="show the plan, write nothing")
    add_measurement_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0 done and verified, 2 user error or damaged checkpoint."""
    return run_program(
        build_parser, command, argv, errors=(UserError, ShardDamage), interrupted="interrupted; nothing was kept"
    )


def command(args: argparse.Namespace) -> int:
    """Measure, plan and write; return the exit code of :func:`main`.

    Raises:
        UserError: the checkpoint, the dataset or an option is wrong, or the target is out of reach.
    """
    from fusiontree.checkpoint.load import find_checkpoint
    from fusiontree.convert.dcp import TrainingCheckpoint
    from fusiontree.convert.formats import FORMATS, check_target
    from fusiontree.pruning.plan import check_share, random_plan

    check_share(args.target)
    check_target(args.target_path, FORMATS["dcp"])
    folder = find_checkpoint(args.path)
    source = TrainingCheckpoint(folder)
    if not {"training", "data"} <= source.config.keys():
        raise UserError(f"{folder} does not say how it was trained; convert it with --config FILE and prune the result")
    length = args.seq_len or source.config["training"]["seq_len"]
    tp = args.tp or source.config.get("parallel", {}).get("tp") or 1
    analysis, config = measured(args, folder)
    plan = planned(args, analysis, config, tp, length)
    if args.random is not None:
        plan = random_plan(config, plan, args.random)
    print(f"loss of {folder} on {args.rows} held-out rows: {analysis.loss:.4f} nats per token")
    print(costs_table(config, plan, length))
    print(layers_table(config, plan))
    if args.dry_run:
        print("dry run: nothing was written")
        return 0
    record = {"target": args.target, "of": args.of, "random": args.random, "tp": tp}
    write_run(source, plan, analysis, args.target_path, record)
    print(
        f"{args.target_path} is complete, a run at step 0. Heal it: fusiontree train --config "
        f"{args.target_path / 'config.yaml'} training.teacher={args.path} training.max_steps=N"
    )
    return 0


def write_run(
    source: TrainingCheckpoint, plan: list[KeptLayer], analysis: Analysis, target: Path, record: dict[str, Any]
) -> None:
    """Write what ``plan`` keeps of ``source`` as a run at step 0, with ``record`` and the analysis in ``pruned.json``.

    Raises:
        UserError: the pruned model's configuration describes no run, or the target cannot be written.
    """
    from fusiontree.convert.formats import FORMATS, convert

    pruned = pruned_weights(source, plan, analysis)
    options = new_run(target, pruned.config)
    pruned.config = options.config or pruned.config
    say = functools.partial(print, flush=True)
    convert(pruned, target, FORMATS["dcp"], options, report_bytes(say, "read and written", every_s=5), say)
    values = {"source": str(source.folder), **record, "analysis": analysis.values()}
    (target / "pruned.json").write_text(json.dumps(values) + "\n")


def planned(args: argparse.Namespace, analysis: Analysis, config: ModelConfig, tp: int, length: int) -> list[KeptLayer]:
    """Return what to keep."""
    from fusiontree.pruning.costs import Costs
    from fusiontree.pruning.plan import make_plan

    return make_plan(config, analysis.parts, Costs(config, args.of, length), args.target, tp)


def pruned_weights(source: Any, plan: list[KeptLayer], analysis: Analysis) -> PrunedWeights:
    """Return the weights that the plan keeps."""
    from fusiontree.pruning.statistics import norm_scale
    from fusiontree.pruning.weights import PrunedWeights

    config = source.model_config
    scales = {
        kept.layer: norm_scale(config.of_layer(kept.layer), analysis.statistics[kept.layer], kept.units["mamba"])
        for kept in plan
        if "mamba2" in kept.branches
    }
    return PrunedWeights(source, plan, scales)


def new_run(target: Path, values: dict[str, Any]) -> Options:
    """Return the options of a conversion that writes a run folder with this configuration.

    Raises:
        UserError: the configuration describes no run.
    """
    from fusiontree.config.load import build_config, config_values, dump_config
    from fusiontree.convert.formats import Options

    config = build_config({**values, "run_dir": str(target)}, "the pruned model's configuration")
    return Options(config=config_values(config), config_yaml=dump_config(config))


def costs_table(config: ModelConfig, plan: list[KeptLayer], length: int) -> str:
    """Return every cost before and after."""
    from fusiontree.pruning.costs import MEASURES, Costs
    from fusiontree.pruning.shapes import everything

    lines = []
    for measure in MEASURES:
        costs = Costs(config, measure, length)
        before, after = costs.total(everything(config)), costs.total(plan)
        unit = {"parameters": "", "flops": " per token", "decode": " bytes per token"}[measure]
        lines.append(f"{measure:10} {before:,.0f} -> {after:,.0f}{unit} ({after / before:.3f})")
    return "\n".join(lines)


def layers_table(config: ModelConfig, plan: list[KeptLayer]) -> str:
    """Return a line per kept layer with its sizes."""
    from fusiontree.pruning.shapes import layer_sizes, pruned_config

    pattern = pruned_config(config, plan).pattern
    lines = [f"{len(plan)} of {config.num_layers} layers, layer_pattern {pattern}"]
    for letter, kept in zip(pattern, plan, strict=True):
        sizes = ", ".join(f"{name} {size}" for name, size in layer_sizes(config, kept).items())
        lines.append(f"  {letter} from layer {kept.layer}: {' + '.join(kept.branches)}; {sizes}")
    return "\n".join(lines)
