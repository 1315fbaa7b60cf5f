"""The teacher of a run (``training.teacher``): checks before the start, and loading it beside the trained model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from fusiontree.config.root import Config
from fusiontree.parallel.validate import check_layout
from fusiontree.utils.errors import UserError

if TYPE_CHECKING:
    from fusiontree.data.format import TokenizerInfo
    from fusiontree.data.loader import TrainingData
    from fusiontree.engines.base import Engine
    from fusiontree.parallel.layout import Layout
    from fusiontree.training.teacher import TeacherCheckpoint


def check_teacher(config: Config, tokenizer: TokenizerInfo, world_size: int) -> TeacherCheckpoint | None:
    """Return the teacher's checkpoint, None without a teacher.

    Raises:
        UserError: it is missing, damaged, does not fit or cannot be split as the layout asks.
    """
    from fusiontree.training.teacher import find_teacher

    found = find_teacher(config, tokenizer)
    if found is not None:
        check_teacher_layout(found, config, world_size)
    return found


def check_teacher_layout(teacher: TeacherCheckpoint, config: Config, world_size: int) -> None:
    """Check that the layout of the run can compute its teacher.

    Raises:
        UserError: it cannot.
    """
    try:
        check_layout(teacher.model, config.parallel, config.training, world_size)
    except UserError as error:
        raise UserError(f"training.teacher '{teacher.folder}': {error}") from None


def add_teacher(config: Config, layout: Layout, engine: Engine, train_data: TrainingData) -> TeacherCheckpoint | None:
    """Give the engine the teacher that the configuration names; return its checkpoint, None without a teacher.

    Raises:
        UserError: it is missing, damaged, does not fit or cannot be split as the layout asks; raised on every rank.
    """
    from fusiontree.engines.teacher import build_teacher
    from fusiontree.training.teacher import TeacherCheckpoint, fill_teacher

    def find() -> str:
        found = check_teacher(config, train_data.sources[0].tokenizer, layout.place.world_size)
        return json.dumps(found.record()) if found else ""

    record = layout.on_main_rank(find)
    if not record:
        return None
    found = TeacherCheckpoint.of_record(json.loads(record))
    teacher = build_teacher(found.model, config.parallel, config.training, layout)
    fill_teacher(teacher, found, layout.checkpoint_group)
    engine.teacher = teacher
    return found
