"""One rank of engine ``ddp`` that notes what it holds and what its steps move; each rank writes it down.

usage: replicas.py OUTPUT
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from fusiontree.checkpoint.save_plan import pieces_of
from fusiontree.config.root import Config
from fusiontree.engines.build import build_engine
from fusiontree.parallel.collectives import ALL_GATHER, REDUCE_SCATTER
from fusiontree.parallel.layout import Layout
from fusiontree.supervision.replica_check import find_differences
from tests.engines.batches import micro_batch
from tests.parallel.table import MODEL, TRAINING


@contextmanager
def counted(calls: Counter[str]) -> Iterator[None]:
    """Count collectives of more than a few values by their kinds."""
    with ExitStack() as stack:
        for name, kind in ((ALL_GATHER, "all_gather"), (REDUCE_SCATTER, "reduce_scatter"), ("all_reduce",) * 2):
            stack.enter_context(patch.object(dist, name, _counted(calls, kind, getattr(dist, name))))
        yield


def _counted(calls: Counter[str], kind: str, real: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[kind] += args[0].numel() > 32
        return real(*args, **kwargs)

    return call


def main() -> None:
    (output,) = sys.argv[1:]
    training = {**TRAINING, "validation": {}, "seq_len": 32, "precision": "bf16"}
    config = Config.model_validate(
        {
            "run_dir": "unused",
            "model": {**MODEL, "hidden_size": 64},
            "training": training,
            "parallel": {"engine": "ddp"},
            "data": {"train": "unused"},
        }
    )
    ids = torch.arange(32).remainder(250)[None]
    inputs = micro_batch(ids)
    found: dict[str, Any] = {}
    with Layout("cpu") as layout:
        engine: Any = build_engine(config.model, config.parallel, config.training, layout)

        def step() -> None:
            for last in (False, True):
                engine.backward(engine.forward(inputs).loss_sum / 128, last=last)
            engine.step(1e-3)

        def moves(action: Any) -> dict[str, int]:
            calls: Counter[str] = Counter()
            with counted(calls):
                action()
            return {kind: count for kind, count in calls.items() if count}

        found["groups"] = len(engine.placements[1].buffers)
        found["parameters"] = sum(p.numel() for p in engine.module.parameters())
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in optimizer_tensors(engine)}
        found["state"] = sum(storages.values())
        held = [v.numel() for n, t in engine.state_tensors().items() if n.startswith("model.") for _, v in pieces_of(t)]
        found["cover"] = int(engine.sum_over_ranks(torch.tensor([sum(held)])))
        found["first step"] = moves(step)
        found["validation"] = moves(lambda: [engine.evaluate(inputs) for _ in range(2)])
        found["step after validation"] = moves(step)
        found["equal"] = find_differences(engine)
        if engine.rank == 1:
            next(engine.parameter_pieces())[2].view(-1)[3] += 0.25
        found["changed"] = find_differences(engine)
        step()
        found["brought anew"] = find_differences(engine)
        with open(f"{output}.{engine.rank}", "w") as file:
            json.dump(found, file)
        engine.barrier()


def optimizer_tensors(engine: Any) -> Iterator[torch.Tensor]:
    """Masters and moments."""
    for part, state in engine.optimizer.state.items():
        yield from (part, state["exp_avg"], state["exp_avg_sq"])


if __name__ == "__main__":
    main()
