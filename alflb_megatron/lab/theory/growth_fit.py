"""How fast a curve of regret grows: like log N, like sqrt N, or like another power.

Regret that grows like log N grows by the same amount in every octave [N, 2N]; like N^a, by 2^a times more in each. The
exponent of those increments tells the two apart without a constant to fit: 0 for log N, a for N^a, below 0 where the
curve comes to rest.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Growth:
    """The fits of one set of curves, with 95% bootstrap intervals over the seeds."""

    exponent: float
    low: float
    high: float
    log_slope: float
    """b of a + b ln N over the same steps."""
    log_slope_low: float
    log_slope_high: float
    log_error: float
    """Root mean square of what a + b ln N leaves, relative to the mean curve's rise."""
    sqrt_error: float
    """The same of a + b sqrt N."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def octaves(steps: int, first: int) -> NDArray[np.int64]:
    """first, 2 first, 4 first, ... up to `steps`."""
    count = int(np.floor(np.log2(steps / first))) + 1
    return first * 2 ** np.arange(count)


def fit_growth(curves_SN: Array, first: int = 16, resamples: int = 1000, seed: int = 0) -> Growth:
    """Fits cumulative curves [seeds, steps] from step `first` on.

    ValueError unless there are 2 seeds and 3 octaves.
    """
    seeds, steps = curves_SN.shape
    at = octaves(steps, first)
    if seeds < 2 or len(at) < 4:
        raise ValueError(f"{seeds} seeds and {len(at) - 1} octaves from step {first}: needs 2 and 3")
    points_SJ = curves_SN[:, at - 1]
    draws = np.random.default_rng(seed).integers(0, seeds, size=(resamples, seeds))
    means_RJ = points_SJ[draws].mean(axis=1)
    mean_J = points_SJ.mean(axis=0)
    exponents_R = np.array([_exponent(row) for row in means_RJ])
    log_n, sqrt_n = np.log(at), np.sqrt(at)
    slopes_R = np.array([np.polyfit(log_n, row, 1)[0] for row in means_RJ])
    low, high = np.quantile(exponents_R, [0.025, 0.975])
    slope_low, slope_high = np.quantile(slopes_R, [0.025, 0.975])
    return Growth(
        exponent=_exponent(mean_J),
        low=float(low),
        high=float(high),
        log_slope=float(np.polyfit(log_n, mean_J, 1)[0]),
        log_slope_low=float(slope_low),
        log_slope_high=float(slope_high),
        log_error=_left(log_n, mean_J),
        sqrt_error=_left(sqrt_n, mean_J),
    )


def _exponent(curve_J: Array) -> float:
    """Slope of log2(increment) over octaves; increments at or below zero count as a millionth of the largest."""
    rise_J = np.diff(curve_J)
    if rise_J.max() <= 0:
        return -np.inf
    return float(np.polyfit(np.arange(len(rise_J)), np.log2(np.maximum(rise_J, 1e-6 * rise_J.max())), 1)[0])


def _left(x_J: Array, y_J: Array) -> float:
    fitted = np.polyval(np.polyfit(x_J, y_J, 1), x_J)
    return float(np.sqrt(np.mean((y_J - fitted) ** 2)) / max(np.ptp(y_J), 1e-300))
