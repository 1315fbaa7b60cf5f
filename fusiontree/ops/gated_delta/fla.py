"""The gated delta rule by the kernels of fla-core (flash-linear-attention; NVIDIA GPUs).

fla-core calls the package FlashQLA instead of its own kernels where FlashQLA is installed and supports the sizes.

Shape legend: B rows, S tokens, G key heads, H value heads, K channels of a key, V channels of a value.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from fusiontree.ops.documents import Documents
from fusiontree.ops.gated_delta.chunked import gated_delta_chunked
from fusiontree.ops.gated_delta.fla_tiles import MEASURED, choose_tiles
from fusiontree.ops.gated_delta.reference import DeltaInputs
from fusiontree.utils.environment import keep_tuning
from fusiontree.utils.errors import UserError

log = logging.getLogger(__name__)

OLDEST, TOO_NEW = (0, 6), (0, 7)
"""Versions of fla-core whose functions this module calls; from the first, up to but not including the second."""
WIDEST_KEY = 256
_RESET = -110.0
"""Log decay at a document start: exp(-110) is 0 in fp32. Sums over a scan chunk are exact to 1e-5 per start in it."""
_CHUNK = 64
_DEFECT = ((3, 4, 0), (3, 7, 1))
"""Versions of Triton, from the first and before the second, that compile one backward kernel wrongly on Hopper."""
_WORST_ERROR = 0.1
"""Relative error of a gradient in bf16 above which the kernels count as wrong; the defect causes errors above 1."""


def unavailable(device: torch.device) -> str | None:
    """Return the reason why the kernels cannot run on ``device``, or None."""
    if device.type != "cuda":
        return "its kernels need a GPU"
    missing = [name for name in ("fla", "triton", "einops") if find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} is not installed (pip install 'fusiontree[cuda]')"
    try:
        found = version("fla-core")
    except PackageNotFoundError:
        return "fla-core is not installed (pip install 'fusiontree[cuda]')"
    if not OLDEST <= numbers(found)[:2] < TOO_NEW:
        oldest, too_new = (".".join(map(str, bound)) for bound in (OLDEST, TOO_NEW))
        return f"fla-core {found} is installed, and this version works with {oldest} up to, not including, {too_new}"
    return None


def numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: ``3.6.0+git1`` gives (3, 6, 0)."""
    found = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        found.append(int(digits))
    return tuple(found)


def compiled_wrongly(capability: tuple[int, int], triton_version: str) -> bool:
    """Return whether Triton compiles fla's ``chunk_bwd_dqkwg`` wrongly for tiles of 64 channels.

    On GPUs of compute capability 9.x; gradients of keys and decays are then wrong by more than their size (fla issue
    640). fla-core refuses every tile there, also those of 32 and 128 channels, which are computed rightly.
    """
    first, fixed = _DEFECT
    return capability[0] == 9 and first <= (*numbers(triton_version), 0, 0)[:3] < fixed


def gated_delta_fla(inputs: DeltaInputs) -> tuple[Tensor, Tensor]:
    """Compute :func:`fusiontree.ops.gated_delta.gated_delta_rule`; float64 uses the plain PyTorch form.

    Raises:
        UserError: keys are wider than the kernels' limit, or the kernels' gradients are wrong on this GPU.
    """
    size = inputs.k_BSGK.shape[-1]
    if inputs.v_BSHV.dtype == torch.float64:
        return gated_delta_chunked(inputs)
    if size > WIDEST_KEY:
        raise UserError(
            f"model.kernels.gated_delta: fla, which auto takes on a GPU, has no kernel for keys of {size} channels; "
            f"set model.mixers.gated_delta_net.key_dim to at most {WIDEST_KEY}, or model.kernels.gated_delta=chunked"
        )
    device, (groups, (heads, width)) = inputs.v_BSHV.device, (inputs.k_BSGK.shape[2], inputs.v_BSHV.shape[2:])
    if device.type == "cuda" and torch.is_grad_enabled() and inputs.k_BSGK.requires_grad:
        check_gradients(device, (groups, heads), (size, width), inputs.v_BSHV.dtype)
    return run_kernels(kernels(device), inputs)


def run_kernels(chunk_gated_delta_rule: Callable[..., Any], inputs: DeltaInputs) -> tuple[Tensor, Tensor]:
    """Call fla's function. Documents restart the state by a decay of zero at their start.

    fla can take document boundaries, but it then reads them on the host, which a recorded pass cannot do.
    """
    dtype, log_decay_BSH = inputs.v_BSHV.dtype, inputs.log_decay_BSH.float()
    documents, initial = inputs.documents, inputs.initial_state_BHKV
    if documents is not None and not (documents.whole_rows and initial is None):
        log_decay_BSH = log_decay_BSH.masked_fill((documents.positions_BS == 0).unsqueeze(-1), _RESET)
    y_BSHV, state_BHKV = chunk_gated_delta_rule(
        q=inputs.q_BSGK.to(dtype),
        k=inputs.k_BSGK.to(dtype),
        v=inputs.v_BSHV,
        g=log_decay_BSH,
        beta=inputs.beta_BSH.float(),
        initial_state=None if initial is None else initial.float().contiguous(),
        output_final_state=True,
    )
    return y_BSHV, state_BHKV


