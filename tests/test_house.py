"""The house as docs/design.md draws it: two floors, rooms in order, no circle of imports, no overlong file."""

from __future__ import annotations

import ast
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "alflb_megatron"
RECIPES = PACKAGE.parent / "recipes"
HOSTS = {"megatron", "nemo", "nemo_run", "transformer_engine", "apex"}

PLUG_IN = {"torch", "numpy", "safetensors", *HOSTS}
"""What the modules that a training job imports may import beside Python's library: the base and the hosts."""

PURE = {"settings", "config", "models", "biases", "margins", "routing", "metrics", "rules", "loads", "balancer"} | {
    "agreement",
    "alarms",
    "calibration",
}
"""Rooms of the plug-in that know no host."""

CLOSED: dict[str, set[str]] = {
    "settings": {"torch", "alflb_megatron"},
    "models": {"torch", "alflb_megatron.hosts", "alflb_megatron.router"},
    "config": {"torch", "alflb_megatron.hosts", "alflb_megatron.router"},
    "margins": {"alflb_megatron"},
    "metrics": {"alflb_megatron"},
    "routing": {"alflb_megatron.rules", "alflb_megatron.router", "alflb_megatron.hosts"},
    "biases": {"alflb_megatron.rules", "alflb_megatron.router", "alflb_megatron.hosts"},
    "rules": {f"alflb_megatron.{name}" for name in ("router", "balancer", "loads", "hosts")},
    "loads": {f"alflb_megatron.{name}" for name in ("router", "balancer", "hosts")},
    "balancer": {"alflb_megatron.router", "alflb_megatron.hosts"},
    "agreement": {"alflb_megatron"},
    "alarms": {f"alflb_megatron.{name}" for name in ("router", "balancer", "hosts")},
    "router_state": {f"alflb_megatron.{name}" for name in ("router", "balancer", "hosts")},
    "router": {"alflb_megatron.balancer", "alflb_megatron.hosts"},
    "calibration": {"alflb_megatron.hosts", "alflb_megatron.router"},
}
"""A room of the plug-in, and what its modules must not import."""

LAB: dict[str, set[str]] = {
    "records": set(),
    "checkpoints": {"records"},
    "data": {"records"},
    "display": {"records"},
    "theory": {"records", "display"},
    "replay": {"records", "display", "theory"},
    "report": {"records", "display"},
    "watch": {"records", "display"},
    "tools": {"records", "display"},
    "training": {"records", "checkpoints", "data", "replay", "theory", "tools"},
    "sweep": {"records", "display", "training"},
}
"""A room of the lab, and the rooms it may import."""


def _modules() -> dict[str, Path]:
    """Every module of the package by its name, the recipes as `alflb_megatron.recipes`."""
    found = {}
    for root, prefix in ((PACKAGE, "alflb_megatron"), (RECIPES, "alflb_megatron.recipes")):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join((prefix, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = _modules()


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


def _room(module: str) -> str:
    """`alflb_megatron.lab.data.prepare` is in room `data`, `alflb_megatron.rules.sign` in `rules`."""
    parts = module.removeprefix("alflb_megatron").removeprefix(".").removeprefix("lab.").split(".")
    return parts[0]


def _in_lab(module: str) -> bool:
    return module.startswith("alflb_megatron.lab")


@pytest.mark.parametrize("room", sorted(CLOSED.keys() | PURE))
def test_nothing_imports_upwards(room: str) -> None:
    sources = [path for name, path in MODULES.items() if not _in_lab(name) and _room(name) == room]
    closed = CLOSED.get(room, set()) | (HOSTS if room in PURE else set())
    assert sources
    assert [line for source in sources for line in _violations(source, closed)] == []


def test_the_plug_in_imports_nothing_of_the_lab_and_no_package_of_its() -> None:
    hosts_of = {"hosts": {"lightning", "fiddle", "transformers", "modelopt"}, "recipes": {"yaml", "sky", "lightning"}}
    allowed = PLUG_IN | sys.stdlib_module_names | {"alflb_megatron"}
    found = []
    for name, path in MODULES.items():
        if not _in_lab(name) and name != "alflb_megatron.cli":  # which is the old place of lab/cli.py
            found += _violations(path, {"alflb_megatron.lab"})
            tops = {imported.split(".")[0] for imported in _imports(path)}
            found += [f"{name} imports {top}" for top in tops - allowed - hosts_of.get(_room(name), set())]
    assert found == []


@pytest.mark.parametrize("room", LAB)
def test_a_room_of_the_lab_imports_those_above_it(room: str) -> None:
    sources = [path for name, path in MODULES.items() if _in_lab(name) and _room(name) == room]
    closed = {f"alflb_megatron.lab.{other}" for other in LAB.keys() - LAB[room] - {room}} | {"alflb_megatron.lab.cli"}
    assert sources
    assert [line for source in sources for line in _violations(source, closed)] == []


def test_the_theory_knows_nothing_of_a_training() -> None:
    closed = HOSTS | {f"alflb_megatron.{name}" for name in ("router", "balancer", "loads", "hosts")}
    sources = (PACKAGE / "lab" / "theory").rglob("*.py")
    assert [line for source in sources for line in _violations(source, closed)] == []


def test_every_room_of_the_lab_says_what_it_is_for() -> None:
    folders = {path.name for path in (PACKAGE / "lab").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(LAB)
    for room in folders:
        assert ast.get_docstring(ast.parse((PACKAGE / "lab" / room / "__init__.py").read_text(encoding="utf-8")))
        assert len(list((PACKAGE / "lab" / room).glob("*.py"))) <= 13, f"{room} holds too many files to take in"


def _order(graph: dict[str, set[str]]) -> list[str]:
    """The nodes of `graph` (name -> what it imports), what is imported first; AssertionError on a circle."""
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def _edges(module: str, path: Path) -> set[str]:
    """The modules of ours that a module imports; `from package import name` is the package where name is no module."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                found.add(name if (name := f"{origin}.{alias.name}") in MODULES else origin)
    return (found & MODULES.keys()) - {module}


def test_no_circle_of_imports() -> None:
    assert len(_order({name: _edges(name, path) for name, path in MODULES.items()})) == len(MODULES)


def test_long_files_give_a_reason() -> None:
    long = [name for name, path in MODULES.items() if len(path.read_text(encoding="utf-8").splitlines()) > 300]
    docs = {name: ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8"))) or "" for name in long}
    assert [name for name, doc in docs.items() if "300 lines" not in doc] == []


def test_every_package_is_installed() -> None:
    settings = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    beside = {name: PACKAGE.parent / folder for name, folder in settings["package-dir"].items()}
    within = {
        ".".join(init.parent.relative_to(PACKAGE.parent).parts): init.parent for init in PACKAGE.rglob("__init__.py")
    }
    assert set(settings["packages"]) == set(within) | set(beside)
    assert all((folder / "__init__.py").is_file() for folder in beside.values())


def test_the_checks_can_fail(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("def f():\n    from megatron.core import parallel_state\n", encoding="utf-8")
    assert _violations(planted, {"megatron"}) == [
        "planted.py imports megatron.core",
        "planted.py imports megatron.core.parallel_state",
    ]
    assert _violations(planted, {"mega"}) == []
    with pytest.raises(AssertionError, match="b"):
        _order({"a": {"b"}, "b": {"a"}})
