"""One rank of the cross table: for every job, resume, save at once what was loaded, and train on.

The command line is that of tests/parallel/worker.py. The third entry of a job is the folder where the state is saved
again as soon as it is loaded, or null.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.saver import Saver
from fusiontree.training.loop import Trainer
from tests.parallel.worker import run_jobs


@contextmanager
def saving_again(copy: str | None) -> Iterator[None]:
    resume = Trainer._resume

    def resume_and_save(trainer: Trainer) -> None:
        resume(trainer)
        if copy:
            saver = Saver(Path(copy), CheckpointConfig(), trainer.saver.group)
            saver.save(trainer.position.step, trainer.engine.state_tensors(), {}, wait=True)
            assert saver.poll()[0].error is None

    with patch.object(Trainer, "_resume", resume_and_save):
        yield


if __name__ == "__main__":
    run_jobs(saving_again)
