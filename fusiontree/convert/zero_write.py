"""Writing a DeepSpeed ZeRO folder that DeepSpeed's own ``load_checkpoint`` reads.

Every rank's flat tensors are filled in files beside the target while the parameters pass by once, so memory stays near
the largest tensor; then each rank's files are written from them.
"""

from __future__ import annotations

import math
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusiontree.config.moved import under_present_names
from fusiontree.convert.reader import CheckpointSource, Stream, parameter_shapes, write_companions
from fusiontree.convert.zero import LATEST, MASTERS, equal_views, kind_and_parameter
from fusiontree.convert.zero_layout import ZeroLayout
from fusiontree.optim.build import build_optimizer, parameter_groups
from fusiontree.optim.config import validated_settings
from fusiontree.utils.errors import UserError

Flats = dict[tuple[Any, ...], Tensor]
"""Flat tensors by (kind, data parallel rank, tensor parallel rank, group); for stages 1 and 2 also the module's weights
by ("module", name, tensor parallel rank). Their memory is files."""


def write(folder: Path, stream: Stream, *, stage: int, dp: int, tp: int) -> None:
    """Write the folder.

    Args:
        folder: temporary folder that becomes the target.
        stream: the tensors; states of the optimizer that the source does not have are zeros.
        stage: 1 | 2 | 3.
        dp: ranks that see other tokens (dp x cp).
        tp: tensor parallel ranks.

    Raises:
        UserError: DeepSpeed is not installed; the files contain its version and enumerations.
    """
    try:
        import deepspeed
    except ImportError:
        raise UserError("--to zero needs deepspeed; pip install 'fusiontree[deepspeed]' brings it") from None
    source = stream.source
    layout = ZeroLayout(parameter_shapes(source.model_config), source.model_config, stage=stage, dp=dp, tp=tp)
    state = source.state or {"step": 0, "engine": {"optimizer_step": 0}}
    tag = f"global_step{state['step']}"
    scratch = folder / "scratch"
    scratch.mkdir()
    flats = _filled(scratch, layout, stream)
    target = folder / tag
    target.mkdir()
    common = _Common(layout, source, state, deepspeed.__version__)
    for tp_rank in range(tp):
        for dp_rank in range(dp):
            optimizer = common.optimizer(flats, dp_rank, tp_rank)
            torch.save(optimizer, target / f"zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_optim_states.pt")
            if stage == 3:
                name = f"zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_model_states.pt"
                torch.save(common.model({n: torch.empty(0) for n in layout.specs}), target / name)
        if stage < 3:
            weights = {name: flats["module", name, tp_rank] for name in layout.specs}
            torch.save(common.model(weights), target / f"mp_rank_{tp_rank:02d}_model_states.pt")
    shutil.rmtree(scratch)
    write_companions(folder, source)
    (folder / LATEST).write_text(tag, encoding="utf-8")


