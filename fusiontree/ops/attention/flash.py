"""Attention by flash-attn-4 (Hopper, Blackwell) and by torch's copy of flash-attn 2 (Ampere and newer).

Both packages take sequences of any lengths, define a window by the number of tokens left of a query, and align the last
query of a sequence with its last key. This module converts windows and documents accordingly: rows of one document
become sequences of equal length, packed documents become sequences bounded by ``cu_seqlens``. Under context
parallelism, keys can precede the queries. Keys that belong to the row's first document are prepended to its sequence;
earlier keys form a sequence with no queries, so the kernel returns zero gradients for them.

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
from fusiontree.ops.attention.reference import AttentionInputs
from fusiontree.ops.documents import Documents
from fusiontree.utils.errors import UserError

_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Starts of the sequences among the flattened queries and keys, and upper bounds of the longest sequence."""

    queries: Tensor
    """int32, [sequences + 1]."""
    keys: Tensor
    longest_queries: int
    longest_keys: int


class Attend(Protocol):
    """Interface to a package: tensors are ``[B, S, H, D]`` without sequences, ``[N, H, D]`` with sequences."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences | None, left: int, scale: float | None
    ) -> Tensor:
        """Return the outputs; a query sees its own token and ``left`` tokens before it (all if negative)."""


@dataclass(frozen=True)
class Package:
    """A package with kernels for attention."""

    name: str
    module: str
    install: str
    """How to install the package; part of the error message if it is missing."""
    least: tuple[int, int]
    """Minimum compute capability."""
    most: int
    """Highest supported major version of the compute capability."""
    widest: int
    """Maximum channels of a head."""
    distribution: str | None = None
    """Distribution that must be installed; set if other distributions contain an older module of the same name."""

    def unavailable(self, device: torch.device) -> str | None:
        """Return the reason why the package cannot run on ``device``, or None."""
        if device.type != "cuda":
            return "its kernels need a GPU"
        if not _installed(self.module, self.distribution):
            return f"{self.distribution or self.module} is not installed ({self.install})"
        capability = torch.cuda.get_device_capability(device)
        if capability < self.least or capability[0] > self.most:
            return f"it has no kernels for GPUs of compute capability {capability[0]}.{capability[1]}"
        return None

    def unfit(self, dtype: torch.dtype, width: int) -> str | None:
        """Return the reason why the package has no kernel for heads of ``width`` channels in ``dtype``, or None."""
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
    except ImportError:  # no such distribution, or the parent package of the module is missing
        return False


def load(name: str) -> Any:
    """Return the function of backend ``name`` that computes :func:`fusiontree.ops.attention.attention`."""
    attend = {"flash4": _flash4, "varlen": _varlen}[name](PACKAGES[name].module)
    return functools.partial(attention_flash, attend)


def attention_flash(attend: Attend, inputs: AttentionInputs) -> Tensor:
    """Compute :func:`fusiontree.ops.attention.attention` with the given package."""
    q_BSHD, k_BTKD, v_BTKD, window, documents, scale = inputs
    left = -1 if window is None or window >= k_BTKD.shape[1] else window - 1
    before = inputs.before
    if documents is None or documents.tokens_before is not None:
        others = 0 if documents is None or documents.tokens_before is None else before - documents.tokens_before
        if others > 0:
            k_BTKD, v_BTKD = k_BTKD[:, others:], v_BTKD[:, others:]
        return attend(q_BSHD, k_BTKD, v_BTKD, None, left, scale)
    q, k, v = (t.flatten(0, 1) for t in (q_BSHD, k_BTKD, v_BTKD))
    return attend(q, k, v, packed_sequences(documents, before), left, scale).unflatten(0, q_BSHD.shape[:2])


def packed_sequences(documents: Documents, before: int) -> Sequences:
    """Return the sequences of packed rows; the keys begin ``before`` tokens before the queries."""
    starts, longest = documents.cu_seqlens, documents.max_seqlen
    if before == 0:
        return Sequences(starts, starts, longest, longest)
    return _with_keys_before(documents.positions_BS, starts, longest, before)


@functools.lru_cache(maxsize=8)  # shared by the layers of a step; tensors hash by identity
def _with_keys_before(positions_BS: Tensor, starts: Tensor, longest: int, before: int) -> Sequences:
    """Return each row's sequences: first the keys that no query sees, then its documents. Does not synchronize.

    Keys of a document that starts in the row begin at its start; keys of the row's first document begin as far left as
    the position of its first token. Empty documents behind the last stay empty.
    """
    rows, length = positions_BS.shape
    with torch.inference_mode(False):  # the cached tensors must also be usable in training
        first = starts[:-1].clamp(max=rows * length - 1)
        reach = positions_BS.flatten()[first.long()].clamp(max=before).int()
        row = torch.arange(rows + 1, dtype=torch.int32, device=starts.device)
        of_documents = first + (first // length + 1) * before - reach
        of_documents = torch.where(starts[:-1] < rows * length, of_documents, rows * (length + before))
        of_keys = torch.cat([row * (length + before), of_documents])
        of_queries = torch.cat([row[:-1] * length, starts])
        return Sequences(of_queries.sort().values, of_keys.sort().values, longest, longest + before)


def _flash4(module: str) -> Attend:
    try:
        interface = import_module(f"{module}.interface")  # takes seconds, so import it now and not in the first step
        ours = "return_lse" in signature(interface._flash_attn_fwd).parameters
        why = f"{interface.__name__} is of another version, perhaps of flash-attn 2, which contains the same folder"
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
    """Return an interface to torch's function, which supports only packed sequences."""
    varlen_attn = import_module(module).varlen_attn
    # Versions without this argument support grouped key/value heads by default.
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
