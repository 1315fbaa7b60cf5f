"""Chooses what a pruned model keeps: the cheapest removals first, until the model has the wanted cost."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from fusiontree.models.config import ModelConfig
from fusiontree.parallel.validate import tp_problems
from fusiontree.pruning.analysis import Part
from fusiontree.pruning.costs import Costs
from fusiontree.pruning.shapes import BRANCH_OF, KINDS, KeptLayer, everything, pruned_config
from fusiontree.utils.errors import UserError

_LEAST_LOSS = 1e-6
"""Nats per token that every removal is taken to cost: measured on few rows, some seem to lower the loss."""
_OVERSHOOT = 0.02
"""Share of the model's cost by which a removal may miss the target while smaller ones are left."""


class _Removal(NamedTuple):
    """One step of the search."""

    layer: int
    kept: KeptLayer | None
    """The layer after the removal; None if it is removed."""
    loss: float
    """Estimate of the loss that it costs."""
    saved: float
    parts: tuple[Part, ...]


def check_share(target: float) -> None:
    """Check the wanted share of a cost, before anything is measured.

    Raises:
        UserError: it is not between 0 and 1.
    """
    if not 0 < target < 1:
        raise UserError(f"--target {target} is not between 0 and 1")


def make_plan(config: ModelConfig, parts: Sequence[Part], costs: Costs, target: float, tp: int = 1) -> list[KeptLayer]:
    """Return what to keep so that the model costs at most ``target`` times what it costs now.

    Greedy: applies the removal of the least loss per saved cost, again and again. The losses were measured one by one;
    those of further units of a module count 1 / (share of the module that is left) times, and what was spent on a
    branch's or layer's units is subtracted from the loss of the whole.

    Args:
        config: of the source.
        parts: removable parts with their losses.
        costs: in the wanted measure.
        target: share of the cost, between 0 and 1.
        tp: tensor parallel size that the pruned model must allow.

    Raises:
        UserError: ``target`` cannot be reached, or the source does not allow ``tp``.
    """
    check_share(target)
    if problems := list(tp_problems(config, tp)):
        raise UserError(f"--tp {tp} does not fit the model: {'; '.join(problems)}")
    search = _Search(config, parts, costs, tp)
    full = search.total
    goal = target * full
    while search.total > goal:
        removals = [r for r in search.removals() if r.saved > 0]
        if not removals:
            raise UserError(
                f"--target {target} of {costs.measure} is out of reach: {search.total / full:.3f} is the smallest that "
                f"keeps a layer, a head of every mixer and an eighth of every MLP"
            )
        near = [r for r in removals if search.total - r.saved >= goal - _OVERSHOOT * full]
        search.apply(min(near or removals, key=lambda r: r.loss / r.saved))
    return [search.kept[layer] for layer in sorted(search.kept)]


