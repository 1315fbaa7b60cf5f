"""Noise between seeds, a test of differences, and fitted loss curves; needs NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05
"""Probability with which a size's test names at least one difference though none exists."""
_EXPONENTS = np.linspace(0.02, 1.5, 149)
_FEWEST_POINTS = 5
"""Points of a fit with three parameters."""


@dataclass(frozen=True)
class Noise:
    """Standard deviation between seeds, pooled over the arms of a size."""

    std: float
    degrees: int
    """Degrees of freedom: runs minus arms."""


def pooled_noise(losses: Sequence[Sequence[float]]) -> Noise | None:
    """Return the pooled standard deviation of the arms' final losses; None if no arm has two seeds."""
    groups = [np.asarray(values, dtype=float) for values in losses if len(values) > 1]
    degrees = sum(len(group) - 1 for group in groups)
    if not degrees:
        return None
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups)
    return Noise(math.sqrt(squares / degrees), degrees)


def least_difference(noise: Noise, seeds: int, other_seeds: int, comparisons: int) -> float:
    """Return the difference of two means that the test calls significant.

    Two-sided t-test with the pooled standard deviation; :data:`LEVEL` is divided by the number of comparisons
    (Bonferroni).
    """
    quantile = t_quantile(1.0 - LEVEL / max(comparisons, 1) / 2.0, noise.degrees)
    return quantile * noise.std * math.sqrt(1.0 / seeds + 1.0 / other_seeds)


def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t-distribution for a probability of at least one half.

    With t = sqrt(degrees) tan(angle) the density is proportional to cos(angle)^(degrees - 1), which is integrated
    numerically.
    """
    angle = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(angle) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    found = float(np.interp(probability - 0.5, mass / mass[-1] / 2, angle))
    return math.sqrt(degrees) * math.tan(found)


@dataclass(frozen=True)
class Fit:
    """``loss = a + b * (flops / unit) ** -c``."""

    a: float
    b: float
    c: float
    unit: float
    """FLOPs of the last point, so that ``a + b`` is the fitted loss there."""
    residual: float
    """Root mean square of the differences."""


def fit_curve(flops: Sequence[float], losses: Sequence[float]) -> Fit | None:
    """Fit a power law with an offset by least squares, a and b not negative; or None.

    None with fewer than five points, or if the best exponent is at an end of its range: the losses follow no such law.

    For a given exponent the offset and factor are a linear problem; the exponent is the best of a grid.
    """
    x, y = np.asarray(flops, dtype=float), np.asarray(losses, dtype=float)
    if len(x) < _FEWEST_POINTS:
        return None
    unit = float(x.max())
    best: Fit | None = None
    for c in _EXPONENTS:
        basis = (x / unit) ** -c
        matrix = np.stack([np.ones_like(basis), basis], axis=1)
        a, b = np.linalg.lstsq(matrix, y, rcond=None)[0]
        if a < 0:
            a, b = 0.0, float(basis @ y / (basis @ basis))
        if b < 0:
            continue
        residual = float(np.sqrt(np.mean((a + b * basis - y) ** 2)))
        if best is None or residual < best.residual:
            best = Fit(float(a), float(b), float(c), unit, residual)
    return best if best is not None and _EXPONENTS[0] < best.c < _EXPONENTS[-1] else None


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation (n - 1); the latter is NaN for one value."""
    array = np.asarray(values, dtype=float)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan
