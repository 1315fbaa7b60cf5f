"""The gated delta rule: the recurrence of Gated DeltaNet."""

from __future__ import annotations

from torch import Tensor

from fusiontree.ops.dispatch import Backend, Operation, anywhere, loader
from fusiontree.ops.documents import Documents
from fusiontree.ops.elementwise import fused
from fusiontree.ops.gated_delta.chunked import gated_delta_chunked
from fusiontree.ops.gated_delta.exchange import AffineExchange, exchanged
from fusiontree.ops.gated_delta.fla import unavailable as fla_unavailable
from fusiontree.ops.gated_delta.reference import DeltaInputs, gated_delta_reference, gated_delta_step

__all__ = ["GATED_DELTA", "AffineExchange", "DeltaInputs", "gated_delta_rule"]

GATED_DELTA = Operation(
    "gated_delta",
    [
        Backend("fla", loader("fusiontree.ops.gated_delta.fla:gated_delta_fla"), fla_unavailable),
        Backend("chunked", lambda: gated_delta_chunked, anywhere),
        Backend("reference", lambda: gated_delta_reference, anywhere),
    ],
    shown="gated delta rule",
)


def gated_delta_rule(
    q_BSGK: Tensor,
    k_BSGK: Tensor,
    v_BSHV: Tensor,
    log_decay_BSH: Tensor,
    beta_BSH: Tensor,
    *,
    chunk_size: int = 64,
    documents: Documents | None = None,
    initial_state_BHKV: Tensor | None = None,
    state_exchange: AffineExchange | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute h_t = (I - beta_t k_t k_t^T) exp(g_t) h_{t-1} + beta_t k_t v_t^T and y_t = h_t^T q_t / sqrt(K).

    The state h restarts at document starts. Source: Yang, Kautz and Hatamizadeh 2024, "Gated Delta Networks"
    (arXiv:2412.06464), section 3. Rows of one token, as in decoding, use the recurrence.

    Args:
        q_BSGK: queries of unit length; B rows, S tokens, G key heads of K channels.
        k_BSGK: keys of unit length.
        v_BSHV: values; H value heads of V channels; H/G consecutive heads share a key head.
        log_decay_BSH: g, the logarithm of the decay; at most 0.
        beta_BSH: writing strength, 0 to 1.
        chunk_size: tokens per scan chunk; "fla" and "reference" ignore it. Does not change the result.
        documents: boundaries at which the state restarts; None means each row is one document.
        initial_state_BHKV: state before the first token; tokens before the first document start continue it.
        state_exchange: called with the map of the state over the tokens, as the final state of a scan from zero
            ``[B, H, K, V]`` and the matrix that multiplies the initial state from the left ``[B, H, K, K]`` (0 where a
            document starts); returns the initial state. Context parallelism uses it to pass states between ranks.
        backend: a name of :data:`GATED_DELTA` or "auto".

    Returns:
        ``(y_BSHV, final_state_BHKV)``; y in v's dtype, the state in fp32 (float64 for float64 inputs).
    """
    inputs = DeltaInputs(q_BSGK, k_BSGK, v_BSHV, log_decay_BSH, beta_BSH, chunk_size, documents, initial_state_BHKV)
    scan = GATED_DELTA.choose(backend, v_BSHV.device.type)
    if state_exchange is not None:
        return exchanged(scan, inputs, state_exchange)
    if v_BSHV.shape[1] == 1 and documents is None:
        step = fused(gated_delta_step, "reference" if backend == "reference" else "auto", v_BSHV.device.type)
        return step(*inputs[:5], initial_state_BHKV)
    return scan(inputs)
