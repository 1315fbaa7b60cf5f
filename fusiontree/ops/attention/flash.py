"""Attention by flash-attn-4 (Hopper, Blackwell) and by torch's own copy of flash-attn 2 (Ampere and newer).

Both take sequences of any lengths, count a window by the tokens left of a query, and let the last query of a sequence
see its last key. Here windows and documents become that: whole rows are sequences of one length, packed documents are
cut at ``cu_seqlens``. Where keys come before the queries (a context parallel piece), a row's first document has them in
front of it, and those of other documents are a sequence without queries, whose gradients the kernels set to zero.

Shape legend: B rows, S queries, T keys, H query heads, K key/value heads, D channels of a head, N = B S tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor

from fusiontree.ops.attention.flash4 import flash4
from fusiontree.ops.documents import Documents
from fusiontree.utils.errors import UserError

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where sequences begin among the flattened queries and keys, and how many tokens the longest has at most."""

    queries: Tensor
    """int32, [sequences + 1]."""
    keys: Tensor
    longest_queries: int
    longest_keys: int


class Attend(Protocol):
    """How a package is called: ``[B, S, H, D]`` without sequences, ``[N, H, D]`` with them."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None, left: int, scale: float | None
    ) -> Tensor:
        """Return the outputs; a query sees ``left`` tokens before its own, all of them if negative."""


@dataclass(frozen=True)
class Package:
    """A package with kernels for attention."""

    name: str
    module: str
    install: str
    """What to install where it is missing."""
    least: tuple[int, int]
    """Compute capability that it needs."""
    most: int
    """Compute capability's last major number that it has kernels for."""
    widest: int
    """Channels of a head, at most."""
    distribution: str | None = None
    """What must be installed, where other distributions bring an older module of that name."""

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on ``device``, or None."""
        if device.type != "cuda":
            return "its kernels need a GPU"
        if not _installed(self.module, self.distribution):
            return f"{self.distribution or self.module} is not installed ({self.install})"
        capability = torch.cuda.get_device_capability(device)
        if capability < self.least or capability[0] > self.most:
            return f"it has no kernels for GPUs of compute capability {capability[0]}.{capability[1]}"
        return None

    def unfit(self, dtype: torch.dtype, width: int) -> str | None:
        """Why it has no kernel for heads of ``width`` channels in ``dtype``, or None."""
        if dtype not in _HALF:
            return f"its kernels compute in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}"
        if width % 8 or width > self.widest:
            return f"its heads have a multiple of 8 channels up to {self.widest}, not {width}"
        return None


PACKAGES = {
    p.name: p
    for p in (
        Package("flash4", "flash_attn.cute", "pip install 'fusiontree[cuda]'", (9, 0), 12, 128, "flash-attn-4"),
        Package("varlen", "torch.nn.attention.varlen", "it comes with torch", (8, 0), 99, 256),
    )
}


def _installed(module: str, distribution: str | None) -> bool:
    try:
        if distribution is not None:
            metadata.version(distribution)
        return find_spec(module) is not None
    except ImportError:  # no such distribution, or not the package that the module lies in
        return False


def load(name: str) -> Any:
    """Return the backend ``name``, which computes :func:`fusiontree.ops.attention.attention`."""
    attend = {"flash4": _flash4, "varlen": _varlen}[name](PACKAGES[name].module)
    return functools.partial(attention_flash, attend)


def attention_flash(
    attend: Attend,
    q_BSHD: Tensor,
    k_BTKD: Tensor,
    v_BTKD: Tensor,
    *,
    window: int | None = None,
    documents: Documents | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute :func:`fusiontree.ops.attention.attention` by a package's call."""
    rows, queries = q_BSHD.shape[:2]
    keys = k_BTKD.shape[1]
    left = -1 if window is None or window >= keys else window - 1
    before = keys - queries
    if documents is None or documents.tokens_before is not None:
        others = 0 if documents is None or documents.tokens_before is None else before - documents.tokens_before
        if others > 0:
            k_BTKD, v_BTKD = k_BTKD[:, others:], v_BTKD[:, others:]
        return attend(q_BSHD, k_BTKD, v_BTKD, None, left, scale)
    q, k, v = (t.flatten(0, 1) for t in (q_BSHD, k_BTKD, v_BTKD))
    return attend(q, k, v, packed_sequences(documents, before), left, scale).unflatten(0, (rows, queries))


def packed_sequences(documents: Documents, before: int) -> Sequences:
    """Return the sequences of packed rows whose keys begin ``before`` tokens left of the queries."""
    starts, longest = documents.cu_seqlens, documents.max_seqlen
    if before == 0:
        return Sequences(starts, starts, longest, longest)
    return _with_keys_before(documents.positions_BS, starts, longest, before)


@functools.lru_cache(maxsize=8)  # every layer of a step asks for the same; tensors are told apart by identity
def _with_keys_before(positions_BS: Tensor, starts: Tensor, longest: int, before: int) -> Sequences:
    """Sequences of each row: the keys that no query sees, then its documents; nothing here waits for the device.

    A document that begins in the row reaches back to its start, the row's first one as far as its position says.
    """
    rows, length = positions_BS.shape
    with torch.inference_mode(False):  # a later step may keep what an evaluation asked for first
        first = starts[:-1]
        reach = positions_BS.flatten()[first.long()].clamp(max=before).int()
        row = torch.arange(rows + 1, dtype=torch.int32, device=starts.device)
        of_keys = torch.cat([row * (length + before), first + (first // length + 1) * before - reach])
        of_queries = torch.cat([row[:-1] * length, starts])
        return Sequences(of_queries.sort().values, of_keys.sort().values, longest, longest + before)


def _flash4(module: str) -> Attend:
    try:
        interface = import_module(f"{module}.interface")  # takes seconds: here, not in the first step
        ours = "return_lse" in signature(interface._flash_attn_fwd).parameters
        why = f"{interface.__name__} is of another version, perhaps of flash-attn 2, which brings that folder too"
    except ImportError as error:
        ours, why = False, str(error)
    if not ours:
        raise UserError(
            f"flash-attn-4 is installed and cannot be used: {why}; install it again "
            f"(pip install --force-reinstall --no-deps flash-attn-4) or set model.kernels.attention=flex"
        )

    def attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None, left: int, scale: float | None) -> Tensor:
        if sequences is None:
            return flash4(q, k, v, None, None, 0, 0, left, scale)
        longest = sequences.longest_queries, sequences.longest_keys
        return flash4(q, k, v, sequences.queries, sequences.keys, *longest, left, scale)

    return attend


def _varlen(module: str) -> Attend:
    """Return the call of torch's function, which knows packed sequences only."""
    varlen_attn = import_module(module).varlen_attn
    # Versions without the argument take fewer key/value heads as they are.
    grouped = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}

    def attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None, left: int, scale: float | None) -> Tensor:
        if sequences is None:
            rows = q.shape[:2]
            sequences = _equal_rows(*rows, k.shape[1], q.device)
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            return attend(q, k, v, sequences, left, scale).unflatten(0, rows)
        return varlen_attn(
            q, k, v, sequences.queries, sequences.keys, sequences.longest_queries, sequences.longest_keys,
            scale=scale, window_size=(left, 0), **grouped,
        )  # fmt: skip

    return attend


@functools.lru_cache(maxsize=64)
def _equal_rows(rows: int, queries: int, keys: int, device: torch.device) -> Sequences:
    with torch.inference_mode(False):
        row = torch.arange(rows + 1, dtype=torch.int32, device=device)
        return Sequences(row * queries, row * keys, queries, keys)
