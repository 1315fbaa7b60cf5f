"""Records a decoding step as a CUDA graph: a step costs the host one launch instead of about a thousand.

For small batches, the GPU executes a step faster than the host launches its operations, so the host limits eager
decoding. Shape legend: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusiontree.models.cache import DecodeCache
from fusiontree.models.model import FusionTreeModel
from fusiontree.utils.cuda_graph import on_recording_stream, record

FEWEST_STEPS = 16
"""Number of remaining steps from which recording pays off: recording costs about as much as three eager steps."""

_REHEARSALS = 2


def recordable(device: torch.device) -> bool:
    """Return True if steps on ``device`` can be recorded, which needs CUDA."""
    return device.type == "cuda"


class GraphedStep:
    """The step ``model(tokens_B1, cache=cache)`` of a fixed cache, recorded once and replayed for every token.

    A model prepared by :func:`fusiontree.models.fused_step.prepare` records its fused step instead.

    A replay repeats the recorded operations on the same tensors. So all values that change from token to token
    (positions, columns, slots) are on the device, and replays work only with the recorded cache. Construct and call it
    in the same inference or no-grad mode. Memory: the activations of one step; keys and values are not copied.
    """

    def __init__(self, model: FusionTreeModel, cache: DecodeCache) -> None:
        """Run a trial step, so that its kernels are compiled, tuned and loaded; then record the step.

        Args:
            model: on a GPU, in eval mode; its parameters must not be reallocated afterwards.
            cache: on the same GPU, fixed (:meth:`DecodeCache.fix`).

        Raises:
            ValueError: the cache is not fixed or not on a GPU.
            RuntimeError: an operation of the step cannot be recorded.
            torch.OutOfMemoryError: the step's activations do not fit into memory.
        """
        device = cache.positions_B.device
        if cache.fixed_columns is None:
            raise ValueError("only the step of a fixed cache can be recorded; call cache.fix first")
        if not recordable(device):
            raise ValueError(f"CUDA graphs need a GPU and the cache is on '{device}'; decode eagerly there")
        cache.check_room(1)
        self.cache = cache
        self._model = model
        with torch.cuda.device(device):
            self._tokens_B1 = torch.zeros(cache.rows, 1, dtype=torch.int64, device=device)
            with on_recording_stream(device):
                for _ in range(_REHEARSALS):
                    self._step(cache.rehearsal())
            lengths, columns = cache.lengths, cache.columns
            try:
                self._graph, self._logits_BV = record(lambda: self._step(cache), device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    f"the decoding step of {cache.rows} rows cannot be recorded as a CUDA graph: {error}; eager steps "
                    f"give the same tokens: generate(graphs=False), or generate.py with --no-graphs"
                ) from error
            finally:
                cache.lengths, cache.columns = lengths, columns  # recording advanced the counters but computed nothing

    def _step(self, cache: DecodeCache) -> Tensor:
        """Queue a step; return its logits ``[B, V]``."""
        if self._model.fused_step is not None:
            return self._model.fused_step(self._tokens_B1, cache)
        return self._model(self._tokens_B1, cache=cache).logits_BSV[:, -1]

    def __call__(self, tokens_B1: Tensor) -> Tensor:
        """Continue every row by its token and return the logits of the next, ``[B, V]``.

        The logits are overwritten by the next call.

        Raises:
            ValueError: the number of rows differs from the recorded number, or the cache is full.
            UserError: a text is longer than the learnable SRTE's table.
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
        return self._logits_BV
