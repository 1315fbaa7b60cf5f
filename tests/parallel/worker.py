"""One rank of a table of layouts: trains every job it is given, one after the other, in one process.

``python -m tests.parallel.worker CONFIG JSON PORTS`` with a JSON list of [run_dir, overrides, mutation or null] and a
free port for each; the rank comes from the environment. Under ``activation_checkpointing: auto`` memory suffices for a
part of the layers, and for more of them on higher ranks. Under ``cuda_graphs: on`` steps are recorded as on a GPU.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from fusiontree.config.load import load_config
from fusiontree.parallel.validate import check_layout
from fusiontree.train import train
from fusiontree.utils.environment import process_place
from tests.models.recording import recorded_on_cpu
from tests.parallel.auto_memory import partial_memory
from tests.parallel.mutations import mutated


def run_jobs(around: Callable[[str | None], AbstractContextManager[None]]) -> None:
    """Train the jobs of the command line, each inside ``around`` of its third entry."""
    config_file, jobs, ports = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3].split(",")
    for attempt, (run_dir, overrides, option) in enumerate(jobs):
        os.environ["MASTER_PORT"] = ports[attempt]  # each job's processes meet anew
        config = load_config(config_file, [*overrides, f"run_dir={run_dir}"])
        check_layout(config.model, config.parallel, config.training, process_place().world_size)
        recorded = config.training.cuda_graphs == "on"
        with around(option), partial_memory(0.5), recorded_on_cpu() if recorded else nullcontext([]) as graphs:
            assert train(config) == 0, run_dir
        assert not recorded or graphs, f"{run_dir}: no step was recorded"


if __name__ == "__main__":
    run_jobs(mutated)
