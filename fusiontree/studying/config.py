"""A study's file: sizes, arms, budget, learning rates and seeds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from fusiontree.config.load import parse_yaml
from fusiontree.config.packaged import find_file, hint_for
from fusiontree.utils.errors import UserError, nearest
from fusiontree.utils.files import read_text
from fusiontree.utils.settings import PathText, Section, explain, setting


class SizeConfig(Section):
    """A size of the ladder."""

    config: PathText = setting(..., "Configuration of the size: a file or a packaged name.")
    tokens: float = setting(..., "Training tokens of the reference arm.", unit="tokens", gt=0)
    set: dict[str, Any] = setting(dict, "Settings of all runs of this size, by dotted name.")
    arms: list[str] | None = setting(None, "Arms of this size. Absent means all.", min_length=1)
    seeds: list[int] | None = setting(None, "Seeds of this size. Absent means the study's.", min_length=1)


class ArmConfig(Section):
    """An arm: how its model differs from the size's configuration."""

    note: str = setting("", "What the arm shows, for the report.")
    set: dict[str, Any] = setting(dict, "Settings of the arm, by dotted name.")
    sizes: dict[str, dict[str, Any]] = setting(dict, "Settings of the arm at single sizes, by name of the size.")
    pattern: str | None = setting(None, "Letters that are repeated to the number of layers (layer_pattern).")
    match_parameters: bool = setting(
        False,
        "Choose number of layers and width of the MLP so that the model has as many parameters as the reference arm.",
    )


class StudyConfig(Section):
    """A study: arms trained at every size with every seed."""

    purpose: str = setting("", "The question, for the report.")
    reference: str = setting(..., "Arm that sets the budget and that the others are compared with.")
    equal: Literal["flops", "tokens"] = setting(
        "flops", "What every run of a size spends as the reference arm does: training FLOPs, or tokens."
    )
    seeds: list[int] = setting([0, 1], "Seeds: initial weights and data order.", min_length=1)
    learning_rates: list[Annotated[float, Field(gt=0)]] = setting(
        ...,
        "Peak learning rates. With several, every arm trains with each on the first size and first seed, and the rate "
        "of the lowest final loss is used from then on.",
        min_length=1,
    )
    rate_exponent: float = setting(
        0.5, "Larger sizes use the rate of the first size times (parameters of the first / of the size)^rate_exponent."
    )
    warmup: float = setting(0.05, "Fraction of a run's steps that warm up.", ge=0, lt=1)
    validations: int = setting(20, "Validations per run.", ge=1)
    set: dict[str, Any] = setting(dict, "Settings of all runs, by dotted name.")
    sizes: dict[str, SizeConfig] = setting(..., "Sizes by name, the smallest first.", min_length=1)
    arms: dict[str, ArmConfig] = setting(..., "Arms by name.", min_length=1)
    evaluate: list[str] = setting(
        list, "Options of fusiontree evaluate that every finished run is measured with. Empty means none."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.reference not in self.arms:
            raise ValueError(f"reference '{self.reference}' is no arm; arms are {', '.join(self.arms)}")
        for name in (*self.arms, *self.sizes):
            if not re.fullmatch(r"[\w+-][\w.+-]*", name):
                raise ValueError(f"'{name}' names a folder; use letters, digits and . _ + -, no . at the start")
        if len({f"{rate:g}" for rate in self.learning_rates}) < len(self.learning_rates):
            raise ValueError(f"learning_rates {self.learning_rates}: give rates that differ in six digits")
        for size in self.sizes:
            chosen = self.arms_of(size)
            if unknown := [arm for arm in chosen if arm not in self.arms]:
                raise ValueError(f"sizes.{size}.arms names {unknown}; arms are {', '.join(self.arms)}")
            if self.reference not in chosen:
                raise ValueError(f"sizes.{size}.arms lacks the reference '{self.reference}', which sets the budget")
            if len(set(chosen)) < len(chosen):
                raise ValueError(f"sizes.{size}.arms {chosen} names an arm twice; runs would count as further seeds")
            seeds = self.seeds_of(size)
            if len(set(seeds)) < len(seeds) or min(seeds) < 0:
                raise ValueError(f"seeds {seeds} of size {size}: give different numbers from 0")
        first, *later = self.sizes
        if len(self.learning_rates) > 1:
            for size in later:
                if missing := [arm for arm in self.arms_of(size) if arm not in self.arms_of(first)]:
                    raise ValueError(
                        f"sizes.{size} has {missing}, which {first} lacks; their learning rates are chosen there"
                    )
        for arm, setup in self.arms.items():
            if unknown := [size for size in setup.sizes if size not in self.sizes]:
                raise ValueError(f"arms.{arm}.sizes names {unknown}; sizes are {', '.join(self.sizes)}")
        return self

    def arms_of(self, size: str) -> list[str]:
        """Return the arms of a size."""
        return self.sizes[size].arms or list(self.arms)

    def seeds_of(self, size: str) -> list[int]:
        """Return the seeds of a size."""
        return self.sizes[size].seeds or self.seeds


def load_study(path: Path) -> StudyConfig:
    """Read a study's file; ``path`` is a file or a packaged name such as ``blocks``.

    Raises:
        UserError: the file is missing or no YAML, or a setting is unknown or wrong.
    """
    path = find_file(path, "study")
    if not path.is_file():
        raise UserError(f"study '{path}' does not exist{hint_for(path, 'study')}")
    values = parse_yaml(read_text(path), str(path), StudyConfig.known_keys())
    if not isinstance(values, dict):
        raise UserError(f"study '{path}' is empty or no mapping; it needs reference, learning_rates, sizes and arms")
    try:
        return StudyConfig.model_validate(values)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {_explain(problem)}" for problem in error.errors())) from None


def _explain(problem: Any) -> str:
    """Return place, value and way out of one mistake in a study's file."""
    parts = [str(part) for part in problem["loc"]]
    place = ".".join(parts)
    if problem["type"] == "extra_forbidden":
        sections: dict[str, type[Section]] = {"arms": ArmConfig, "sizes": SizeConfig}
        section = sections.get(parts[0], StudyConfig)
        known = section.known_keys()
        return f"unknown key '{place}'{nearest(parts[-1], known)}; known are {', '.join(known)}"
    return explain(problem, place)
