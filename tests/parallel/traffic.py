"""One rank that measures what a layout sends, holds and computes; each rank writes it down.

``python -m tests.parallel.traffic OUTPUT ENGINE DP CP TP SEQ_LEN CHECKPOINTING MIX``
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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fusiontree.config.root import Config
from fusiontree.engines.build import build_engine
from fusiontree.models.mixers.mamba2 import SSMValues
from fusiontree.ops.documents import Documents
from fusiontree.parallel import context_parallel
from fusiontree.parallel.collectives import ALL_GATHER, REDUCE_SCATTER
from fusiontree.parallel.layout import Layout
from fusiontree.utils.environment import process_place
from tests.engines.batches import micro_batch
from tests.parallel.table import DELTA, MODEL, TRAINING

SHAPE = {"layer_pattern": "FG", "num_layers": 2, "srte_encoding": "sincos", "max_position_embeddings": 4096, **DELTA}

SUMMED = {
    "branch_mix": "sum",
    "mlp_input": "residual",
    "use_alignment": False,
    "load_balance_coeff": 0.0,
    "entropy_reg_coeff": 0.0,
}


class Recorder:
    """Counts collectives and the bytes this rank receives, by group, kind and part of the model."""

    def __init__(self, layout: Layout) -> None:
        self.names = {layout.tp_group.group_name: "tp", layout.cp_group.group_name: "cp"}
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.part = "other"

    def note(self, kind: str, group: Any, received: int) -> None:
        """Count a call by a group's members."""
        name = self.names.get(group.group_name) if group is not None else None
        if name:
            self.calls[f"{name} {kind}"] += 1
            self.bytes[f"{name} {self.part}"] += received

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Watch torch.distributed."""
        with ExitStack() as stack:
            for name, kind in ((ALL_GATHER, "all_gather"), (REDUCE_SCATTER, "reduce_scatter"), ("all_reduce",) * 2):
                stack.enter_context(patch.object(dist, name, self._watched(kind, getattr(dist, name))))
            exchange = dist.all_to_all_single

            def watched_exchange(arrived: Tensor, *args: Any, group: Any, **kwargs: Any) -> Any:
                self.note("exchange", group, _size(arrived))
                return exchange(arrived, *args, group=group, **kwargs)

            stack.enter_context(patch.object(dist, "all_to_all_single", watched_exchange))
            yield

    def _watched(self, kind: str, call: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("group")
            if not args:  # the engine's own, named by keywords
                return call(**kwargs)
            size = dist.get_world_size(group)
            tensor = args[1] if kind == "reduce_scatter" else args[0]
            self.note(kind, group, _size(tensor) * (size - 1) // size)
            return call(*args, **kwargs)

        return watched


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def by_part(recorder: Recorder) -> Iterator[None]:
    """Book what the parts of context parallelism exchange under their names; backward passes keep the name."""

    def leave(x: Tensor, part: str) -> Tensor:
        return _OnBackward.apply(x, recorder, part)

    def whole(function: Any, part: str) -> Any:
        """Of what is exchanged at once: a tensor's stack, or several pieces' halos."""

        def call(x: Any, *args: Any, **kwargs: Any) -> Any:
            recorder.part = part
            if isinstance(x, Tensor):
                out = leave(function(leave(x, "other"), *args, **kwargs), part)
            else:
                out = function([leave(piece, "other") for piece in x], *args, **kwargs)
                out = tuple(tuple(leave(t, part) for t in group) for group in out)
            recorder.part = "other"
            return out

        return call

    def begun(function: Any, part: str) -> Any:
        """Of what is begun and awaited."""

        def call(x: Any, *args: Any, **kwargs: Any) -> Any:
            recorder.part = part
            if isinstance(x, Tensor):
                arrive = function(leave(x, "other"), *args, **kwargs)
                recorder.part = "other"
                return lambda: leave(arrive(), part)
            same, arrive = function([leave(piece, "other") for piece in x], *args, **kwargs)
            recorder.part = "other"
            return same, lambda: tuple(leave(t, part) for t in arrive())

        return call

    parts = {
        "left_halos": whole(context_parallel.left_halos, "conv"),
        "pass_states": whole(context_parallel.pass_states, "scan"),
        "pass_affine_states": whole(context_parallel.pass_affine_states, "delta"),
        "begin_left_halos": begun(context_parallel.begin_left_halos, "local heads"),
        "begin_gather_tokens": begun(context_parallel.begin_gather_tokens, "global heads"),
        "begin_swap_with_mirror": begun(context_parallel.begin_swap_with_mirror, "global heads"),
    }
    with ExitStack() as stack:
        for name, watched in parts.items():
            stack.enter_context(patch.object(context_parallel, name, watched))
        yield


class _OnBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, recorder: Recorder, part: str) -> Tensor:
        ctx.recorder, ctx.part = recorder, part
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.recorder.part = ctx.part
        return grads[0], None, None


class _CountProducts(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


def measure(engine_name: str, dp: int, cp: int, tp: int, seq_len: int, checkpointing: str, mix: str) -> dict[str, Any]:
    """Return this rank's figures for one micro batch of one row, forward and backward."""
    config = Config.model_validate(
        {
            "run_dir": "unused",
            "model": {**MODEL, **SHAPE, **(SUMMED if mix == "sum" else {})},
            "training": {**TRAINING, "validation": {}, "seq_len": seq_len, "activation_checkpointing": checkpointing},
            "parallel": {"engine": engine_name, "cp": cp, "tp": tp},
            "data": {"train": "unused"},
        }
    )
    positions = torch.arange(seq_len)
    positions[seq_len // 3 :] -= seq_len // 3
    ids = torch.arange(seq_len).remainder(250)[None]
    inputs = micro_batch(ids, positions[None])
    with Layout("cpu", tp=tp, cp=cp) as layout:
        recorder = Recorder(layout)
        with by_part(recorder):
            engine = build_engine(config.model, config.parallel, config.training, layout)
            blocks = list(engine.module.layers)  # type: ignore[attr-defined]
            entered: list[dict[str, int]] = []
            received: list[int] = []

            def note(*_: Any) -> None:
                entered.append(dict(recorder.calls))
                received.append(sum(recorder.bytes.values()))

            for block in blocks:
                block.register_forward_pre_hook(note)
                block.register_forward_hook(note)
            products = _CountProducts()
            with recorder.recording(), products:
                out = engine.forward(inputs)
                after_forward, forward_products = dict(recorder.calls), products.count
                forward_bytes = dict(recorder.bytes)
                engine.backward(out.loss_sum / seq_len, last=True)
        local = sum(values.numel() for _, _, values in engine.parameter_pieces())
        if engine_name == "zero3":
            local += sum(p.numel() for p in engine.module.parameters())  # type: ignore[attr-defined]  # still gathered
        with FlopCounterMode(display=False) as flops:
            _scan(blocks[0].mamba, seq_len // cp, layout)
        first_block = {k: v - entered[0].get(k, 0) for k, v in entered[1].items()}
        return {
            "block_forward": {k: v for k, v in first_block.items() if v},
            "block_bytes": received[1] - received[0],
            "forward_calls": after_forward,
            "calls": dict(recorder.calls),
            "forward_bytes": forward_bytes,
            "bytes": dict(recorder.bytes),
            "local_parameters": local,
            "products": [forward_products, products.count],
            "scan_flops": flops.get_total_flops(),
        }


def _scan(mixer: Any, length: int, layout: Layout) -> None:
    """Run the mixer's scan alone on a piece."""
    heads, groups = 8 // layout.tp_size, max(1, 2 // layout.tp_size)
    ssm = SSMValues(-torch.ones(heads), torch.ones(heads), torch.ones(1, length, heads))
    b = torch.ones(1, length, groups, 8)
    documents = Documents.from_positions(torch.arange(length)[None] + 1)
    mixer.scan(torch.ones(1, length, heads, 8), ssm, b, b, documents)


def main() -> None:
    output, engine, *numbers, checkpointing, mix = sys.argv[1:]
    dp, cp, tp, seq_len = map(int, numbers)
    figures = measure(engine, dp, cp, tp, seq_len, checkpointing, mix)
    with open(f"{output}.{process_place().rank}", "w") as file:
        json.dump(figures, file)


if __name__ == "__main__":
    main()
