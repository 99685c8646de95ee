"""The look that all pictures share: colours, axes, smoothing, and how a figure becomes a PNG file.

matplotlib is imported when a picture is drawn, and its figures are used without pyplot, so no window system or global
state is touched.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart by readers with any common colour blindness. Grey is the first run's.
COLOURS = ("#7F7F7F", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DPI = 110
WIDTH = 10.0  # inches


def trailing_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean over the last `window` steps at each step, over fewer at the beginning; same shape as `values` [n]."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (sums[ends] - sums[starts]) / (ends - starts)


def style_axes(axes: Axes) -> None:
    """A faint grid, and no frame above and to the right."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def log_y_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers, as its range allows; called once everything is drawn."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low) if 0 < low < high else 1.0
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if decades < 0.15:  # no 1, 2 or 5 in sight
        axes.yaxis.set_major_locator(LogLocator(subs=tuple(range(1, 10)), numticks=99))
    if decades > 6:
        axes.yaxis.set_minor_locator(NullLocator())


def figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib (pip install matplotlib)") from error
    return Figure


def save_png(figure: Figure, out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    from PIL import Image  # comes with matplotlib

    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as image:  # a palette of 256 colours makes the file three times smaller, to no visible loss
        small = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1, dither=Image.Dither.NONE)
        small.save(out, format="PNG", optimize=True)
    return out
