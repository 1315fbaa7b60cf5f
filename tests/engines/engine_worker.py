"""Run by every rank of a test: one engine does what training and checkpoints ask of it, and rank 0 writes what came.

usage: probe.py CONFIG CHECKPOINT OUTPUT [section.key=value …]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.load import read_state
from fusiontree.checkpoint.reader import CheckpointReader
from fusiontree.checkpoint.saver import Saver
from fusiontree.config.load import load_config
from fusiontree.data.batch import MicroBatch
from fusiontree.engines.base import Engine
from fusiontree.engines.build import build_engine
from fusiontree.models.mixers.mamba2 import SSMParameters
from fusiontree.parallel.layout import Layout
from tests.engines import batches

LENGTH = 64


def micro_batch(number: int) -> MicroBatch:
    """Two rows, each of two documents."""
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 250, (2, LENGTH + 1), generator=generator)
    start = 11 + number % 20
    positions = torch.cat([torch.arange(start), torch.arange(LENGTH - start)]).expand(2, -1)
    return batches.micro_batch(tokens[:, :-1], positions, tokens[:, 1:].clone())


def dtypes_seen(engine: Any) -> dict[str, str]:
    """What a forward finds in the parameters that stay fp32 (state space, last norm) and in the others."""
    seen: dict[str, str] = {}

    def note(module: Any, inputs: Any, output: Any) -> None:
        kind = "kept" if isinstance(module, SSMParameters) or module is engine.module.norm else "other"
        for leaf in list(module._parameters) or [k for k in ("weight", "A_log") if k in module.__dict__]:
            value = getattr(module, leaf)
            if value is not None and value.numel():
                seen[kind] = "+".join(sorted({*filter(None, seen.get(kind, "").split("+")), str(value.dtype)}))

    handles = [m.register_forward_pre_hook(lambda m, i: note(m, i, None)) for m in engine.module.modules()]
    engine.evaluate(micro_batch(0))
    for handle in handles:
        handle.remove()
    return seen


def train_step(engine: Engine, numbers: list[int], layers: int, factor: float = 1.0) -> Any:
    """One step over some micro batches of this rank; ``factor`` scales the loss of rank 0's first."""
    for index, number in enumerate(numbers):
        outputs = engine.forward(micro_batch(10 * number + engine.dp_rank), torch.ones(layers, 2, 2))
        loss = outputs.loss_sum / (2 * LENGTH * engine.dp_size * len(numbers))
        if index == 0 and engine.rank == 0:
            loss = loss * factor
        engine.backward(loss, last=index == len(numbers) - 1)
    return engine.step(1e-3)


def main() -> None:
    """Do everything in turn."""
    config_path, checkpoint, output, *overrides = sys.argv[1:]
    config = load_config(Path(config_path), overrides)
    parallel = config.parallel
    layers = config.model.num_layers
    found: dict[str, Any] = {}
    with Layout("cpu", tp=parallel.tp, cp=parallel.cp) as layout:
        engine: Any = build_engine(config.model, parallel, config.training, layout)
        CheckpointReader(Path(checkpoint)).fill(engine.state_tensors())
        engine.load_state_dict(read_state(Path(checkpoint))["engine"])
        saver = Saver(Path(output), CheckpointConfig(keep_last=0), layout.checkpoint_group)
        saver.save(1, engine.state_tensors(), {"engine": engine.state_dict()}, wait=True)
        assert not saver.poll()[0].error
        found["evaluated"] = float(engine.sum_over_tokens(engine.evaluate(micro_batch(engine.dp_rank)).clone()))
        found["dtypes"] = dtypes_seen(engine)
        result = train_step(engine, [1, 2], layers, factor=float("nan"))
        found["skipped"] = result.skipped
        found["finite"] = engine.gather_text(str(engine.finite_passes()))
        found["steps after the skip"] = engine.state_dict()["optimizer_step"]
        engine.backward(engine.forward(micro_batch(99)).loss_sum, last=True)
        engine.discard()
        engine.backward(engine.forward(micro_batch(98)).loss_sum, last=False)
        engine.discard()
        found["norms"] = [train_step(engine, [number, number + 1], layers).grad_norm for number in range(3, 7)]
        found["steps"] = engine.state_dict()["optimizer_step"]
        held = torch.tensor([view.numel() for _, _, view in engine.parameter_pieces()]).sum()
        gathered = sum(p.numel() for p in engine.module.parameters()) if parallel.engine == "zero3" else 0
        found["held"] = [int(text) for text in engine.gather_text(str(int(held) + gathered))]
        found["evaluated after"] = float(engine.sum_over_tokens(engine.evaluate(micro_batch(engine.dp_rank)).clone()))
        if engine.is_main:
            Path(output, "found.json").write_text(json.dumps(found))
        engine.barrier()


if __name__ == "__main__":
    main()
