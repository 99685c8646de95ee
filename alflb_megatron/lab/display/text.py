"""Plain text that several commands show: tables, counts, and what the data of a run are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

DATA_NAMES = {"stdlib": "the source text of Python's standard library"}
"""What a value of `--data` stands for, where its name does not say so."""


def align_rows(rows: Sequence[Sequence[str]], left: bool = False) -> list[str]:
    """The lines of a table whose first row is its head: names to the left, figures to the right or, `left`, so too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        sides = [str.ljust] + [str.ljust if left else str.rjust] * (len(row) - 1)
        cells = (side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def explain_columns(meanings: Mapping[str, str]) -> list[str]:
    """A line for each column: its name and what it holds."""
    width = max(map(len, meanings))
    return [f"{name.ljust(width)}  {meaning}" for name, meaning in meanings.items()]


def short_count(count: float) -> str:
    """1234567 is 1.2M: a count with two or three digits and its unit."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.{0 if count >= 99.5 * size else 1}f}{unit}"
    return f"{count:.0f}"
