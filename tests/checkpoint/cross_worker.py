"""One rank of the cross table: for every job, resume, save at once what was loaded, and train on.

``python -m tests.checkpoint.cross_worker CONFIG JSON PORTS`` with a JSON list of [run_dir, overrides, copy or null] and
a free port for each; ``copy`` is where the state is saved again as soon as it is loaded.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.saver import Saver
from fusiontree.config.load import load_config
from fusiontree.parallel.validate import check_layout
from fusiontree.train import train
from fusiontree.training.loop import Trainer
from fusiontree.utils.environment import process_place


def main() -> None:
    config_file, jobs, ports = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3].split(",")
    resume = Trainer._resume
    for attempt, (run_dir, overrides, copy) in enumerate(jobs):
        os.environ["MASTER_PORT"] = ports[attempt]  # each job's processes meet anew
        config = load_config(config_file, [*overrides, f"run_dir={run_dir}"])
        check_layout(config.model, config.parallel, config.training, process_place().world_size)

        def resume_and_save(trainer: Trainer, copy: str | None = copy) -> None:
            resume(trainer)
            if copy:
                saver = Saver(Path(copy), CheckpointConfig(), trainer.saver.group)
                saver.save(trainer.position.step, trainer.engine.state_tensors(), {}, wait=True)
                assert saver.poll()[0].error is None

        Trainer._resume = resume_and_save  # type: ignore[method-assign]
        assert train(config) == 0, run_dir


if __name__ == "__main__":
    main()
