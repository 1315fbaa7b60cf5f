"""The table of formats, and the conversion: write to a temporary path, read back, compare, rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fusiontree.checkpoint.folders import MANIFEST, complete_checkpoints
from fusiontree.convert import dcp, hf, logits, megatron, safetensors_file, zero, zero_write
from fusiontree.convert.reader import MODEL, CheckpointSource, Stream, checked
from fusiontree.models.config import ModelConfig
from fusiontree.parallel.validate import tp_problems, valid_tp
from fusiontree.utils.errors import UserError, nearest, nearest_file
from fusiontree.utils.files import fsync_directory


@dataclass(frozen=True)
class Options:
    """Options of the target."""

    dtype: str | None = None
    """fp32 | bf16: type of the weights; None keeps the source's, and makes training checkpoints fp32."""
    max_shard_bytes: int = 5 << 30
    config: dict[str, Any] | None = None
    """Full configuration of the run for a training checkpoint; None keeps the source's configuration."""
    config_yaml: str | None = None
    """``config`` as YAML text."""
    tp: int = 1
    """megatron, zero: tensor parallel size of the target."""
    dp: int = 1
    """zero: data parallel size."""
    stage: int = 3
    """zero: 1 | 2 | 3."""
    check_logits: str = "auto"
    """hf, and weights by a map: on | off | auto; auto compares logits only if the model is small enough."""


@dataclass(frozen=True)
class Verdict:
    """Result of verifying a conversion."""

    hashes: dict[str, str]
    """SHA-256 of every tensor of the target; all were read back and compared."""
    logits: str | None
    """Result of comparing logits, or the reason for not comparing them; None for formats without code."""


@dataclass(frozen=True)
class Format:
    """One kind of checkpoint; the only place that knows what distinguishes the formats."""

    name: str
    description: str
    """One line for ``--list``."""
    looks_like: Callable[[Path], bool]
    """Returns True if a path holds this format, judged by file names."""
    open: Callable[[Path, Options], CheckpointSource]
    write: Callable[[Path, Stream, Options, str], None]
    """Writes to a temporary path, given the target's name."""
    written_bytes: Callable[[Stream], int]
    """Estimates the bytes that ``write`` will write."""
    is_file: bool = False
    is_training: bool = False
    """Training continues from this format: weights are fp32, and a source without moments gets zero moments."""
    is_tensor_parallel: bool = False
    """Files are split for ``--tp`` and do not name their model: reading may need ``--config``."""
    has_code: bool = False
    """The target contains the model's code, whose logits are compared."""


def _is_dcp(path: Path) -> bool:
    return (path / MANIFEST).is_file() or any(complete_checkpoints(p) for p in (path / "checkpoints", path))


def _weight_bytes(stream: Stream) -> int:
    return sum(stream.entry(name).nbytes for name in stream.source.entries if name.startswith(MODEL))


FORMATS = {
    form.name: form
    for form in (
        Format(
            "dcp",
            "FusionTree training checkpoint: a run folder (its newest checkpoint) or RUN/checkpoints/step-XXXXXXXX",
            _is_dcp,
            lambda path, options: dcp.TrainingCheckpoint(path),
            lambda path, stream, options, name: dcp.write(path, stream, config_yaml=options.config_yaml, name=name),
            lambda stream: stream.total if stream.source.has_optimizer else 3 * _weight_bytes(stream),
            is_training=True,
        ),
        Format(
            "hf",
            "Hugging Face folder: sharded safetensors, tokenizer, code for trust_remote_code=True",
            lambda path: (path / hf.CONFIG).is_file() and any(path.glob("*.safetensors")),
            lambda path, options: hf.HuggingFaceFolder(path),
            lambda path, stream, options, name: hf.write(path, stream, max_shard_bytes=options.max_shard_bytes),
            _weight_bytes,
            has_code=True,
        ),
        Format(
            "safetensors",
            "one file of weights under FusionTree's parameter names, in fp32 or bf16",
            lambda path: path.is_file() and path.suffix == ".safetensors",
            lambda path, options: safetensors_file.WeightFile(path),
            lambda path, stream, options, name: safetensors_file.write_weights(path, stream),
            _weight_bytes,
            is_file=True,
        ),
        Format(
            "megatron",
            "distributed checkpoint of Megatron-core (torch_dist), split for --tp, with moments",
            megatron.is_megatron,
            lambda path, options: megatron.MegatronFolder(path, options.config),
            lambda path, stream, options, name: megatron.write(path, stream, tp=options.tp),
            lambda stream: stream.total,
            is_tensor_parallel=True,
        ),
        Format(
            "zero",
            "folder of DeepSpeed's save_checkpoint, ZeRO-1, 2 or 3 (--stage), for --dp and --tp, with moments",
            zero.is_zero,
            lambda path, options: zero.ZeroFolder(path, options.config),
            lambda path, stream, options, name: zero_write.write(
                path, stream, stage=options.stage, dp=options.dp, tp=options.tp
            ),
            lambda stream: 7 * _weight_bytes(stream),  # with the temporary files of the flat tensors
            is_training=True,
            is_tensor_parallel=True,
        ),
    )
}