class _Search:
    """The layers that are left, and what was spent on removals."""

    def __init__(self, config: ModelConfig, parts: Sequence[Part], costs: Costs, tp: int) -> None:
        self.config, self.costs, self.tp = config, costs, tp
        self.kept = {kept.layer: kept for kept in everything(config)}
        self.full = {layer: kept.units for layer, kept in self.kept.items()}
        self.parts: dict[int, list[Part]] = {layer: [] for layer in self.kept}
        for part in parts:
            self.parts[part.layer].append(part)
        self.spent: dict[tuple[int, str], float] = {}
        """Loss spent on units, by layer and by layer and mixer."""
        self.total = costs.total(list(self.kept.values()))
        self._allowed: dict[tuple[object, ...], bool] = {}
        self._found: dict[int, list[_Removal]] = {}

    def removals(self) -> Iterator[_Removal]:
        """Yield every removal that is possible now."""
        for layer, kept in self.kept.items():
            if layer not in self._found:
                self._found[layer] = list(self._of_layer(layer, kept))
            for removal in self._found[layer]:
                if removal.kept is None and len(self.kept) == 1:
                    continue
                scale = self.config.num_layers / len(self.kept) if removal.kept is None else 1.0
                yield removal._replace(loss=removal.loss * scale)

    def apply(self, removal: _Removal) -> None:
        """Apply a removal."""
        self.total -= removal.saved
        self._found.pop(removal.layer)
        if removal.kept is None:
            del self.kept[removal.layer]
            return
        self.kept[removal.layer] = removal.kept
        for part in removal.parts:
            for place in ("", BRANCH_OF.get(part.kind, part.mixer or part.kind)):
                key = (removal.layer, place)
                self.spent[key] = self.spent.get(key, 0.0) + max(part.loss, 0.0)

    def _of_layer(self, layer: int, kept: KeptLayer) -> Iterator[_Removal]:
        cost = self.costs.of(kept)
        for part in self.parts[layer]:
            if part.kind == "layer":
                loss = part.loss - self.spent.get((layer, ""), 0.0)
                yield _Removal(layer, None, max(loss, _LEAST_LOSS), cost, (part,))
            elif part.kind == "branch" and len(kept.branches) > 1 and part.mixer in kept.branches:
                lone = _without_branch(kept, part.mixer)
                loss = part.loss - self.spent.get((layer, part.mixer), 0.0)
                if self._fits(lone):
                    yield _Removal(layer, lone, max(loss, _LEAST_LOSS), cost - self.costs.of(lone), (part,))
        for kind in KINDS:
            removal = self._of_units(layer, kept, kind, cost)
            if removal is not None:
                yield removal

    def _of_units(self, layer: int, kept: KeptLayer, kind: str, cost: float) -> _Removal | None:
        """Return the removal of the cheapest unit of a kind, or of the fewest that tensor parallelism allows."""
        have = set(kept.units[kind])
        left = sorted(
            (p for p in self.parts[layer] if p.kind == kind and have.issuperset(p.units)), key=lambda p: p.loss
        )
        for count in range(1, self.tp + 1 if kind != "mlp" else 2):
            chosen = tuple(left[:count])
            units = {unit for part in chosen for unit in part.units}
            smaller = replace(kept, units={**kept.units, kind: tuple(sorted(have - units))})
            if len(chosen) < count or _is_empty(smaller, kind):
                return None
            if not self._fits(smaller):
                continue
            share = len(have) / len(self.full[layer][kind])
            loss = sum(max(part.loss, _LEAST_LOSS) for part in chosen) / share
            return _Removal(layer, smaller, loss, cost - self.costs.of(smaller), chosen)
        return None

    def _fits(self, kept: KeptLayer) -> bool:
        """Return whether tensor parallelism can split the layer."""
        if self.tp == 1:
            return True
        key = (self.config.pattern[kept.layer], kept.branches, *(len(units) for units in kept.units.values()))
        if key not in self._allowed:
            self._allowed[key] = not any(tp_problems(pruned_config(self.config, [kept]), self.tp))
        return self._allowed[key]


def _is_empty(kept: KeptLayer, kind: str) -> bool:
    units = kept.units
    return not (units["local"] or units["global"] if kind in ("local", "global") else units[kind])


def _without_branch(kept: KeptLayer, mixer: str) -> KeptLayer:
    units = {kind: () if BRANCH_OF.get(kind) == mixer else held for kind, held in kept.units.items()}
    return replace(kept, branches=tuple(name for name in kept.branches if name != mixer), units=units)


def random_plan(config: ModelConfig, plan: Sequence[KeptLayer], seed: int) -> list[KeptLayer]:
    """Return a plan of the same shapes that keeps random layers and units, as a baseline.

    Shapes move only between layers that are equal in the source.
    """
    draw = random.Random(seed)
    full = {kept.layer: kept for kept in everything(config)}
    by_kind: dict[tuple[object, ...], list[int]] = {}
    for layer in full:
        by_kind.setdefault((config.pattern[layer], config.window_of_layer(layer)), []).append(layer)
    place: dict[int, int] = {}
    for layers in by_kind.values():
        place.update(zip(layers, draw.sample(layers, len(layers)), strict=True))
    found = []
    for kept in plan:
        source = full[place[kept.layer]]
        units = {
            kind: tuple(sorted(draw.sample(source.units[kind], len(held)))) if held else ()
            for kind, held in kept.units.items()
        }
        found.append(KeptLayer(source.layer, kept.branches, units))
    return sorted(found, key=lambda kept: kept.layer)
