"""A forward pass in lower precision over fp32 parameters that lie whole on the rank (ZeRO stages 1 and 2).

What FSDP2's mixed precision does: the parameters are cast, and nothing else is. Autocast would instead decide operation
by operation, and cast the fp32 products inside the scan too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fusiontree.parallel.shard_groups import ShardGroup


def compute_in(dtype: torch.dtype, groups: Iterator[list[ShardGroup]]) -> None:
    """Let each group's ``forward`` see its parameters cast to ``dtype``, except those of groups that stay in fp32.

    Call before activation checkpointing wraps the forwards, so that a recomputation sees the cast parameters too.
    """
    if dtype == torch.float32:
        return
    done: set[int] = set()
    for block in groups:
        cast: list[nn.Module] = []
        for group in block:
            owners = [module for owner in group.modules for module in owner.modules() if id(module) not in done]
            done |= {id(module) for module in owners}
            cast += [] if group.keep_fp32 else owners
        (outer,) = block[-1].modules
        outer.forward = partial(_forward_cast, outer.forward, cast, dtype)


def _forward_cast(
    forward: Callable[..., Any], owners: list[nn.Module], dtype: torch.dtype, *args: Any, **kwargs: Any
) -> Any:
    with _cast(owners, dtype):
        return forward(*args, **kwargs)


@contextmanager
def _cast(owners: list[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Put cast values, through which gradients flow, in the place of the modules' own parameters."""
    casts: dict[nn.Parameter, Tensor] = {}  # a tied parameter is cast once
    replaced: list[tuple[nn.Module, dict[str, nn.Parameter | None]]] = []
    try:
        for owner in owners:
            mine = dict(owner._parameters)
            replaced.append((owner, mine))
            for leaf, parameter in mine.items():
                if parameter is None:
                    continue
                if parameter not in casts:
                    casts[parameter] = parameter.to(dtype)
                del owner._parameters[leaf]
                owner.__dict__[leaf] = casts[parameter]
        yield
    finally:
        for owner, mine in replaced:
            for leaf in mine:
                owner.__dict__.pop(leaf, None)
            owner._parameters.clear()
            owner._parameters.update(mine)
