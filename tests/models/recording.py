"""CUDA graphs on the CPU: a capture's operations are noted and undone, and done again on the same tensors by a replay.

With :func:`pretend_gpu` the code that records and replays steps runs as it does on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fusiontree.generation import running_batch
from fusiontree.models import cuda_graph
from fusiontree.training import step
from fusiontree.training.passes import EagerPasses
from fusiontree.training.recorded_passes import RecordedPasses
from fusiontree.utils import cuda_graph as utils_cuda_graph

# What a capture refuses: reading a value on the host, and bringing one from it.
_READ = {"_local_scalar_dense", "item"}
_FORBIDDEN = _READ | {"lift_fresh", "nonzero", "is_nonzero", "equal"}


class _Recorder(TorchDispatchMode):
    reads = False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self._made: set[int] = set()
        self._written: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _FORBIDDEN - (_READ if self.reads else set()):
            raise RuntimeError(f"{name} cannot be part of a graph")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._written += [(one, one.clone()) for one in tree_leaves(value) if _place(one) not in self._made]
        out = func(*args, **(kwargs or {}))
        self._made |= _places(out) - _places((args, kwargs))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def undo(self) -> None:
        """Put back what was written to tensors from before: a capture computes nothing."""
        for tensor, before in reversed(self._written):
            tensor.data.copy_(before)  # not a change that autograd sees: a backward pass may be recorded next


class _Graph:
    """In the place of ``torch.cuda.CUDAGraph``."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.was_reset = False

    def reset(self) -> None:
        self.was_reset = True

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, recorded in self.calls:
            inputs = _places((args, kwargs))
            again = func(*args, **kwargs)
            for result in tree_leaves(again):
                if isinstance(result, torch.ScriptObject):  # a collective; on a GPU the graph waits for it where needed
                    result.wait()
            for old, new in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and _place(old) not in inputs:
                    old.copy_(new)


class _Capture:
    """In the place of ``torch.cuda.graph``; as that one, it ends a failed capture with an error of its own."""

    def __init__(self, graph: _Graph, pool: Any, stream: Any = None, capture_error_mode: str = "global") -> None:
        assert stream is not None and capture_error_mode == "thread_local"
        self._graph, self._recorder, self._stream = graph, _Recorder(), stream

    def __enter__(self) -> None:
        torch.cuda.set_stream(self._stream)
        self._recorder.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._recorder.__exit__(kind, error, trace)
        self._recorder.undo()
        if error is not None:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self._graph.calls = self._recorder.calls
        torch.cuda.set_stream(torch.cuda.default_stream())


@contextmanager
def recorded_on_cpu() -> Iterator[list[_Graph]]:
    """Let the trainer record the passes of its steps on the CPU; yield the list of the graphs that will be made.

    This recording executes collectives, so all ranks must record the same passes.
    """

    def build(engine: Any, model: Any, training: Any, weights: Any) -> RecordedPasses:
        return RecordedPasses(engine, weights, EagerPasses(engine, weights), required=True)

    wait = dist.Work.wait

    def wait_unrecorded(work: dist.Work, *arguments: Any) -> Any:
        with _disable_current_modes():  # gloo copies results here, and a replayed collective does so itself
            return wait(work, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "build_passes", build)
        patch.setattr(dist.Work, "wait", wait_unrecorded)
        yield pretend_gpu(patch, reads=True)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, *, reads: bool = False) -> list[_Graph]:
    """Let steps be recorded on the CPU; return the list of the graphs that will be made.

    ``reads`` allows to read values: on a CPU the model reads the greatest position, of which it knows a bound on a GPU.
    """
    monkeypatch.setattr(_Recorder, "reads", reads)
    made: list[_Graph] = []
    main = SimpleNamespace(wait_stream=lambda other: None)
    current = [main]

    def graph() -> _Graph:
        made.append(_Graph())
        return made[-1]

    pretended = {
        "device": lambda device: nullcontext(),
        "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: nullcontext(),
        "default_stream": lambda: main,
        "current_stream": lambda device=None: current[0],
        "set_stream": lambda stream: current.__setitem__(0, stream),
        "CUDAGraph": graph,
        "graph": _Capture,
        "graph_pool_handle": lambda: None,
        "empty_cache": lambda: None,
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "synchronize": lambda device=None: None,
    }
    for name, value in pretended.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for module in (cuda_graph, running_batch):
        monkeypatch.setattr(module, "recordable", lambda device: True)
    monkeypatch.setattr(utils_cuda_graph, "recording_stream", utils_cuda_graph.recording_stream.__wrapped__)
    for kept in ("_GRAPHS", "_POOLS"):  # garbage of this test is not what a later test's layout discards
        monkeypatch.setattr(utils_cuda_graph, kept, weakref.WeakSet())
    return made


class SeenTensors(TorchDispatchMode):
    """Notes the tensors that operations take and return, with the operation's name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, out))
        self.found += [(str(func), leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return out


def tensors_of(cache: Any) -> list[torch.Tensor]:
    """Every tensor of a fixed cache."""
    found = [cache.positions_B, cache.column_1]
    for layer in cache.layers:
        for name in ("mamba", "delta"):
            if name in layer:
                found += layer[name].previous()
        if "attention" in layer:
            for part in (layer["attention"].local._kept, layer["attention"].everything._buffer):
                found += list(part or ())
    return found


def _place(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _places(values: Any) -> set[int]:
    return {_place(leaf) for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}
