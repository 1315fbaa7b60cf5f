"""What a results.json must have so that a report can be made of it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator


class _Curve(BaseModel, strict=True):
    tokens: list[float]
    seconds: list[float]
    loss: list[float]
    validation_tokens: list[float]
    validation_loss: list[float]
    tokens_per_s: float | None


class _Run(BaseModel, strict=True):
    size: str
    arm: str
    seed: int
    searched: bool
    name: str
    rate: float | None
    parameters: int
    steps: int
    tokens: int
    flops_per_token: float
    state: Literal["waiting", "failed", "unfinished", "finished"]
    trained: bool = False
    final_loss: float | None = None
    curve: _Curve | None = None
    evaluation: dict[str, list[dict[str, Any]]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.state == "finished" and (self.curve is None or self.rate is None):
            raise ValueError(f"'{self.name}' is finished and has no curve or no rate")
        return self


class _Arm(BaseModel, strict=True):
    note: str


class _Study(BaseModel, strict=True):
    purpose: str
    reference: str
    equal: str
    learning_rates: list[float]
    rate_exponent: float
    sizes: dict[str, dict[str, Any]]
    arms: dict[str, _Arm]


class ResultsFile(BaseModel, strict=True):
    """The content of a results.json; further keys are allowed."""

    study: _Study
    failed: dict[str, str]
    runs: list[_Run]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for run in self.runs:
            for what, name, names in (("size", run.size, self.study.sizes), ("arm", run.arm, self.study.arms)):
                if name not in names:
                    raise ValueError(f"run '{run.name}' has {what} '{name}', which the study lacks")
        return self
