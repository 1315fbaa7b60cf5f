"""The runs of a study: settings, budget in steps, and folder of each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from fusiontree.config.load import load_config
from fusiontree.config.root import Config
from fusiontree.models.flops import training_flops_per_token
from fusiontree.planning.cost_model import count_parameters
from fusiontree.studying.config import StudyConfig
from fusiontree.utils.errors import UserError

_LARGEST_MISMATCH = 0.02
"""Relative difference of parameters that ``match_parameters`` accepts."""
_OWN = {
    "run_dir": "--out",
    "training.learning_rate": "learning_rates",
    "training.max_steps": "tokens of the size",
    "training.seed": "seeds",
    "training.warmup_steps": "warmup",
}
"""Settings that a study makes -> what they follow from."""


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    size: str
    arm: str
    seed: int
    rate: float | None
    """Peak learning rate; None until the arm's search on the first size has ended."""
    searched: bool
    """Whether the run is one of a search: its folder names the rate."""
    config: str
    overrides: tuple[str, ...]
    """Settings over ``config``, without those that depend on seed, rate and folder."""
    parameters: int
    flops_per_token: float
    """Training FLOPs per token in rows of one document."""
    steps: int
    tokens_per_step: int

    @property
    def name(self) -> str:
        """Folder of the run in the study's."""
        rate = f"lr-{self.rate:g}-" if self.searched else ""
        return f"{self.size}/{self.arm}/{rate}seed-{self.seed}"

    @property
    def tokens(self) -> int:
        """Training tokens."""
        return self.steps * self.tokens_per_step

    @property
    def flops(self) -> float:
        """Training FLOPs."""
        return self.tokens * self.flops_per_token

    def arguments(self, folder: Path) -> list[str]:
        """Return the options of ``fusiontree.train``, for the run's folder in the study's ``folder``."""
        assert self.rate is not None
        last = [f"training.learning_rate={self.rate!r}", f"training.seed={self.seed}", f"run_dir={folder / self.name}"]
        return ["--config", self.config, *self.overrides, *last]


def plan_runs(study: StudyConfig) -> list[Run]:
    """Return all runs, those of the reference first at every size; rates that a search decides are None.

    Raises:
        UserError: a configuration of a run is invalid, or no model of the reference's parameters can be made.
    """
    runs: list[Run] = []
    first = next(iter(study.sizes))
    search = len(study.learning_rates) > 1
    smallest = 0
    for size in study.sizes:
        models = _runs_of_size(study, size)
        smallest = smallest or models[0].parameters
        factor = (smallest / models[0].parameters) ** study.rate_exponent
        for model in models:
            for seed in study.seeds_of(size):
                if search and size == first and seed == study.seeds_of(size)[0]:
                    runs += [replace(model, seed=seed, rate=rate, searched=True) for rate in study.learning_rates]
                else:
                    rate = None if search else study.learning_rates[0] * factor
                    runs.append(replace(model, seed=seed, rate=rate))
    return runs


def choose_rates(study: StudyConfig, runs: list[Run], loss_of: Callable[[Run], float | None]) -> list[Run]:
    """Return ``runs`` with the rates that their arms' searches decided.

    Args:
        study: the study.
        runs: of :func:`plan_runs`.
        loss_of: final loss of a finished run; NaN for a failed one, None for one that is not finished.
    """
    parameters = {run.size: run.parameters for run in runs if run.arm == study.reference}
    first = next(iter(study.sizes))
    chosen = {arm: chosen_rate(search_of(runs, arm, loss_of)) for arm in study.arms}
    found = []
    for run in runs:
        rate = chosen[run.arm]
        if run.rate is None and rate is not None:
            run = replace(run, rate=rate * (parameters[first] / parameters[run.size]) ** study.rate_exponent)
        found.append(run)
    return found


def search_of(
    runs: Sequence[Run], arm: str, loss_of: Callable[[Run], float | None]
) -> Iterable[tuple[float | None, float | None]]:
    """Return loss, as in :func:`choose_rates`, and rate of every run of an arm's search."""
    return ((loss_of(run), run.rate) for run in runs if run.searched and run.arm == arm)


def chosen_rate(search: Iterable[tuple[float | None, float | None]]) -> float | None:
    """Return the rate of the lowest loss, or None: there is no search, it goes on, or all its runs failed.

    ``search`` has loss and rate of every run of an arm's search; the loss is NaN for a failed run and None for one that
    is not finished.
    """
    found = list(search)
    if any(loss is None for loss, _ in found):
        return None
    good = [(loss, rate) for loss, rate in found if loss is not None and loss == loss and rate is not None]
    return min(good)[1] if good else None


