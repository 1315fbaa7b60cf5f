"""What ``--check`` looks at before a run is queued: all that training would open, and settings that do nothing."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from fusiontree.cli.run_teacher import check_teacher
from fusiontree.config.ineffective import idle_work, without_effect
from fusiontree.config.load import config_values
from fusiontree.config.root import Config
from fusiontree.supervision.limits import limit_notes
from fusiontree.training.initial_state import find_initial_state
from fusiontree.training.run_folder import check_same_data


def notes(config: Config, world_size: int) -> list[str]:
    """Return a sentence for each setting without effect, filler work, and limits that defeat each other."""
    return [*without_effect(config, world_size), *idle_work(config, world_size), *limit_notes(config)]


def check_data(config: Config, world_size: int) -> None:
    """Open the datasets as training would, look for every local shard, and read the first batch of each.

    Raises:
        UserError: one is missing or empty, has no such shard, cannot be read, is not that of the run, or its tokenizer
            does not fit the model's vocabulary; or ``checkpoint.init_from`` or ``training.teacher`` is missing or
            does not fit.
    """
    from fusiontree.data.loader import TrainingData
    from fusiontree.data.validation import ValidationData

    data, training, vocab_size = config.data, config.training, config.model.vocab_size
    dp_size = world_size // (config.parallel.tp * config.parallel.cp)
    train_data = TrainingData(data, training, vocab_size, 0, dp_size)
    check_same_data(Path(config.run_dir), config_values(config), train_data.order)
    validation_data = ValidationData.for_training(data, training, vocab_size, 0, dp_size, train_data.sources).values()
    find_initial_state(config, train_data.sources[0].tokenizer)
    check_teacher(config, train_data.sources[0].tokenizer, world_size)
    for source in (*train_data.sources, *(validation.source for validation in validation_data)):
        if data.on_damage == "stop":
            source.check()
    if data.is_remote:
        return  # shards of gigabytes would be fetched into the cache of this machine
    with closing(train_data.steps()) as steps:
        next(steps)
    for validation in validation_data:
        with closing(validation.micro_batches()) as batches:
            next(batches)


def check_kernels(config: Config) -> str | None:
    """Check that the chosen kernels run on the device; return a note if the device is not on this machine.

    Raises:
        UserError: a kernel cannot run on the device.
    """
    import torch

    from fusiontree.ops.attention import ATTENTION
    from fusiontree.ops.conv import CONV
    from fusiontree.ops.cross_entropy import CROSS_ENTROPY
    from fusiontree.ops.elementwise import ELEMENTWISE
    from fusiontree.ops.ssd import SSD

    wanted = config.training.device
    if wanted != "cpu" and not torch.cuda.is_available():
        return "this machine shows no GPU, so training.device and model.kernels are not checked"
    for operation in (ATTENTION, CONV, CROSS_ENTROPY, ELEMENTWISE, SSD):
        backend = getattr(config.model.kernels, operation.name)
        if backend != "auto":
            operation.choose(backend, "cpu" if wanted == "cpu" else "cuda")
    return None


def check_trackers(config: Config) -> None:
    """Check that the experiment trackers can start.

    Raises:
        UserError: the package of a tracker is not installed.
    """
    from fusiontree.tracking.tracker import TRACKERS, require_package

    for name in config.logging.trackers:
        if name in ("wandb", "tensorboard"):
            require_package(name)
        else:
            TRACKERS.get(name)