@functools.cache
def kernels(device: torch.device) -> Callable[..., Any]:
    """Return fla's function; where Triton compiles a kernel of it wrongly, with the kernel's tile changed."""
    keep_tuning()
    import triton
    from fla.ops.gated_delta_rule import chunk

    capability = torch.cuda.get_device_capability(device)
    if compiled_wrongly(capability, triton.__version__) and find_spec("tilelang") is None:
        log.warning(
            "triton %s compiles a backward kernel of fla-core wrongly on this GPU for tiles of 64 channels; gated "
            "delta rule uses other tiles and checks its gradients once. triton 3.7.1 has no such defect",
            triton.__version__,
        )
        chunk.chunk_bwd_dqkwg = _with_safe_tiles
    if capability == MEASURED:
        choose_tiles()
    return chunk.chunk_gated_delta_rule


def safe_tile(size: int) -> int:
    """Return the channels, of keys or of values, of a tile that every version of Triton compiles rightly."""
    return 16 if size <= 16 else 32 if size <= 64 else 128


def _with_safe_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    g: Tensor,
    h: Tensor,
    dv: Tensor,
    do: Tensor,
    dh: Tensor,
    scale: float,
    chunk_size: int,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute fla's ``chunk_bwd_dqkwg``, by the same kernel: gradients of q, k, w and g.

    Shapes as in fla: q and k ``[B, S, G, K]``, v, do and dv ``[B, S, H, V]``, w ``[B, S, H, K]``, g ``[B, S, H]``, and
    for c chunks h and dh ``[B, c, H, K, V]``.
    """
    import triton
    from fla.ops.common.chunk_o import chunk_bwd_kernel_dqkwg

    rows, length, groups, size = k.shape
    heads, width = v.shape[2:]
    tile, columns = safe_tile(size), safe_tile(width)
    tiles = triton.cdiv(size, tile)
    dq, dk = (t.new_empty(rows, length, heads, size) for t in (q, k))
    dw, dg = torch.empty_like(w), g.new_empty(tiles, *g.shape, dtype=torch.float32)
    chunks = triton.cdiv(length, chunk_size) if chunk_indices is None else len(chunk_indices)
    chunk_bwd_kernel_dqkwg[(tiles * chunks, rows * heads)](
        q=q, k=k, v=v, g=g, g_gamma=None, h=h, do=do, dh=dh, dq=dq, dk=dk, dw=dw, dv=dv, dg=dg, cu_seqlens=cu_seqlens,
        chunk_indices=chunk_indices, scale=scale, B=rows, T=length, H=groups, HV=heads, K=size, V=width,
        BT=chunk_size, BK=tile, BV=columns, STATE_V_FIRST=state_v_first,
    )  # fmt: skip
    dq, dk = (t.view(rows, length, groups, -1, size).sum(3) for t in (dq, dk))
    return dq, dk, dw, dg.sum(0)


@functools.cache
def check_gradients(device: torch.device, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """Compare the kernels' gradients with those of the plain PyTorch form, once per layer shape and dtype.

    Args:
        device: the GPU.
        heads: key heads and value heads; those of the layer, so that the kernels are compiled once.
        sizes: channels of a key and of a value.
        dtype: of keys and values.

    Raises:
        UserError: a gradient is wrong; training would go on silently with it.
    """
    if torch.cuda.is_current_stream_capturing():
        return  # a recorded pass follows an ordinary pass, which checked
    scan = functools.partial(run_kernels, kernels(device))
    # Outside the hooks and modes of activation checkpointing: a recomputed forward does not check again.
    with _disable_current_modes(), saved_tensors_hooks(_as_it_is, _as_it_is):
        wrong = gradient_errors(scan, device, heads, sizes, dtype)
    if wrong > _WORST_ERROR:
        import triton

        raise UserError(
            f"kernels.gated_delta=fla computes wrong gradients on {torch.cuda.get_device_name(device)} (relative error "
            f"{wrong:.2f}) with triton {triton.__version__}; install triton 3.7.1 or newer, or set "
            f"model.kernels.gated_delta=chunked, which is slower"
        )


@torch.enable_grad()
def gradient_errors(
    scan: Callable[[DeltaInputs], tuple[Tensor, Tensor]],
    device: torch.device,
    heads: tuple[int, int],
    sizes: tuple[int, int],
    dtype: torch.dtype,
) -> float:
    """Return the greatest relative error of a gradient of ``scan`` on two chunks and a half, with a document start."""
    generator = torch.Generator().manual_seed(0)
    length, (groups, count), (size, width) = 2 * _CHUNK + _CHUNK // 2, heads, sizes

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    q, k = (F.normalize(draw(1, length, groups, size), dim=-1) for _ in range(2))
    v, weight_BSHV = draw(1, length, count, width), draw(1, length, count, width)
    values = [q.to(dtype), k.to(dtype), v.to(dtype), -0.1 * draw(1, length, count).abs()]
    values.append(draw(1, length, count).sigmoid())
    first = _CHUNK + 5
    documents = Documents.from_positions(torch.cat([torch.arange(first), torch.arange(length - first)])[None])

    def gradients(run: Callable[[DeltaInputs], tuple[Tensor, Tensor]], place: Any, kind: Any) -> list[Tensor]:
        leaves = [t.to(place, kind or t.dtype).requires_grad_() for t in values]
        q, k, v, log_decay, beta = leaves
        y_BSHV, state_BHKV = run(DeltaInputs(q, k, v, log_decay, beta, _CHUNK, documents.to(place)))
        loss = (y_BSHV.double() * weight_BSHV.to(place)).sum() + state_BHKV.double().sum()
        return [t.double().cpu() for t in torch.autograd.grad(loss, leaves)]

    pairs = zip(gradients(scan, device, None), gradients(gated_delta_chunked, "cpu", torch.float64), strict=True)
    return max(float((mine - right).norm() / right.norm()) for mine, right in pairs)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
