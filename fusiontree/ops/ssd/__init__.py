"""State space scan of Mamba-2 (SSD)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fusiontree.ops.dispatch import Backend, Operation, anywhere, loader, triton_unavailable
from fusiontree.ops.documents import Documents
from fusiontree.ops.elementwise import fused
from fusiontree.ops.ssd.mamba_ssm import unavailable as mamba_ssm_unavailable
from fusiontree.ops.ssd.reference import ScanInputs, StateExchange, ssd_reference, ssd_step
from fusiontree.utils.environment import keep_tuning

__all__ = ["SSD", "ScanInputs", "StateExchange", "ssd_scan"]


def _mamba_ssm() -> Callable:
    keep_tuning()
    from fusiontree.ops.ssd.mamba_ssm import ssd_mamba_ssm

    return ssd_mamba_ssm


SSD = Operation(
    "ssd",
    [
        Backend("triton", loader("fusiontree.ops.ssd.triton:ssd_triton"), triton_unavailable),
        Backend("mamba_ssm", _mamba_ssm, mamba_ssm_unavailable),
        Backend("reference", lambda: ssd_reference, anywhere),
    ],
)


def ssd_scan(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor,
    *,
    chunk_size: int,
    documents: Documents | None = None,
    initial_state_BHPN: Tensor | None = None,
    state_exchange: StateExchange | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute h_t = exp(A dt_t) h_{t-1} + dt_t B_t x_t and y_t = C_t h_t + D x_t; h restarts at document starts.

    Source: Dao and Gu 2024, "Transformers are SSMs", section 6 (the chunked algorithm). Rows of one token, as in
    decoding, use the recurrence.

    Args:
        x_BSHP: inputs; B rows, S tokens, H heads of P channels.
        dt_BSH: positive step sizes (after softplus).
        A_H: negative decay rates.
        B_BSGN: input projections; G groups of heads share them, N is the state's size.
        C_BSGN: output projections.
        D_H: skip weights.
        chunk_size: tokens per scan chunk (one matrix product); ignored by "triton". Does not change the result.
        documents: boundaries at which the state restarts; None means each row is one document.
        initial_state_BHPN: state before the first token; tokens before the first document start continue it.
        state_exchange: called with the final state of a scan from zero [B, H, P, N] and the total decay over the tokens
            [B, H] (0 where a document starts after the first token); returns the initial state. Context parallelism
            uses it to pass states between ranks; the tokens are scanned only once.
        backend: a name of :data:`SSD` or "auto".

    Returns:
        ``(y_BSHP, final_state_BHPN)``; y in x's dtype, the state in fp32 (float64 for float64 inputs).
    """
    scan = SSD.choose(backend, x_BSHP.device.type)
    if x_BSHP.shape[1] == 1 and documents is None and state_exchange is None:
        step = fused(ssd_step, "reference" if backend == "reference" else "auto", x_BSHP.device.type)
        return step(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, initial_state_BHPN)
    tensors = (x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H)
    return scan(ScanInputs(*tensors, chunk_size, documents, initial_state_BHPN, state_exchange))
