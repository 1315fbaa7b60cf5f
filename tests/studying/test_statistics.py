"""Noise between seeds, the test of differences, and fitted curves."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fusiontree.studying.statistics import (
    Noise,
    fit_curve,
    least_difference,
    mean_and_spread,
    pooled_noise,
    t_quantile,
)


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    # Abramowitz and Stegun (1964), table 26.10
    [(0.975, 1, 12.706), (0.975, 2, 4.303), (0.975, 8, 2.306), (0.995, 8, 3.355), (0.95, 30, 1.697)],
)
def test_quantiles_of_students_distribution(probability: float, degrees: int, expected: float) -> None:
    assert t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-3)


def test_noise_is_pooled_over_arms() -> None:
    noise = pooled_noise([[1.0, 3.0], [10.0, 10.0, 13.0], [7.0]])
    assert noise == Noise(pytest.approx(math.sqrt((2.0 + 6.0) / 3)), 3)
    assert pooled_noise([[1.0], [2.0]]) is None


def test_the_least_difference() -> None:
    noise = Noise(0.01, 8)
    alone = least_difference(noise, 2, 2, comparisons=1)
    assert alone == pytest.approx(2.306 * 0.01, rel=1e-3)
    assert least_difference(noise, 2, 2, comparisons=5) == pytest.approx(3.355 * 0.01, rel=1e-3)
    assert least_difference(noise, 8, 8, comparisons=1) == pytest.approx(alone / 2)


def test_a_test_at_five_percent_errs_in_five_percent() -> None:
    random, wrong = np.random.default_rng(0), 0
    for _ in range(400):
        groups = random.normal(size=(4, 2))
        noise = pooled_noise(groups.tolist())
        assert noise is not None
        wrong += abs(groups[0].mean() - groups[1].mean()) > least_difference(noise, 2, 2, comparisons=1)
    assert 0.02 < wrong / 400 < 0.08


def test_a_curve_is_found_again() -> None:
    flops = np.geomspace(1e15, 1e17, 12)
    fit = fit_curve(flops, 1.7 + 0.4 * (flops / 1e17) ** -0.3)
    assert fit is not None
    assert (fit.a, fit.b, fit.c, fit.unit) == (
        pytest.approx(1.7, abs=1e-3),
        pytest.approx(0.4, abs=1e-3),
        pytest.approx(0.3, abs=1e-6),
        1e17,
    )
    assert fit.residual < 1e-9
    assert fit_curve(flops[:4], flops[:4]) is None
    assert fit_curve(flops, 9.0 - 0.1 * np.log(flops / 1e15)) is None  # the exponent of the best fit is the smallest


def test_offset_and_factor_are_not_negative() -> None:
    flops = np.geomspace(1e15, 1e17, 12)
    fit = fit_curve(flops, 2.0 - 0.3 * np.log(flops / 1e15))
    assert fit is not None and fit.a >= 0 and fit.b >= 0


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2.0)))
    assert math.isnan(mean_and_spread([1.0])[1])
