"""docs/results.md: its tables and every figure come from the committed rows by the command that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from alflb_megatron.lab.cli import main
from alflb_megatron.lab.sweep import collect, figures

DOCS = Path(__file__).parent.parent / "docs"
SWEEPS = {"wang2024": "mini", "han_zhong": "mini", "beyond": "mini", "settled": "settled"}


def block(name: str) -> str:
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name} -->\n(.*)\n<!-- /{name} -->", text, flags=re.S)
    assert found is not None
    return found.group(1)


@pytest.mark.parametrize("name", SWEEPS)
def test_one_command_makes_the_tables_and_every_figure_from_the_rows(name: str, tmp_path: Path) -> None:
    csv, scale = DOCS / "results" / f"{name}-{SWEEPS[name]}.csv", SWEEPS[name]
    assert main(["reproduce", name, "--scale", scale, "--results", str(csv), "--out", str(tmp_path)]) == 0
    linked = re.findall(r"!\[[^\]]*\]\(results/([^)]+)\)", block(name))
    assert linked and sorted(linked) == sorted(path.name for path in tmp_path.glob("*.png"))
    for figure in linked:
        assert (DOCS / "results" / figure).read_bytes().startswith(b"\x89PNG")
    made = (tmp_path / f"{name}.md").read_text(encoding="utf-8").split("\n\n", 1)[1]
    assert made.strip() == block(name).replace("](results/", "](").strip()


@pytest.mark.parametrize("name", SWEEPS)
def test_figures_show_other_rows_differently(name: str, tmp_path: Path) -> None:
    """A figure is drawn from the rows, not from anything else."""
    rows = collect.read_csv(DOCS / "results" / f"{name}-{SWEEPS[name]}.csv")
    for one in ("as_they_are", "changed"):
        (tmp_path / one).mkdir()
    figures.draw_figures(name, rows, tmp_path / "as_they_are")
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "as_they_are").iterdir()}
    for row in rows:
        row["maxvio_global"] *= 1 + row["seed"]
        row["maxvio_curve"] = [2 + value for value in row["maxvio_curve"]]
        row["maxvio_global_curve"] = [2 + value for value in row["maxvio_global_curve"]]
    figures.draw_figures(name, rows, tmp_path / "changed")
    assert all((tmp_path / "changed" / file).read_bytes() != image for file, image in drawn.items())


def test_the_rows_are_of_one_revision() -> None:
    for name, scale in SWEEPS.items():
        rows = collect.read_csv(DOCS / "results" / f"{name}-{scale}.csv")
        (revision,) = {row["revision"] for row in rows}
        assert re.fullmatch(r"[0-9a-f]{40}", revision)  # of a clean checkout
