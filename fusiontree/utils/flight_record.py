"""The communication library's own record of the last collectives: which were begun, by whom, and which never ended."""

from __future__ import annotations

import torch


def flight_record() -> bytes | None:
    """Return NCCL's flight record of this process, or None where there is none (CPU, an older torch).

    The bytes are what ``torchfrtrace`` reads (a pickle; only open your own). Environment variables that turn the
    recorder on are set in :func:`fusiontree.utils.environment.keep_flight_record`.
    """
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    return bytes(dump()) if dump and torch.distributed.is_nccl_available() else None
