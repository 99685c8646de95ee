"""Nothing imports upwards: each room of the package only what docs/design.md lets it."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "alflb_megatron"
HOSTS = {"megatron", "nemo", "nemo_run", "transformer_engine", "apex"}

# A room, and what of our own and of hosts its modules must not import.
CLOSED: dict[str, set[str]] = {
    "settings.py": {"torch", *HOSTS, "alflb_megatron"},
    "biases.py": {
        *HOSTS,
        "alflb_megatron.rules",
        "alflb_megatron.router",
        "alflb_megatron.hosts",
        "alflb_megatron.runs",
    },
    "models.py": {"torch", *HOSTS, "alflb_megatron.runs", "alflb_megatron.hosts", "alflb_megatron.router"},
    "config.py": {"torch", *HOSTS, "alflb_megatron.runs", "alflb_megatron.hosts", "alflb_megatron.router"},
    "margins.py": {*HOSTS, "alflb_megatron"},
    "routing.py": {
        *HOSTS,
        "alflb_megatron.rules",
        "alflb_megatron.router",
        "alflb_megatron.hosts",
        "alflb_megatron.runs",
    },
    "metrics.py": {*HOSTS, "alflb_megatron"},
    "rules": {
        *HOSTS,
        "alflb_megatron.router",
        "alflb_megatron.balancer",
        "alflb_megatron.loads",
        "alflb_megatron.hosts",
        "alflb_megatron.runs",
    },
    "theory": {
        *HOSTS,
        "alflb_megatron.router",
        "alflb_megatron.balancer",
        "alflb_megatron.loads",
        "alflb_megatron.hosts",
        "alflb_megatron.runs",
        "alflb_megatron.settings",
    },
    "loads.py": {
        *HOSTS,
        "alflb_megatron.router",
        "alflb_megatron.balancer",
        "alflb_megatron.hosts",
        "alflb_megatron.runs",
    },
    "balancer.py": {*HOSTS, "alflb_megatron.router", "alflb_megatron.hosts", "alflb_megatron.runs"},
    "router.py": {"alflb_megatron.balancer", "alflb_megatron.hosts", "alflb_megatron.runs"},
    "hosts": {"alflb_megatron.runs", "alflb_megatron.cli"},
    "runs": {"alflb_megatron.cli"},
    "../recipes": {"alflb_megatron.runs", "alflb_megatron.cli"},
}


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _violations(source: Path, closed: set[str]) -> list[str]:
    return [
        f"{source.name} imports {name}"
        for name in sorted(_imports(source))
        if any(name == door or name.startswith(door + ".") for door in closed)
    ]


@pytest.mark.parametrize("room", CLOSED)
def test_nothing_imports_upwards(room: str) -> None:
    place = PACKAGE / room
    sources = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert sources
    assert [line for source in sources for line in _violations(source, CLOSED[room])] == []


def test_every_package_is_installed() -> None:
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    beside = {name: PACKAGE.parent / folder for name, folder in settings["package-dir"].items()}
    within = {
        ".".join(init.parent.relative_to(PACKAGE.parent).parts): init.parent for init in PACKAGE.rglob("__init__.py")
    }
    assert set(settings["packages"]) == set(within) | set(beside)
    assert all((folder / "__init__.py").is_file() for folder in beside.values())


def test_the_check_can_fail(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("def f():\n    from megatron.core import parallel_state\n", encoding="utf-8")
    assert _violations(planted, {"megatron"}) == [
        "planted.py imports megatron.core",
        "planted.py imports megatron.core.parallel_state",
    ]
    assert _violations(planted, {"mega"}) == []