def _runs_of_size(study: StudyConfig, size: str) -> list[Run]:
    """Return one run per arm of a size, the reference's first, without seed and rate."""
    values = study.sizes[size]
    reference = _load(study, size, study.reference, [])
    parameters = sum(count_parameters(reference.model, tp=1)[:2])
    steps = max(1, round(values.tokens / _tokens_per_step(reference)))
    budget = _cost(study, reference) * steps
    others = [arm for arm in study.arms_of(size) if arm != study.reference]
    runs = []
    for arm in (study.reference, *others):
        fitted = _fitted(study, size, arm, parameters)
        config = _load(study, size, arm, fitted)
        steps = max(1, round(budget / _cost(study, config)))
        overrides = [*_overrides(study, size, arm), *fitted, f"training.max_steps={steps}"]
        overrides.append(f"training.warmup_steps={int(study.warmup * steps)}")
        if config.data.validation:
            overrides.append(f"training.validation.interval={max(1, -(-steps // study.validations))}")
        _load_with(study, size, arm, overrides)  # the schedule may not fit few steps
        runs.append(
            Run(
                size=size,
                arm=arm,
                seed=0,
                rate=None,
                searched=False,
                config=values.config,
                overrides=tuple(overrides),
                parameters=sum(count_parameters(config.model, tp=1)[:2]),
                flops_per_token=training_flops_per_token(config.model, config.training.seq_len),
                steps=steps,
                tokens_per_step=_tokens_per_step(config),
            )
        )
    return runs


def _tokens_per_step(config: Config) -> int:
    return config.training.global_batch_size * config.training.seq_len


def _cost(study: StudyConfig, config: Config) -> float:
    """Return what one step spends of the budget."""
    per_token = training_flops_per_token(config.model, config.training.seq_len) if study.equal == "flops" else 1.0
    return per_token * _tokens_per_step(config)


def _overrides(study: StudyConfig, size: str, arm: str) -> list[str]:
    """Return the settings of an arm as overrides, the more special ones last."""
    setup = study.arms[arm]
    merged: dict[str, Any] = {**study.set, **study.sizes[size].set, **setup.set, **setup.sizes.get(size, {})}
    if own := sorted(_OWN.keys() & merged.keys()):
        name = own[0]
        raise UserError(
            f"size {size}, arm {arm}: set gives '{name}' {merged[name]!r}, which the study sets itself; give "
            f"{_OWN[name]} instead"
        )
    return [f"{name}={json.dumps(value)}" for name, value in merged.items()]


def _load(study: StudyConfig, size: str, arm: str, fitted: list[str]) -> Config:
    overrides = [*_overrides(study, size, arm), *fitted]
    if study.arms[arm].pattern and not fitted:
        overrides += _pattern(study, size, arm)
    return _load_with(study, size, arm, overrides)


def _load_with(study: StudyConfig, size: str, arm: str, overrides: list[str]) -> Config:
    """Return a configuration; an error names size and arm."""
    try:
        return load_config(study.sizes[size].config, [*overrides, "run_dir=check"])
    except UserError as error:
        raise UserError(f"size {size}, arm {arm}: {error}") from error


def _pattern(study: StudyConfig, size: str, arm: str, layers: int | None = None) -> list[str]:
    """Return the overrides of an arm's repeated pattern; ``layers`` None means the configuration's number."""
    pattern = study.arms[arm].pattern
    if layers is None:
        layers = _load_with(study, size, arm, _overrides(study, size, arm)).model.num_layers
    found = [f"model.num_layers={layers}"]
    if pattern:
        found.append(f"model.layer_pattern={(pattern * layers)[:layers]}")
    return found


def _fitted(study: StudyConfig, size: str, arm: str, parameters: int) -> list[str]:
    """Return the overrides that give an arm its pattern and, if it asks so, the reference's number of ``parameters``.

    Raises:
        UserError: no number of layers and width of the MLP comes within 2%.
    """
    setup = study.arms[arm]
    if not setup.match_parameters:
        return _pattern(study, size, arm) if setup.pattern else []
    period = len(setup.pattern or "F")
    hidden = _load(study, size, arm, _pattern(study, size, arm, period)).model.hidden_size

    @cache
    def count(layers: int, width: int | None) -> int:
        overrides = _pattern(study, size, arm, layers)
        if width is not None:
            overrides.append(_mlp(width, hidden))
        return sum(count_parameters(_load(study, size, arm, overrides).model, tp=1)[:2])

    per_period = count(2 * period, None) - count(period, None)
    periods = max(1, round((parameters - count(period, None)) / per_period) + 1)
    layers = periods * period
    config = _load(study, size, arm, _pattern(study, size, arm, layers))
    multiple = min(64, max(1, hidden // 8))
    per_width = layers * hidden * (3 if config.model.mlp_activation == "swiglu" else 2)
    width = config.model.mlp_size + (parameters - count(layers, None)) / per_width
    width = max(1, round(width / multiple)) * multiple
    found = count(layers, width)
    if abs(found / parameters - 1) > _LARGEST_MISMATCH:
        raise UserError(
            f"size {size}, arm {arm}: match_parameters comes to {found:,} parameters with {layers} layers, and the "
            f"reference has {parameters:,}; they differ by more than {_LARGEST_MISMATCH:.0%}. Set num_layers and "
            f"mlp_ratio of the arm instead"
        )
    return [*_pattern(study, size, arm, layers), _mlp(width, hidden)]


def _mlp(width: int, hidden: int) -> str:
    return f"model.mlp_ratio={(width + 0.5) / hidden!r}"  # mlp_size rounds down
