"""Tables of plain text, as `alflb demo` and `alflb replay` print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def aligned(rows: Sequence[Sequence[str]], left: bool = False) -> list[str]:
    """The lines of a table whose first row is its head: names to the left, figures to the right or, `left`, so too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        sides = [str.ljust] + [str.ljust if left else str.rjust] * (len(row) - 1)
        cells = (side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def explained(meanings: Mapping[str, str]) -> list[str]:
    """A line for each column: its name and what it holds."""
    width = max(map(len, meanings))
    return [f"{name.ljust(width)}  {meaning}" for name, meaning in meanings.items()]
