"""Recording of work for a GPU as a CUDA graph, which the host then launches at once instead of kernel by kernel."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@functools.cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of ``device`` for trial runs and recording; only one, as cuBLAS keeps memory per stream."""
    return torch.cuda.Stream(device)


class GraphPool:
    """Memory that several graphs share; they must be replayed in the order of their recording."""

    def __init__(self) -> None:
        """Reserve nothing yet."""
        self.handle = torch.cuda.graph_pool_handle()
        self.idle_bytes = 0
        """Bytes that replays write to and that belong to no tensor; torch does not count them as allocated."""
        _POOLS.add(self)


_POOLS: weakref.WeakSet[GraphPool] = weakref.WeakSet()
_GRAPHS: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()


def release_graphs() -> None:
    """Discard all recordings; they cannot be replayed any more.

    Before process groups end: NCCL waits for ever to close a communicator that a CUDA graph still refers to.
    """
    graphs = list(_GRAPHS)
    if graphs:
        torch.cuda.synchronize()
    for graph in graphs:
        graph.reset()
    _GRAPHS.clear()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use on a GPU since the peak was reset, those of recorded work included."""
    return torch.cuda.max_memory_allocated(device) + sum(pool.idle_bytes for pool in _POOLS)


@contextmanager
def on_recording_stream(device: torch.device) -> Iterator[None]:
    """Queue the work of this context on :func:`recording_stream`, in order with that before and behind it.

    An eager backward pass on another stream would bind the parameters' gradients to that stream, and a recorded pass
    would have to wait for it, which cannot be recorded.
    """
    side, current = recording_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def forked(tensor: torch.Tensor) -> Iterator[None]:
    """Record the work of this context beside the work that follows it, until :func:`join`.

    Args:
        tensor: the input of the work, from the current stream; its memory is not reused before the work is over.
    """
    side = _side_stream(tensor.device)
    side.wait_stream(torch.cuda.current_stream(tensor.device))
    tensor.record_stream(side)
    with torch.cuda.stream(side):
        yield


def join(device: torch.device) -> None:
    """Let later work of the current stream come after that of :func:`forked`."""
    torch.cuda.current_stream(device).wait_stream(_side_stream(device))


def record(
    function: Callable[[], Any], device: torch.device, pool: GraphPool | None = None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Record the work that ``function`` queues on the current device, without executing it.

    Every kernel must have run once before: compiling and loading cannot be recorded.

    Args:
        function: queues the work; must not wait for the device.
        device: the current device.
        pool: memory that the graph shares with others; None: memory of its own.

    Returns:
        The graph and the result of ``function``, whose tensors each replay overwrites.

    Raises:
        RuntimeError: an operation cannot be recorded.
        torch.OutOfMemoryError: the tensors of the work do not fit into memory.
    """
    current = torch.cuda.current_stream(device)
    graph, first = torch.cuda.CUDAGraph(), None
    _GRAPHS.add(graph)
    pool = pool or GraphPool()
    torch.cuda.empty_cache()  # the graph cannot use what torch keeps for later allocations
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    collects = gc.isenabled()
    gc.disable()  # freeing an older graph would break the recording
    try:
        # thread_local: other threads (such as a data loader that pins memory) may call CUDA during recording.
        with torch.cuda.graph(graph, pool.handle, recording_stream(device), capture_error_mode="thread_local"):
            try:
                result = function()
            except Exception as error:
                first = error  # the end of the capture fails too, with an error that hides the cause
                raise
    except Exception as error:
        torch.cuda.set_stream(current)  # a capture that fails to end does not restore the stream
        cause = first or error
        if isinstance(cause, torch.OutOfMemoryError):
            raise cause from None
        raise RuntimeError(f"{type(cause).__name__}: {cause}") from cause
    finally:
        if collects:
            gc.enable()
    grown = torch.cuda.memory_reserved(device) - reserved
    pool.idle_bytes += grown - (torch.cuda.memory_allocated(device) - allocated)
    return graph, result
