"""The fit of growth recovers what synthetic curves were made with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from alflb_megatron.lab.theory.growth_fit import fit_growth


def curves(
    rate: Callable[[np.ndarray], np.ndarray], noise: float = 0.05, seeds: int = 24, steps: int = 4096
) -> np.ndarray:
    """Cumulative sums of noisy increments [seeds, steps]."""
    n = np.arange(1, steps + 1)
    drawn = np.random.default_rng(0).gamma(1 / noise**2, noise**2, size=(seeds, 1))
    return np.cumsum(rate(n) * drawn * np.random.default_rng(1).exponential(size=(seeds, steps)), axis=1)


@pytest.mark.parametrize("power", [0.0, 0.3, 0.5, 0.75, 1.0])
def test_known_exponents_are_recovered(power: float) -> None:
    """Increments n^(power - 1) add up to log N or N^power."""
    found = fit_growth(curves(lambda n: n ** (power - 1.0)))
    assert found.exponent == pytest.approx(power, abs=0.06)
    assert found.low - 0.03 <= power <= found.high + 0.03
    assert found.high - found.low < 0.25
    assert (found.log_error < found.sqrt_error) == (power < 0.3)


def test_the_slope_of_a_logarithm() -> None:
    found = fit_growth(curves(lambda n: 3.0 / n))
    assert found.log_slope == pytest.approx(3.0, rel=0.05)
    assert found.log_slope_low < found.log_slope < found.log_slope_high


def test_a_curve_that_comes_to_rest_is_below_a_logarithm() -> None:
    assert fit_growth(curves(lambda n: n**-2.0)).exponent < -0.7


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="1 seeds"):
        fit_growth(np.ones((1, 4096)))
    with pytest.raises(ValueError, match="octaves"):
        fit_growth(np.ones((5, 64)))
