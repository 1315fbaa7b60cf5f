"""DeepSpeed's ZeRO-1, 2 and 3 checkpoints: fp32 master weights and the optimizer's states in flat partitions.

Reading needs no DeepSpeed and executes nothing in the files (see :mod:`fusiontree.convert.safe_unpickle`). Writing
creates the files that DeepSpeed's ``load_checkpoint`` expects of a model trained by FusionTree's zero engines at a
given stage, dp and tp.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusiontree.convert.dcp import fresh_state
from fusiontree.convert.hf_tokenizer import tokenizer_files
from fusiontree.convert.reader import (
    MODEL,
    CheckpointSource,
    Entry,
    checked,
    parameter_shapes,
    state_prefix,
    stored_values,
)
from fusiontree.convert.safe_unpickle import Inert, load_inert
from fusiontree.convert.zero_layout import File, ZeroLayout
from fusiontree.parallel.global_tensor import ShardSpec
from fusiontree.utils.errors import UserError

LATEST = "latest"
OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_STATE = "optimizer_state_dict"
MASTERS = "fp32"
"""Kind of a flat tensor of master weights; other kinds are the states of the optimizer, by name."""


def is_zero(path: Path) -> bool:
    """Tell by the files whether a folder is a DeepSpeed ZeRO checkpoint, or one that names its newest."""
    folders = [folder for folder in (path, _newest(path)) if folder is not None and folder.is_dir()]
    return any(OPTIMIZER_FILE.fullmatch(file.name) for folder in folders for file in folder.iterdir())


def _newest(path: Path) -> Path | None:
    if not (path / LATEST).is_file():
        return None
    return path / Path((path / LATEST).read_text(encoding="utf-8").strip()).name


class ZeroFolder(CheckpointSource):
    """A folder that DeepSpeed's ``save_checkpoint`` made of our model."""

    def __init__(self, path: Path, config: dict[str, Any] | None) -> None:
        """Open the folder; tensors are mapped into memory as they are read.

        Args:
            path: the folder given to ``save_checkpoint``, or a tag's folder in it.
            config: whole configuration of the run; the folder does not say which model it holds.

        Raises:
            UserError: no configuration is given, files are missing, or they do not hold its model.
        """
        self.config, saved = stored_values(path, config)
        self.files = tokenizer_files(path)
        folder = _newest(path) or path
        model = self.model_config
        shapes = parameter_shapes(model)
        files = {
            (int(match[1]), int(match[2])): file
            for file in folder.iterdir()
            if (match := OPTIMIZER_FILE.fullmatch(file.name))
        }
        dp, tp = (1 + max(ranks) for ranks in zip(*files, strict=True))
        missing = [f"zero_pp_rank_{d}_mp_rank_{t:02d}" for d in range(dp) for t in range(tp) if (d, t) not in files]
        if missing:
            raise UserError(f"{folder} lacks the optimizer states of {', '.join(missing[:4])}; copy the folder again")
        self._states: dict[File, dict[str, Any]] = {rank: load_inert(file)[_STATE] for rank, file in files.items()}
        first = self._states[0, 0]
        stage = plain_int(first["zero_stage"])
        count = first["partition_count"]
        if (max(count) if isinstance(count, list) else plain_int(count)) not in (dp, dp * tp):
            raise UserError(f"{folder} holds files of {dp} data parallel ranks and was saved by {count}; copy it again")
        name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}, which says which parameters the partitions hold; copy it again")
        described = load_inert(folder / name)
        if any(any(padding) for padding in first.get("param_alignment_paddings") or []):
            raise UserError(f"{folder} was saved with zero_optimization.parameter_alignment, which is not read")
        groups = [[name.removeprefix("module.") for name in group] for group in described["param_shapes"]]
        held = [name for group in groups for name in group]
        entries = {MODEL + name: Entry(shapes.get(name, ()), torch.float32) for name in held}
        self.entries = checked(entries, model, str(folder))
        self.layout = ZeroLayout(shapes, model, stage=stage, dp=dp, tp=tp, groups=groups)
        for group, theirs in zip(groups, described["param_shapes"], strict=True):
            for name, shape in zip(group, theirs.values(), strict=True):
                wanted = self.layout.specs[name][0].local_shape
                if tuple(shape) != wanted:
                    raise UserError(f"{folder}: '{name}' is {tuple(shape)} on a rank; at tp {tp} it should be {wanted}")
        for state, dtype in self.state_dtypes.items():
            if state in self._group(first, 0):
                self.entries |= {state_prefix(state) + n: Entry(shapes[n], dtype) for n in held}
        step = plain_int(self._group(first, 0).get("step", 0))
        made = {"step": plain_int(described["global_steps"]), "engine": {"optimizer_step": step}}
        self.state = saved if saved is not None else fresh_state() | made

    def read(self, name: str) -> Tensor:
        """Return one tensor, put together from the ranks' partitions."""
        kind, parameter = kind_and_parameter(name)
        values = torch.empty(self.entries[name].shape, dtype=self.entries[name].dtype)
        for rank in self.layout.holders(parameter):
            spec = self.layout.specs[parameter][rank]
            part = values.new_empty(math.prod(spec.local_shape))
            for run in self.layout.runs(parameter, rank):
                flat = self._flat(self._states[run.file], run.group, kind)
                if run.offset + run.length > flat.numel():
                    raise UserError(f"'{name}' does not fit the partition of ranks {run.file}; copy it again")
                part[run.start : run.start + run.length] = flat[run.offset : run.offset + run.length]
            for full, shard in equal_views(spec, values, part.view(spec.local_shape)):
                full.copy_(shard)
        return values

    def _flat(self, state: dict[str, Any], group: int, kind: str) -> Tensor:
        if kind != MASTERS:
            return self._group(state, group)[kind].view(-1)
        key = "fp32_flat_groups" if "fp32_flat_groups" in state else "single_partition_of_fp32_groups"
        return state[key][group].view(-1)

    def _group(self, state: dict[str, Any], group: int) -> dict[str, Any]:
        """Return the optimizer's state of one flat tensor."""
        base = state[_STATE] if _STATE in state else state["base_optimizer_state"]
        states = base["state"] if isinstance(base, dict) else base
        if isinstance(states, dict):
            return states.get(group, {})
        return states[group] if group < len(states) else {}


def kind_and_parameter(name: str) -> tuple[str, str]:
    """Return the kind of flat tensor and the parameter of a tensor ``model.NAME`` or ``optimizer.STATE.NAME``."""
    if name.startswith(MODEL):
        return MASTERS, name.removeprefix(MODEL)
    _, state, parameter = name.split(".", 2)
    return state, parameter


def equal_views(spec: ShardSpec, full: Tensor, shard: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield views of the same values in a full parameter and in a tensor parallel rank's shard of it."""
    if spec.axis is None:
        yield full, shard
        return
    begin = 0
    for start, stop in spec.ranges:
        yield full.narrow(spec.axis, start, stop - start), shard.narrow(spec.axis, begin, stop - start)
        begin += stop - start


def plain_int(value: Any) -> int:
    """Return a number that may be a tensor, or an :class:`Inert` value of an enumeration."""
    if isinstance(value, Inert):
        value = value.args[0]
    return int(value)
