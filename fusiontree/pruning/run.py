"""From a checkpoint to its analysis and to a plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusiontree.checkpoint.load import load_model, row_length
from fusiontree.data.config import DataConfig
from fusiontree.data.tokenizers import load_tokenizer
from fusiontree.data.validation import ValidationData
from fusiontree.models.config import ModelConfig
from fusiontree.pruning.analysis import Analysis, analyze
from fusiontree.pruning.statistics import Batches
from fusiontree.utils.errors import UserError


def analyze_checkpoint(
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    data: str | None,
    rows: int,
    batch_size: int,
    seq_len: int | None,
    report: Callable[[int, int], None],
) -> tuple[Analysis, ModelConfig]:
    """Load a checkpoint and measure its parts on held-out rows.

    Args:
        folder: the checkpoint.
        device: to compute on.
        dtype: of the weights.
        data: dataset; None means the run's first ``data.validation``.
        rows: number of rows.
        batch_size: rows per forward pass.
        seq_len: tokens of a row; None means the run's ``training.seq_len``.
        report: called with the number of parts measured and their total.

    Raises:
        UserError: there is no held-out dataset, another tokenizer made it, or the length of a row is not known.
        CheckpointDamage: a file of the checkpoint differs from its recorded hash.
    """
    model, resolved = load_model(folder, device, dtype)
    length = row_length(seq_len, resolved, folder)
    model.check_length(length)
    held_out = open_held_out(folder, resolved, data, rows, batch_size, length, model.config.vocab_size)
    return analyze(model, held_out, report), model.config


def open_held_out(
    folder: Path, resolved: dict[str, Any], data: str | None, rows: int, batch_size: int, length: int, vocab_size: int
) -> Batches:
    """Return a function that reads the held-out rows; arguments as in :func:`analyze_checkpoint`.

    Raises:
        UserError: there is no dataset, or another tokenizer made it.
    """
    settings = resolved.get("data", {})
    given = data or settings.get("validation")
    if given is None:
        raise UserError("no dataset is given, and the run has no data.validation; give --data DIR")
    config = DataConfig.model_validate({**settings, "train": "(not read)", "validation": given})
    opened = ValidationData(config, seq_len=length, micro_batch_size=batch_size, max_rows=rows, vocab_size=vocab_size)
    made_with, used = opened.source.tokenizer, load_tokenizer(folder).info
    if (made_with.sha256, made_with.eos_id) != (used.sha256, used.eos_id):
        raise UserError(
            f"dataset '{opened.source.place}' was made with tokenizer '{made_with.name}' and the model was trained "
            f"with '{used.name}'; its loss would mean nothing"
        )
    batches = list(opened.micro_batches())  # a few rows, read once for hundreds of passes
    return lambda: iter(batches)
