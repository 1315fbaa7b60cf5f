"""Early start of a kernel, before the one ahead of it in the stream has ended (programmatic dependent launch).

A step is a chain of kernels of a few microseconds, and the start of each costs about one. A kernel that starts early
loads its weights, which no kernel writes, and then waits for the end of the one ahead. Waiting is transitive as long as
every such kernel waits in all of its programs; a kernel without an early start waits by itself. A kernel lets its
successor start only behind its own wait: no more than two kernels of a stream then run at a time, and a buffer that is
used again is not read by a third.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


def early_start(device: torch.device, follows: bool) -> tuple[bool, dict[str, Any]]:
    """Return whether a kernel may let its successor start early, and the launch options of its own early start.

    Args:
        device: of the launch.
        follows: the launch ahead in the stream is a kernel, with no other stream's work joined in between: what a CUDA
            graph records for an early start is an edge from one kernel. The kernel must wait if the options are given.
    """
    if not _starts_early(device):
        return False, {}
    return True, {"launch_pdl": True} if follows else {}


@functools.cache
def _starts_early(device: torch.device) -> bool:
    """Return whether ``device`` and the installed Triton know early starts: Hopper and later."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (9, 0):
        return False
    import triton.language as tl
    from triton.backends.nvidia.compiler import CUDAOptions

    return "launch_pdl" in CUDAOptions.__dataclass_fields__ and hasattr(tl.extra.cuda, "gdc_launch_dependents")
