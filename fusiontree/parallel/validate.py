"""Checks that a layout can compute a model, before any process group is created."""

from __future__ import annotations

from collections.abc import Iterator

from fusiontree.engines.config import ENGINES
from fusiontree.models.config import ModelConfig
from fusiontree.models.mixers import distinct_mixers, layer_mixers
from fusiontree.models.mixers.base import Mixer
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.fp8 import check_fp8
from fusiontree.training.config import TrainingConfig
from fusiontree.utils.errors import UserError


def check_layout(model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig, world_size: int) -> None:
    """Check that the layout can compute the model.

    Args:
        model: the ``model`` section.
        parallel: the ``parallel`` section.
        training: the ``training`` section; its row lengths, precision of products and optimizer are read.
        world_size: number of processes.

    Raises:
        UserError: a size does not fit; the message gives the reason and the valid sizes.
    """
    tp, cp = parallel.tp, parallel.cp
    engine = ENGINES.get(parallel.engine)
    if package := engine.missing_package():
        raise UserError(
            f"parallel.engine {parallel.engine} needs the package {package}, which is not installed; install "
            f"fusiontree[{package}] or use parallel.engine=fsdp2"
        )
    if world_size % (tp * cp):
        fitting = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise UserError(
            f"{world_size} processes do not divide by parallel.tp {tp} x parallel.cp {cp} = {tp * cp}; start a "
            f"multiple of {tp * cp}, or set tp x cp to one of {fitting}"
        )
    for mixer in distinct_mixers(model) if cp > 1 else []:
        if mixer.use_context_parallel is Mixer.use_context_parallel:
            raise UserError(f"mixer {mixer.name} does not support context parallelism; set parallel.cp to 1")
    reasons = list(tp_problems(model, tp))
    if reasons:
        fitting = valid_tp(model, limit=max(tp, 64))
        raise UserError(
            f"parallel.tp {tp} does not fit the model: {'; '.join(reasons)}. This model allows tp {fitting}"
        )
    if tp > 1 and model.kernels.cross_entropy not in ("auto", "chunked"):
        raise UserError(
            f"kernels.cross_entropy={model.kernels.cross_entropy} cannot split the vocabulary over parallel.tp {tp} "
            f"ranks; use auto or chunked"
        )
    _check_lengths(training, cp, tp)
    check_fp8(model, parallel, training)
    for problem in engine.problems(parallel, training.optimizer, world_size):
        raise UserError(problem)


def tp_problems(model: ModelConfig, tp: int) -> Iterator[str]:
    """Yield the reasons why the model cannot be split over ``tp`` ranks."""
    if tp == 1:
        return
    if model.vocab_size % tp:
        yield f"vocab_size {model.vocab_size} does not divide by {tp} (pad it to {-(-model.vocab_size // tp) * tp})"
    found: dict[str, None] = {}
    for letter, layer in model.kinds().items():
        sized = model.of_letter(letter)
        place = f"layers {letter}: " if letter in (model.letter_sizes or {}) else ""
        for mixer in layer_mixers(model, layer):
            found |= dict.fromkeys(f"{place}{problem}" for problem in mixer.tp_problems(sized, tp))
    yield from found


def valid_tp(model: ModelConfig, limit: int = 64) -> list[int]:
    """Return the tensor parallel sizes up to ``limit`` that fit the model."""
    return [tp for tp in range(1, limit + 1) if not any(tp_problems(model, tp))]


def _check_lengths(training: TrainingConfig, cp: int, tp: int) -> None:
    parts = cp * tp
    for name, length in training.row_lengths.items():
        if length % parts:
            below, above = length // parts * parts, -(-length // parts) * parts
            near = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"{name} {length} does not divide by parallel.cp {cp} x parallel.tp {tp} = {parts} (each rank holds "
                f"an equal share of a sequence's tokens); the nearest lengths that do: {near}"
            )
