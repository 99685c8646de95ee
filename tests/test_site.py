"""The documentation as `make site` builds it: names and links that are not there end the build."""

from __future__ import annotations

import importlib
import logging
import re
import shutil
import sys
from pathlib import Path

import griffe
import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))
names = importlib.import_module("names")
sys.path.pop(0)

PLANTED = {
    "hosts.md": ("[a page](nowhere.md)", "nowhere.md"),
    "hosts/nemo.md": ("[a file outside docs](../../recipes/nowhere.py)", "../../recipes/nowhere.py"),
    "rules.md": ("[a heading](settings.md#nowhere)", "settings.md#nowhere"),
    "watching.md": ("![a picture](nowhere.png)", "nowhere.png"),
    "replay.md": ("`LoadWindow` counts.", "docs/replay.md names 'LoadWindow'"),
    "data.md": ("`alflb_megatron.runs.data` reads it.", "docs/data.md names 'alflb_megatron.runs.data'"),
}
"""Pages, what is added to them, and what the build says of it."""


def _build(docs: Path, site: Path) -> None:
    """Builds `docs` as mkdocs.yml says, but for the API reference."""
    build(load_config(str(ROOT / "mkdocs.yml"), docs_dir=str(docs), site_dir=str(site), strict=True, plugins=[]))


def test_a_build_ends_on_links_and_names_that_are_not_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    docs = tmp_path / "docs"
    shutil.copytree(ROOT / "docs", docs)
    with caplog.at_level(logging.WARNING, "mkdocs"):
        _build(docs, tmp_path / "site")
        assert caplog.messages == []
        for source in docs.rglob("*.md"):
            tables = re.findall(r"(?m)^\|[-:| ]+\|$", source.read_text(encoding="utf-8"))
            built = (tmp_path / "site" / source.relative_to(docs).with_suffix(".html")).read_text(encoding="utf-8")
            assert built.count("<table>") == len(tables) and "\\sum" not in built, source
        (docs / "unlisted.md").write_text("# In no navigation\n", encoding="utf-8")
        for page, (text, _) in PLANTED.items():
            with (docs / page).open("a", encoding="utf-8") as file:
                file.write(f"\n{text}\n")
        with pytest.raises(Abort):
            _build(docs, tmp_path / "site")
    for said in ("unlisted.md", *(said for _, said in PLANTED.values())):
        assert len([message for message in caplog.messages if said in message]) == 1, said
    assert len(caplog.messages) == 1 + len(PLANTED)


@pytest.mark.parametrize(
    "text",
    [
        "`alflb_megatron.enable`, alflb_megatron.hosts.cpu and `alflb_megatron.recipes.bridge`",
        "`margins.of_groups`, `Balancer.commit()`, `LoadCounter`, `moe_router_topk`",
        "`hosts/core.py`, `rules/`, `tests/test_*.py`, `python -m benchmarks.tried`",
        "`config.finalize_model_grads_func`, `metrics.jsonl`, `PREFIX-parts/`, `pretrain_gpt.py`, no_such_name",
        "| before | now |\n|---|---|\n| `LoadWindow` | `LoadCounter` |\n",
    ],
)
def test_names_that_are_there(text: str) -> None:
    assert names.wrong_names(text) == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("alflb_megatron.runs.data, in prose", "alflb_megatron.runs.data"),
        ("    python -m alflb_megatron.recipes.megatron", "alflb_megatron.recipes.megatron"),
        ("`alflb_megatron.hosts.core.enabled`", "alflb_megatron.hosts.core.enabled"),
        ("benchmarks.tired", "benchmarks.tired"),
        ("in tests/runs/test_data.py", "tests/runs/test_data.py"),
        ("`benchmarks/results/*.yaml`", "benchmarks/results/*.yaml"),
        ("`hosts/stop.py`", "hosts/stop.py"),
        ("`players.py`", "players.py"),
        ("`reproduce/`", "reproduce/"),
        ("`margins.of_group`", "margins.of_group"),
        ("`Balancer.comit()`", "Balancer.comit"),
        ("`LoadWindow`", "LoadWindow"),
        ("`no_such_name`", "no_such_name"),
        ("| before | now |\n|---|---|\n| `LoadCounter` | `LoadWindow` |\n", "LoadWindow"),
    ],
)
def test_names_that_are_not_there(text: str, wrong: str) -> None:
    assert names.wrong_names(f"Some words. {text}" if "|" not in text else text) == [wrong]


def test_docstrings_name_what_is_there(tmp_path: Path) -> None:
    planted = 'class Mine:\n    def step(self):\n        """As `LoadCounter`, once `LoadWindow`."""\n'
    module = griffe.visit("planted", tmp_path / "planted.py", planted)
    assert list(names.wrong_docstrings(module)) == [("planted.Mine.step", "LoadWindow")]
    assert list(names.wrong_docstrings()) == []
