"""What `alflb theory` measured as tables: of plain text for a terminal, in Markdown for docs/theory.md."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

COLUMNS = ("claim", "condition", "measured", "bound", "verdict")


def format_table(results: Mapping[str, Any], width: int | None = None) -> str:
    """The table, its cells wrapped to the terminal's width (100 columns or more)."""
    width = max(100, width or shutil.get_terminal_size((140, 40)).columns)
    free = width - 11 - 2 * (len(COLUMNS) - 1)
    widths = [round(free * part) for part in (0.32, 0.25, 0.27, 0.16)] + [11]
    lines = ["  ".join(name.ljust(w) for name, w in zip(COLUMNS, widths, strict=True)).rstrip()]
    for claim in results["claims"].values():
        lines += ["-" * width, f"{claim['title']}  ({claim['seconds']:.0f} s)", ""]
        for row in claim["rows"]:
            cells = [row["statement"], row["condition"], row["measured"], row["bound"], row["verdict"]]
            wrapped = [textwrap.wrap(cell, w) or [""] for cell, w in zip(cells, widths, strict=True)]
            for at in range(max(map(len, wrapped))):
                parts = [cell[at] if at < len(cell) else "" for cell in wrapped]
                lines.append("  ".join(part.ljust(w) for part, w in zip(parts, widths, strict=True)).rstrip())
            lines.append("")
    return "\n".join(lines)


def markdown_table(claim: Mapping[str, Any]) -> str:
    """One claim's rows, as docs/theory.md shows them."""
    lines = ["| claim | condition | measured | bound | verdict |", "|---|---|---|---|---|"]
    for row in claim["rows"]:
        cells = (row["statement"], row["condition"], row["measured"], row["bound"], f"**{row['verdict']}**")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def sweep_table(figures: Mapping[str, Any]) -> str:
    """Regret at the end of the stream of every rule and u, and its exponent of growth, in markdown.

    From the `figures` of the claim `regret`.
    """
    last = {
        label: f"{value:.3g} ({figures['growth'][label]['exponent']:.2f})" for label, value in figures["last"].items()
    }
    swept = [label.split(" u=") for label in last if " u=" in label]
    sizes = sorted({u for _, u in swept}, key=float)
    lines = ["| rule | " + " | ".join(f"u = {u}" for u in sizes) + " |", "|---|" + "---:|" * len(sizes)]
    for name in dict.fromkeys(name for name, _ in swept):
        lines.append(f"| `{name}` | " + " | ".join(last[f"{name} u={u}"] for u in sizes) + " |")
    for name in ("quantile", "adaptive"):
        lines.append(f"| `{name}`, no u | {last[name]} |" + " |" * (len(sizes) - 1))
    return "\n".join(lines)
