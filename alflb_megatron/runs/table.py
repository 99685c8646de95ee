"""Tables of plain text, as `alflb demo` and `alflb replay` print them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose first row is its head: names to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def explained(meanings: Mapping[str, str]) -> list[str]:
    """A line for each column: its name and what it holds."""
    width = max(map(len, meanings))
    return [f"{name.ljust(width)}  {meaning}" for name, meaning in meanings.items()]
