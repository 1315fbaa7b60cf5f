"""One rank that trains a tiny model under several engines and layouts; rank 0 writes down what each cell saw.

usage: fp16_worker.py OUTPUT JSON PORTS PRECISION, with a JSON list of [engine, cp, tp] and a free port for each
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fusiontree.data.batch import MicroBatch
from fusiontree.engines.build import build_engine
from fusiontree.engines.common import LossScale
from fusiontree.models.config import ModelConfig
from fusiontree.parallel.config import ParallelConfig
from fusiontree.parallel.layout import Layout
from fusiontree.training.config import TrainingConfig
from tests.engines.batches import micro_batch
from tests.parallel.table import MODEL
from tests.tiny import changed

Cell = tuple[str, int, int]
"""Engine, cp, tp."""

LENGTH, ROWS, STEPS = 32, 4, 5
FIRST_SCALE, GROWTH_INTERVAL = 2.0**15, 2
"""Not the default: a scale that the gradient bears sixteen times over, and the good steps until the scale doubles."""
OVERFLOWS, EXCESS = (0, 3), 2.0**13
"""Steps in which the loss of the first row, which only some ranks have, is too large by this factor."""
RATE, MAX_NORM = 1e-2, 0.5
SECTION = changed(MODEL, num_layers=1, layer_pattern="F", drop_branch_prob=0.0, vocab_size=64, window_size=12)


def rows_of(step: int) -> list[MicroBatch]:
    """The global batch of a step, one row each, so that no layout changes what one backward pass adds up."""
    batch = []
    for row in range(ROWS):
        generator = torch.Generator().manual_seed(ROWS * step + row)
        ids = torch.randint(0, 64, (1, LENGTH + 1), generator=generator)
        start = 9 + row
        positions = torch.cat([torch.arange(start), torch.arange(LENGTH - start)])[None]
        batch.append(micro_batch(ids[:, :-1], positions, ids[:, 1:].clone()))
    return batch


def train(cell: Cell, precision: str = "fp16", steps: Sequence[int] = range(STEPS)) -> dict[str, Any]:
    """Train on the batches of some steps; return losses, norms, scales and skips, and the small state at the end."""
    name, cp, tp = cell
    sizes = {"seq_len": LENGTH, "max_steps": STEPS, "global_batch_size": ROWS, "micro_batch_size": 1}
    training = TrainingConfig.model_validate({**sizes, "precision": precision, "max_grad_norm": MAX_NORM})
    parallel: Any = ParallelConfig.model_validate({"engine": name, "cp": cp, "tp": tp})
    seen: dict[str, Any] = {"losses": [], "norms": [], "skips": [], "scales": []}
    with Layout("cpu", tp=tp, cp=cp) as layout, patch.object(LossScale, "GROWTH_INTERVAL", GROWTH_INTERVAL):
        engine: Any = build_engine(ModelConfig.model_validate(SECTION), parallel, training, layout)
        if precision == "fp16":
            engine.load_state_dict({"optimizer_step": 0, "loss_scale": {"scale": FIRST_SCALE, "good_steps": 0}})
        share = ROWS // engine.dp_size
        for step in steps:
            loss_sum = torch.zeros(1)
            mine = rows_of(step)[engine.dp_rank * share : (engine.dp_rank + 1) * share]
            for index, micro in enumerate(mine):
                loss = engine.forward(micro).loss_sum / (ROWS * LENGTH)
                loss_sum += loss.detach()
                excess = precision == "fp16" and step in OVERFLOWS and index == engine.dp_rank == 0
                engine.backward(loss * (EXCESS if excess else 1.0), last=index == share - 1)
            seen["scales"].append(engine.loss_scale.scale if engine.loss_scale else None)
            result = engine.step(RATE)
            seen["skips"].append(result.skipped)
            seen["norms"].append(None if result.skipped else result.grad_norm)
            seen["losses"].append(float(engine.sum_over_tokens(loss_sum)))
        seen["state"] = engine.state_dict()
    return seen


def main() -> None:
    """Train all cells, one after the other."""
    output, cells, ports, precision = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3].split(","), sys.argv[4]
    found = {}
    for cell, port in zip(cells, ports, strict=True):
        os.environ["MASTER_PORT"] = port  # each cell's processes meet anew
        found["-".join(map(str, cell))] = train(cell, precision)
    if os.environ["RANK"] == "0":
        Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
