"""One decoding step recorded as a CUDA graph: a token costs one launch in place of a thousand.

A step of a small batch is over on the GPU long before the host has asked for all its operations, so eager decoding
runs at the host's pace. Shape legend: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fusiontree.models.cache import DecodeCache
from fusiontree.models.model import FusionTreeModel

FEWEST_STEPS = 16
"""Steps to come from which recording pays: it costs about as much as three eager ones."""

_REHEARSALS = 2


def recordable(device: torch.device) -> bool:
    """Whether steps on ``device`` can be recorded: on CUDA devices alone."""
    return device.type == "cuda"


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of ``device`` on which steps are rehearsed and recorded: one, as cuBLAS keeps memory for each."""
    return torch.cuda.Stream()


class GraphedStep:
    """The step ``model(tokens_B1, cache=cache)`` of a fixed cache, recorded once and replayed for every token.

    A replay does on the device what the recorded forward did, to the same tensors; everything that changes from token
    to token (positions, columns, slots) is therefore on the device, and the cache must be the one that was recorded.
    Make and call it in the same inference or no-grad mode. Memory: the recorded step's own activations; keys and
    values are not copied.
    """

    def __init__(self, model: FusionTreeModel, cache: DecodeCache) -> None:
        """Rehearse the step, so that its kernels are compiled, tuned and loaded, and record it.

        Args:
            model: on a GPU, in eval mode; its parameters must stay where they are.
            cache: of the same GPU, fixed (:meth:`DecodeCache.fix`).

        Raises:
            ValueError: the cache is not fixed or not on a GPU.
            RuntimeError: something in the step cannot be recorded.
            torch.OutOfMemoryError: no room for the step's activations.
        """
        device = cache.positions_B.device
        if cache.fixed_columns is None:
            raise ValueError("only the step of a fixed cache can be recorded; call cache.fix first")
        if not recordable(device):
            raise ValueError(f"a cache on '{device}' has no CUDA graphs; decode eagerly there")
        cache.check_room(1)
        self.cache = cache
        self._model = model
        with torch.cuda.device(device):
            self._tokens_B1 = torch.zeros(cache.rows, 1, dtype=torch.int64, device=device)
            side, current = _side_stream(device), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(_REHEARSALS):
                    model(self._tokens_B1, cache=cache.rehearsal())
            current.wait_stream(side)
            lengths, columns = cache.lengths, cache.columns
            self._graph = torch.cuda.CUDAGraph()
            first: Exception | None = None
            try:
                # Other threads (a data loader that pins memory, say) may go on while this one records.
                with torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                    try:
                        output = model(self._tokens_B1, cache=cache)
                    except Exception as error:
                        first = error  # ending the capture then fails too, with an error that does not say why
                        raise
            except Exception as error:
                torch.cuda.set_stream(current)  # a capture whose end fails leaves its own in place
                cause = first or error
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
                raise RuntimeError(
                    f"the decoding step of {cache.rows} rows cannot be recorded as a CUDA graph: {cause}; eager steps "
                    f"give the same tokens: generate(graphs=False), or generate.py with --no-graphs"
                ) from cause
            finally:
                cache.lengths, cache.columns = lengths, columns  # recording counted a token that was not computed
        self._logits_BSV = output.logits_BSV

    def __call__(self, tokens_B1: Tensor) -> Tensor:
        """Continue every row by its token and return the logits of the next, ``[B, V]``.

        The logits are overwritten by the next call.

        Raises:
            ValueError: another number of rows, or no room in the cache.
            UserError: a text longer than the learnable SRTE's table.
        """
        if tokens_B1.shape != self._tokens_B1.shape:
            raise ValueError(
                f"the step was recorded for tokens of {tuple(self._tokens_B1.shape)}, not {tuple(tokens_B1.shape)}"
            )
        self.cache.check_room(1)
        self._model.check_length(max(self.cache.lengths) + 1)
        self._tokens_B1.copy_(tokens_B1)
        with torch.cuda.device(self._tokens_B1.device):
            self._graph.replay()
        self.cache.count([1] * self.cache.rows, 1)
        return self._logits_BSV[:, -1]
