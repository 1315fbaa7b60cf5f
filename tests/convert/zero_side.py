"""A rank of a DeepSpeed run: saves our model by DeepSpeed's own save_checkpoint, or loads it by load_checkpoint.

torchrun --nproc-per-node=N tests/convert/zero_side.py save|load ENGINE TP RUN.yaml DEEPSPEED_FOLDER OURS

``save`` trains nothing: it fills the engine from random numbers, saves as DeepSpeed does, and saves the same tensors in
our own format to OURS. ``load`` lets DeepSpeed load its folder and saves what the engine then holds to OURS.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from fusiontree.checkpoint.config import CheckpointConfig
from fusiontree.checkpoint.saver import Saver
from fusiontree.config.load import config_values, load_config
from fusiontree.engines.build import build_engine
from fusiontree.parallel.layout import Layout
from fusiontree.utils.hashing import stable_hash


def main(action: str, name: str, tp: int, config_file: str, folder: str, ours: str) -> None:
    """Run one rank."""
    config = load_config(
        config_file, [f"parallel.engine={name}", f"parallel.tp={tp}", "parallel.zero3_persistence_threshold=0"]
    )
    with Layout("cpu", tp=tp) as layout:
        engine = build_engine(config.model, config.parallel, config.training, layout)
        deepspeed = engine._engine
        values = {"optimizer_step": 7}
        if action == "save":
            with torch.no_grad():
                for key, tensor in engine.state_tensors().items():
                    for offset, view in tensor.pieces:
                        # Values by place in the whole, so that ranks that share an element agree on it.
                        generator = torch.Generator().manual_seed(stable_hash(key, *offset, *view.shape) >> 1)
                        view.copy_(torch.rand(view.shape, generator=generator))
            engine.load_state_dict(values)
            deepspeed.global_steps = 7
            deepspeed.save_checkpoint(folder, tag="global_step7")
        else:
            path, _ = deepspeed.load_checkpoint(folder)
            assert path is not None and deepspeed.global_steps == 7
            values = engine.state_dict()
        state = {
            "config": config_values(config),
            "tokens": 0,
            "data": None,
            "skipped_in_a_row": 0,
            "engine": values,
            "rng": {"torch_cpu": ""},
        }
        settings = CheckpointConfig(keep_last=0).model_copy(update={"async_": False})
        saver = Saver(Path(ours) / "checkpoints", settings, layout.checkpoint_group)
        saver.save(7, engine.state_tensors(), state, wait=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
