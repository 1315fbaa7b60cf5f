"""One rank of ZeRO-3 that notes when which parameters are gathered and reduced; rank 0 writes it down.

usage: gathers.py OUTPUT CHECKPOINTING
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from fusiontree.config.root import Config
from fusiontree.data.batch import MicroBatch
from fusiontree.engines.build import build_engine
from fusiontree.parallel.collectives import REDUCE_SCATTER
from fusiontree.parallel.layout import Layout
from tests.engines.batches import micro_batch
from tests.parallel.table import MODEL, TRAINING

LAYERS = 4


def main() -> None:
    """Note the third step: in the first DeepSpeed learns the order of modules."""
    output, checkpointing = sys.argv[1:]
    config = Config.model_validate(
        {
            "run_dir": "unused",
            "model": {**MODEL, "layer_pattern": "F" * LAYERS, "num_layers": LAYERS, "srte_encoding": "sincos"},
            "training": {**TRAINING, "validation": {}, "seq_len": 32, "activation_checkpointing": checkpointing},
            "parallel": {"engine": "zero3"},
            "data": {"train": "unused"},
        }
    )
    ids = torch.arange(32).remainder(250)[None]
    inputs = micro_batch(ids)
    notes: list[str] = []
    with Layout("cpu", tp=1, cp=1) as layout:
        engine: Any = build_engine(config.model, config.parallel, config.training, layout)
        names = {parameter: name for name, parameter in engine.parameters.items()}
        sizes = [sum(p.ds_numel for p in block.parameters()) for block in engine.module.layers]
        gather = next(iter(names)).all_gather_coalesced

        def noted_gather(parameters: Any, **kwargs: Any) -> Any:
            parameters = list(parameters)
            found = [re.match(r"layers\.(\d+)", names[p]) for p in parameters]
            layers = sorted({int(m[1]) for m in found if m})
            whole = sum(p.ds_numel for p, m in zip(parameters, found, strict=True) if m)
            assert whole == sum(sizes[layer] for layer in layers), "a part of a block was gathered"
            notes.extend(f"gather {layer}" for layer in layers)
            return gather(parameters, **kwargs)

        for parameter in names:
            parameter.all_gather_coalesced = noted_gather
        for layer, block in enumerate(engine.module.layers):
            inner = block.forward

            def noted_forward(*args: Any, layer: int = layer, inner: Any = inner, **kwargs: Any) -> Any:
                notes.append(f"forward {layer}")
                return inner(*args, **kwargs)

            block.forward = noted_forward
        reduce = getattr(dist, REDUCE_SCATTER)

        def noted_reduce(*args: Any, **kwargs: Any) -> Any:
            notes.append("reduce")
            return reduce(*args, **kwargs)

        with patch.object(dist, REDUCE_SCATTER, noted_reduce):
            for _ in range(3):
                notes.clear()
                out = engine.forward(inputs)
                notes.append("backward")
                engine.backward(out.loss_sum / 64, last=True)
                engine.step(1e-3)
        step = notes.copy()
        nodes = joint_nodes(engine, inputs)
        if engine.is_main:
            Path(output).write_text(json.dumps({"notes": step, "nodes": nodes}))
        engine.barrier()


def joint_nodes(engine: Any, inputs: MicroBatch) -> int:
    """Return how many joint matrix products a forward pass leaves to the backward pass."""
    pending, seen = [engine.forward(inputs).loss_sum.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [after for after, _ in node.next_functions]
    return sum(node.name() == "_LinearsBackward" for node in seen)


if __name__ == "__main__":
    main()
