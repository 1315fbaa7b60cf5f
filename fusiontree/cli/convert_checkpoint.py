"""Converts between checkpoint formats; reads every result back and compares it before the target appears.

fusiontree checkpoint convert RUN DST --to hf
fusiontree checkpoint convert HF_FOLDER NEW_RUN --to dcp --config quickstart
fusiontree checkpoint convert MAMBA2_FOLDER NEW_RUN --to dcp --map mamba2 --config FILE
fusiontree checkpoint convert --list
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusiontree.cli.program import run_program
from fusiontree.config.packaged import find_file, hint_for, packaged_names
from fusiontree.tracking.console import report_bytes
from fusiontree.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontree.convert.formats import Options
    from fusiontree.convert.reader import CheckpointSource
    from fusiontree.models.config import ModelConfig


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Convert a checkpoint. The target is written under a temporary name, read back, compared tensor by "
        "tensor with the source, and only then renamed; memory stays near the largest tensor.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("source", nargs="?", type=Path, metavar="SRC", help="checkpoint to read")
    add("target", nargs="?", type=Path, metavar="DST", help="new folder or file")
    add("--to", metavar="FORMAT", help="format of DST; see --list")
    add("--from", dest="source_format", metavar="FORMAT", help="format of SRC (default: recognized from its files)")
    add(
        "--dtype", choices=["fp32", "bf16"], help="type of exported weights (default: as in SRC); A, D and dt stay fp32"
    )
    add(
        "--max-shard-size", default="5GB", metavar="SIZE", help="hf: size of a weight file, such as 500MB (default 5GB)"
    )
    add(
        "--check-logits",
        choices=["auto", "on", "off"],
        default="auto",
        help="hf and --map: compare logits with transformers, which loads both models (auto: models up to 4 GB, and "
        "maps that state 'exact')",
    )
    add("--tp", type=int, default=1, metavar="N", help="megatron, zero: tensor parallel size (default 1)")
    add("--dp", type=int, default=1, metavar="N", help="zero: data parallel size, dp x cp (default 1)")
    add("--stage", type=int, default=3, choices=[1, 2, 3], help="zero: its stage (default 3)")
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="dcp: configuration of the new run; reading megatron or zero: configuration of the folder's model",
    )
    add(
        "--map",
        type=Path,
        metavar="FILE",
        help=f"start a run from another model's weights: a file, or one of {', '.join(packaged_names('maps'))}",
    )
    add("--dry-run", action="store_true", help="open and check SRC and show the result, write nothing")
    add("--list", action="store_true", help="list the formats and exit")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0 done and verified, 2 user error or damaged source."""
    return run_program(build_parser, command, argv, interrupted="interrupted; nothing was kept")


def command(args: argparse.Namespace) -> int:
    """List the formats or convert; return the exit code of :func:`main`.

    Raises:
        UserError: an option is wrong, or the source is damaged.
    """
    if args.list:
        from fusiontree.convert.formats import FORMATS

        for form in FORMATS.values():
            print(f"{form.name:12} {form.description} (read and written)")
    elif args.source is None or args.target is None or args.to is None:
        raise UserError("give SRC DST --to FORMAT; --list shows the formats, --help everything")
    else:
        run(args)
    return 0


def run(args: argparse.Namespace) -> None:
    """Convert a checkpoint.

    Raises:
        UserError: an option or the source is wrong, or the result reads back different.
        CheckpointDamage: a file of the source differs from its recorded hash.
    """
    from fusiontree.convert.formats import Stream, check_target, check_tp, convert, format_named, target_dtype

    form = format_named(args.to, "--to")
    options = read_options(args)
    dtype = target_dtype(form, options)
    check_target(args.target, form)
    if args.map:
        origin, source, options = mapped(args, options)
    else:
        origin, source = open_named(args, options)
    check_tp(source, form, options)
    parameters = [entry for name, entry in source.entries.items() if name.startswith("model.")]
    size = form.written_bytes(Stream(source, dtype, lambda done, total: None))
    print(
        f"{args.source} ({origin}): {sum(math.prod(entry.shape) for entry in parameters):,} parameters in "
        f"{len(parameters)} tensors, {size_text(sum(entry.nbytes for entry in parameters))}"
        f"{', optimizer state' if source.has_optimizer else ''}; {args.target} ({form.name}) will take about "
        f"{size_text(size)}",
        flush=True,
    )
    if form.name == "dcp" and options.config is None and not re.fullmatch(r"step-\d{8}", args.target.name):
        options = with_run_config(source, args.target, options)
    if form.is_training and not source.has_optimizer:
        print(f"{args.source} holds no optimizer state: training goes on from states of zeros, at step 0")
    if args.dry_run:
        print("dry run: nothing was written")
        return
    began = time.monotonic()
    say = functools.partial(print, flush=True)
    verdict = convert(source, args.target, form, options, report_bytes(say, "read and written", every_s=5), say)
    print(f"verified: {len(verdict.hashes)} tensors read back from {args.target} equal those written (SHA-256)")
    if verdict.logits:
        print(verdict.logits)
    print(f"{args.target} is complete; {time.monotonic() - began:.1f} s")
    if form.has_code:
        print(f"load: AutoModelForCausalLM.from_pretrained('{args.target}', trust_remote_code=True)")