def _filled(folder: Path, layout: ZeroLayout, stream: Stream) -> Flats:
    """Return the flat tensors of all ranks, filled from the stream; they need the files in ``folder``."""
    flats: Flats = {}

    def add(key: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        file = str(folder / "-".join(map(str, key)))  # new, so it reads as zeros
        flats[key] = torch.from_file(file, shared=True, size=math.prod(shape), dtype=dtype).view(shape)

    kinds = {MASTERS: torch.float32, **stream.source.state_dtypes}
    for kind, dtype in kinds.items():
        for tp_rank in range(layout.tp):
            for dp_rank in range(layout.dp):
                for group, size in enumerate(layout.sizes):
                    add((kind, dp_rank, tp_rank, group), (size,), dtype)
    if layout.stage < 3:
        for parameter, specs in layout.specs.items():
            for tp_rank, spec in enumerate(specs):
                add(("module", parameter, tp_rank), spec.local_shape, torch.float32)
    # One buffer per kind: copies of every size, made and freed one by one, would leave the heap full of holes.
    largest = max(layout.numel(parameter) for parameter in layout.specs)
    buffers = {kind: torch.empty(largest, dtype=dtype) for kind, dtype in kinds.items()}
    for name in stream.source.entries:
        kind, parameter = kind_and_parameter(name)
        whole = stream.read(name)
        for tp_rank in layout.holders(parameter):
            spec = layout.specs[parameter][tp_rank]
            part = buffers[kind][: layout.numel(parameter)]
            for full, shard in equal_views(spec, whole, part.view(spec.local_shape)):
                shard.copy_(full)
            for run in layout.runs(parameter, tp_rank):
                flat = flats[(kind, *run.file, run.group)]
                flat[run.offset : run.offset + run.length] = part[run.start : run.start + run.length]
            if kind == MASTERS and layout.stage < 3:  # where every rank is a holder
                flats["module", parameter, tp_rank].view(-1).copy_(part)
        del whole  # before the next parameter is read
    return flats


class _Common:
    """Values that all files of a checkpoint share."""

    def __init__(self, layout: ZeroLayout, source: CheckpointSource, state: dict[str, Any], version: str) -> None:
        config = source.config
        self._layout = layout
        self._tied = config["model"].get("tie_word_embeddings", False)
        self._training = under_present_names(config, "the source's configuration").get("training", {})
        self._states = list(source.state_dtypes)
        self._state = state
        self._version = version

    def model(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        """Return the content of a file of model states."""
        layout = self._layout
        shapes = [[(n, torch.Size(layout.specs[n][0].local_shape)) for n in group] for group in layout.groups]
        if self._tied:
            weights = weights | {"head.weight": weights["embed.weight"]}
        return {
            "module": weights,
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": [OrderedDict(group) for group in shapes],
            "frozen_param_shapes": None,
            "shared_params": {"head.weight": "embed.weight"} if self._tied else {},
            "frozen_param_fragments": None,
            "lr_scheduler": None,
            "data_sampler": None,
            "random_ltd": None,
            "sparse_tensor_module_names": set(),
            "skipped_steps": 0,
            "global_steps": self._state["step"],
            "global_samples": self._state["step"] * self._training.get("global_batch_size", 0),
            "dp_world_size": layout.dp,
            "mp_world_size": layout.tp,
            "ds_config": {},
            "ds_version": self._version,
        }

    def optimizer(self, flats: Flats, dp_rank: int, tp_rank: int) -> dict[str, Any]:
        """Return the content of a rank's file of optimizer states."""
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum

        layout = self._layout
        groups = range(len(layout.groups))
        step = torch.tensor(float(self._state["engine"]["optimizer_step"]))
        states = {
            group: {"step": step, **{name: flats[name, dp_rank, tp_rank, group] for name in self._states}}
            for group in groups
        }
        base = {"state": states, "param_groups": self._param_groups()}
        masters = [flats["fp32", dp_rank, tp_rank, group] for group in groups]
        state: dict[str, Any] = {
            "zero_stage": ZeroStageEnum(layout.stage),
            "loss_scaler": LossScaler(scale=1.0),
            "dynamic_loss_scale": False,
            "overflow": False,
            "ds_version": self._version,
        }
        if layout.stage == 3:
            state |= {"partition_count": layout.dp, "optimizer_state_dict": base, "fp32_flat_groups": masters}
        else:
            last = dp_rank == layout.dp - 1
            paddings = [layout.padding(group) if last else 0 for group in groups]
            state |= {
                "clip_grad": self._training.get("max_grad_norm", 0.0),
                "base_optimizer_state": base,
                "single_partition_of_fp32_groups": masters,
                "group_paddings": paddings,
                "param_alignment_paddings": [[0] * len(names) for names in layout.groups],
                "partition_count": [layout.dp] * len(layout.groups),
            }
        return {"optimizer_state_dict": state, "ds_config": {}, "ds_version": self._version}

    def _param_groups(self) -> list[dict[str, Any]]:
        """Return the groups as the optimizer itself describes them: the first decays, the second does not."""
        training, layout = self._training, self._layout
        from fusiontree.models.initialization import no_weight_decay

        plain = [no_weight_decay(names[0], layout.config) for names in layout.groups]
        decayed, others = ([torch.zeros(1) for p in plain if p is wanted] for wanted in (False, True))
        weight_decay = training.get("weight_decay", 0.0)
        settings = validated_settings(training.get("optimizer", {}))
        optimizer = build_optimizer(settings, parameter_groups(decayed, others, weight_decay))
        groups = optimizer.state_dict()["param_groups"]
        return [group | {"lr": training.get("learning_rate", 0.0)} for group in groups]
