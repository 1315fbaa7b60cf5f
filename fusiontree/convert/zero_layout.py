"""Positions of every parameter's elements in the flat partitions of a DeepSpeed ZeRO checkpoint.

ZeRO-1 and 2 concatenate the parameters of an optimizer group and split the result into equal partitions; ZeRO-3 splits
each parameter separately, and every rank concatenates its parts. A tensor parallel rank's files hold its shard of each
parameter.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fusiontree.models.config import ModelConfig
from fusiontree.models.initialization import no_weight_decay
from fusiontree.models.mixers.split import split_of
from fusiontree.parallel.global_tensor import ShardSpec

File = tuple[int, int]
"""Data parallel and tensor parallel rank: one file of optimizer state."""

_SUB_GROUP = 1_000_000_000
"""Elements of a rank after which DeepSpeed begins a new flat tensor (``stage3``'s ``sub_group_size``)."""


class Run(NamedTuple):
    """Consecutive elements of a tensor parallel rank's part of a parameter."""

    file: File
    group: int
    """Which flat tensor of that file."""
    offset: int
    """In the flat tensor."""
    start: int
    """In the part, row-major."""
    length: int


class ZeroLayout:
    """The layout of a model under one stage and one number of ranks."""

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        config: ModelConfig,
        *,
        stage: int,
        dp: int,
        tp: int,
        groups: list[list[str]] | None = None,
    ) -> None:
        """Work out the layout.

        Args:
            shapes: of the whole parameters, by name.
            config: of the model.
            stage: 1 | 2 | 3.
            dp: ranks that see other tokens (dp x cp).
            tp: tensor parallel ranks.
            groups: names in each flat tensor, in order; None makes DeepSpeed's of an optimizer whose first group
                decays and whose second does not.
        """
        self.stage, self.dp, self.tp, self.config = stage, dp, tp, config
        self.specs: dict[str, list[ShardSpec]] = {}
        for name, shape in shapes.items():
            split = split_of(name, config) if tp > 1 else None
            self.specs[name] = [ShardSpec.of(split, shape, r, tp) if split else ShardSpec(shape) for r in range(tp)]
        self.groups = groups if groups is not None else self._default_groups(list(shapes))
        self.sizes = [self._flat_size(group) for group in self.groups]
        """Elements of each flat tensor, the same in every file."""
        self._places: dict[str, tuple[int, int]] = {}
        """Which flat tensor a parameter is in, and the elements before it there (stage 3: in a rank's file)."""
        for group, names in enumerate(self.groups):
            before = 0
            for name in names:
                self._places[name] = (group, before)
                before += self._part(name) if stage == 3 else self.numel(name)

    def numel(self, name: str) -> int:
        """Return the elements of a tensor parallel rank's part."""
        return math.prod(self.specs[name][0].local_shape)

    def runs(self, name: str, tp_rank: int) -> list[Run]:
        """Return where the part of a tensor parallel rank lies, in order."""
        group, before = self._places[name]
        numel = self.numel(name)
        if self.stage < 3:
            size, first = self.sizes[group], before
            found = []
            for dp_rank in range(self.dp):
                low, high = max(dp_rank * size, first), min((dp_rank + 1) * size, first + numel)
                if low < high:
                    found.append(Run((dp_rank, tp_rank), group, low - dp_rank * size, low - first, high - low))
            return found
        offset, size = before, self._part(name)
        if self._over_all(name):  # cut over dp and tp; tp is innermost
            files = [(dp_rank, rank) for dp_rank in range(self.dp) for rank in range(self.tp)]
        else:
            files = [(dp_rank, tp_rank) for dp_rank in range(self.dp)]
        return [
            Run(file, group, offset, index * size, min(size, numel - index * size))
            for index, file in enumerate(files)
            if index * size < numel
        ]

    def holders(self, name: str) -> list[int]:
        """Return the tensor parallel ranks whose runs have to be written: all, or one where all ranks share them."""
        return [0] if self.stage == 3 and self._over_all(name) else list(range(self.tp))

    def padding(self, group: int) -> int:
        """Return how many elements at the end of the last rank's flat tensor belong to nothing (stages 1 and 2)."""
        return self.sizes[group] * self.dp - sum(self.numel(name) for name in self.groups[group])

    def _over_all(self, name: str) -> bool:
        return self.tp > 1 and not self.specs[name][0].is_split

    def _part(self, name: str) -> int:
        ranks = self.dp * (self.tp if self._over_all(name) else 1)
        return -(-self.numel(name) // ranks)

    def _flat_size(self, names: list[str]) -> int:
        if self.stage == 3:
            return sum(self._part(name) for name in names)
        aligned = 2 * self.dp  # DeepSpeed aligns partitions to four bytes of half precision
        return -(-sum(self.numel(name) for name in names) // aligned) * 2

    def _default_groups(self, names: list[str]) -> list[list[str]]:
        by_decay = [[n for n in names if no_weight_decay(n, self.config) is wanted] for wanted in (False, True)]
        groups = [group for group in by_decay if group]
        if self.stage < 3:
            return groups
        # A flat tensor holds parameters that are cut over the same ranks, in the order in which they first come.
        same_ranks: list[list[str]] = []
        for group in groups:
            kinds: dict[bool, list[str]] = {}
            for name in group:
                kinds.setdefault(self._over_all(name), []).append(name)
            same_ranks += kinds.values()
        found: list[list[str]] = []
        for group in same_ranks:
            size = 0
            found.append([])
            for name in group:
                if size >= _SUB_GROUP:
                    found.append([])
                    size = 0
                found[-1].append(name)
                size += self._part(name)
        return found