def read_options(args: argparse.Namespace) -> Options:
    """Return the options of the target.

    Raises:
        UserError: a size is invalid, or the configuration cannot be read.
    """
    from fusiontree.convert.formats import Options

    for name in ("tp", "dp"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    return Options(
        dtype=args.dtype,
        max_shard_bytes=parse_size(args.max_shard_size),
        tp=args.tp,
        dp=args.dp,
        stage=args.stage,
        check_logits=args.check_logits,
        **read_config(args),
    )


def open_named(args: argparse.Namespace, options: Options) -> tuple[str, CheckpointSource]:
    """Return the source as a checkpoint of one of the formats, and the format's name."""
    from fusiontree.convert.formats import open_source

    form, source = open_source(args.source, args.source_format, options)
    if args.config and args.to != "dcp" and not form.is_tensor_parallel:
        raise UserError(f"--config has no meaning from {form.name} to {args.to}; leave it out")
    return form.name, source


def mapped(args: argparse.Namespace, options: Options) -> tuple[str, CheckpointSource, Options]:
    """Return the source's weights, renamed by a map, and options with the settings that are taken from the source.

    Raises:
        UserError: the map does not match, no configuration describes the new model, or the source's configuration
            describes another model.
    """
    from fusiontree.convert.foreign import agree, read_foreign
    from fusiontree.convert.name_map import in_layers, read_map
    from fusiontree.convert.warm_start import MappedWeights

    if args.to != "dcp" or options.config is None or args.source_format:
        raise UserError("--map starts a new run: give --to dcp and --config FILE with it, and no --from")
    file = find_file(args.map, "maps")
    if not file.exists():
        raise UserError(f"map '{file}' does not exist{hint_for(file, 'maps')}")
    name_map = read_map(file)
    agreement = None
    foreign = read_foreign(args.source)
    if foreign is None:
        print(f"no config.json beside {args.source}: rope_theta, norms and sizes of heads are not compared with theirs")
    else:
        model, explicit = read_model(args.config)
        agreement = agree(foreign, model, explicit, name_map.targets, name_map.accept)
        options = with_settings(args, options, agreement.adopted)
        for name, value in agreement.adopted.items():
            print(f"model.{name} is {value}, as in {foreign.file}")
        for difference in agreement.differences:
            print(f"different from the source, as the map accepts: {difference}")
    assert options.config is not None
    seed = options.config["training"]["seed"]
    source = MappedWeights(args.source, name_map, options.config, seed, foreign, agreement)
    initial = source.initial
    rest = len(source.entries) - len(source.filled) - len(initial)
    print(f"{len(source.filled)} parameters come from {args.source}; {rest} are zeros or identities, as the map says")
    if initial:
        print(
            f"{len(initial)} parameters are not in the source and keep initial values, which are random for matrices "
            f"(seed {seed}): {', '.join(in_layers(initial))}"
        )
    return f"by {args.map}", source, options


def read_model(path: Path) -> tuple[ModelConfig, set[str]]:
    """Return the section ``model`` of a configuration file, and the settings that the file names, dotted."""
    from fusiontree.config.load import load_config

    model = load_config(path, ["run_dir=unused"]).model
    sections = {"mamba": model.mamba, **{f"mixers.{name}": section for name, section in (model.mixers or {}).items()}}
    dotted = (f"{place}.{name}" for place, section in sections.items() for name in section.model_fields_set)
    return model, model.model_fields_set | set(dotted)


def with_settings(args: argparse.Namespace, options: Options, adopted: dict[str, Any]) -> Options:
    """Return the options with settings of the section ``model`` replaced.

    Raises:
        UserError: the configuration does not allow a value.
    """
    from dataclasses import replace

    from fusiontree.config.load import apply_overrides, build_config, config_values, dump_config

    if not adopted:
        return options
    assert options.config is not None
    overrides = [f"model.{name}={json.dumps(value)}" for name, value in adopted.items()]
    place = f"{args.config} with the settings of {args.source} ({', '.join(adopted)})"
    config = build_config(apply_overrides(options.config, overrides), place)
    return replace(options, config=config_values(config), config_yaml=dump_config(config))


def read_config(args: argparse.Namespace) -> dict:
    """Return the options that ``--config`` sets."""
    if args.config is None:
        return {}
    from fusiontree.config.load import config_values, dump_config, load_config

    config = load_config(args.config, [f"run_dir={args.target}"])
    return {"config": config_values(config), "config_yaml": dump_config(config)}


def with_run_config(source: CheckpointSource, target: Path, options: Options) -> Options:
    """Return the options with the new run folder's configuration, if the source has a full configuration."""
    from dataclasses import replace

    from fusiontree.config.load import build_config, dump_config

    if {"training", "data"} <= source.config.keys():
        try:
            config = build_config({**source.config, "run_dir": str(target)}, "the source's configuration")
            return replace(options, config_yaml=dump_config(config))
        except UserError as error:
            print(f"{target} gets no config.yaml: {error}")
            return options
    print(f"the source does not say how it was trained: to train on from {target}, convert with --config FILE")
    return options


def parse_size(text: str) -> int:
    """Return bytes from a number with KB, MB or GB.

    Raises:
        UserError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not match or float(match.group(1)) <= 0:
        raise UserError(f"--max-shard-size '{text}' is no size; write for example 500MB or 5GB")
    return max(1, int(float(match.group(1)) * 1000 ** " KMG".index(match.group(2).upper() or " ")))


def size_text(size: float) -> str:
    """Return a number of bytes in a suitable unit."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB")):
        if size >= limit:
            return f"{size / limit:.2f} {unit}"
    return f"{size / 1e3:.1f} kB"