def format_named(name: str, option: str) -> Format:
    """Return a format.

    Raises:
        UserError: there is no format of that name.
    """
    if name not in FORMATS:
        raise UserError(f"{option} '{name}' is none of the formats {', '.join(FORMATS)}{nearest(name, FORMATS)}")
    return FORMATS[name]


def recognise(path: Path) -> str:
    """Return the name of the format that a path holds.

    Raises:
        UserError: the path does not exist, or its format is unknown.
    """
    if not path.exists():
        raise UserError(f"source '{path}' does not exist{nearest_file(path)}")
    for name, form in FORMATS.items():
        if form.looks_like(path):
            return name
    held = sorted(p.name for p in path.iterdir())[:6] if path.is_dir() else [path.name]
    raise UserError(
        f"source '{path}' is no checkpoint of a known format (it holds {', '.join(held) or 'nothing'}); give "
        f"the folder or file that --list describes, or --map FILE for another model's weights"
    )


def open_source(path: Path, name: str | None, options: Options) -> tuple[Format, CheckpointSource]:
    """Open a checkpoint of the named format, or of the format recognized from its files.

    Raises:
        UserError: the checkpoint does not exist, or is of another format than named.
        CheckpointDamage: a file of the checkpoint is damaged.
    """
    if name is not None:
        wanted = format_named(name, "--from")
        seen = recognise(path)
        if seen != name and not wanted.looks_like(path):
            raise UserError(f"source '{path}' looks like {seen}, not like --from {name}; leave --from out")
        return wanted, wanted.open(path, options)
    form = FORMATS[recognise(path)]
    return form, form.open(path, options)


def check_target(target: Path, form: Format) -> None:
    """Check that the target does not exist and that its name fits the format.

    Raises:
        UserError: the target exists, or names a file for a folder format or a folder for a file format.
    """
    if target.exists():
        raise UserError(f"target '{target}' exists; nothing is ever written in place: name a new one or remove it")
    if form.is_file != (target.suffix == ".safetensors"):
        wanted = "a file name that ends in .safetensors" if form.is_file else "a folder, not a .safetensors file"
        raise UserError(f"target '{target}': --to {form.name} needs {wanted}")


def convert(
    source: CheckpointSource,
    target: Path,
    form: Format,
    options: Options,
    report: Callable[[int, int], None],
    say: Callable[[str], None] = lambda text: None,
) -> Verdict:
    """Write ``source`` as ``form`` to ``target``, which appears complete and verified, or not at all.

    Args:
        source: open checkpoint.
        target: path that does not exist yet; ``form`` and ``options`` describe it.
        report: called with the bytes done and the total bytes.
        say: called with a description of each long phase.

    Raises:
        UserError: the target exists, the disk has too little space, tensors read back differ from those written, or the
            target's logits differ from this project's model.
    """
    check_target(target, form)
    check_tp(source, form, options)
    if options.config is not None and form is FORMATS["dcp"]:
        wanted = ModelConfig.model_validate(options.config["model"])
        source.entries = checked(source.entries, wanted, "the source's weights and the --config given")
        source.config = options.config
    stream = Stream(source, target_dtype(form, options), report)
    compared = form.has_code or source.original is not None
    reason = logits.reason_to_skip(source, options.check_logits) if compared else None
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    needed, free = form.written_bytes(stream), shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(f"'{parent}' has {free / 1e9:.1f} GB free and the target needs {needed / 1e9:.1f} GB")
    partial = parent / f".partial-{target.name}"
    _remove(partial)
    try:
        if not form.is_file:
            partial.mkdir()
        form.write(partial, stream, options, target.name)
        say("reading it back")
        stream.check(form.open(partial, replace(options, config=source.config)))
        verdict = None if reason is None else f"logits were not compared: {reason}"
        if compared and reason is None:
            say("comparing logits")
            if source.original is not None:
                verdict = logits.compare_with_original(stream, source.original)
            else:
                verdict = logits.compare_logits(stream, partial)
        _rename(partial, target)
    except BaseException:
        _remove(partial)
        raise
    return Verdict(stream.hashes, verdict)


def check_tp(source: CheckpointSource, form: Format, options: Options) -> None:
    """Check that the model can be split for the tensor parallel size.

    Raises:
        UserError: the size does not fit; the message gives the reason and the valid sizes.
    """
    if not form.is_tensor_parallel:
        return
    model = source.model_config
    if reasons := list(tp_problems(model, options.tp)):
        fitting = valid_tp(model, limit=max(options.tp, 64))
        raise UserError(f"--tp {options.tp} does not fit the model: {'; '.join(reasons)}. It allows tp {fitting}")


def target_dtype(form: Format, options: Options) -> torch.dtype | None:
    """Return the dtype of the target's parameters; None keeps the source's dtype."""
    if form.is_training:
        if options.dtype == "bf16":
            raise UserError(f"--to {form.name} holds fp32 weights; leave --dtype out, or convert to hf")
        return torch.float32
    return None if options.dtype is None else {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]


def _rename(partial: Path, target: Path) -> None:
    """Give a complete file or folder its name, after all folders are on disk."""
    for folder in [partial, *partial.rglob("*")] if partial.is_dir() else []:
        if folder.is_dir():
            fsync_directory(folder)
    os.rename(partial, target)
    fsync_directory(target.absolute().parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
