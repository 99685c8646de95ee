"""Names in the documentation that are not there: looked up in the sources, of which nothing is imported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parents[1]
FOLDERS = ("alflb_megatron", "benchmarks", "docs", "examples", "patches", "plans", "recipes", "requirements", "tests")
WRITTEN = {".py", ".yaml", ".yml", ".toml", ".patch", ".txt", ".md"}
"""Endings of files whose names the documentation may shorten, as `hosts/core.py`."""

OTHERS = {
    "megatron/bridge/peft/lora_layers.py",
    "megatron/bridge/peft/lora.py",
    "megatron/bridge/models/gpt_full_te_layer_autocast_spec.py",
    "nemo_logger.py",
    "pretrain_gpt.py",
    "transformer/moe/router.py",
    "run_config.yaml",  # Megatron-Bridge writes it
    "certified/",
    "report/",
    "site/",
    "DeepseekV3MoE",  # in transformers
}
"""Files and classes of others, and folders that commands make."""

DATA = {".json", ".jsonl", ".csv", ".png", ".html", ".idx", ".bin", ".npz", ".safetensors", ".log"}
"""Endings of files that runs write."""

SHARED = {"config", "nemo", "problem"}
"""Modules of ours whose names are also those of variables and packages of others."""

API: Any = griffe.load("alflb_megatron", search_paths=[str(ROOT)], allow_inspection=False)
"""The package as its sources state it."""

DOTTED = re.compile(r"(?<![\w./-])(?:alflb_megatron|benchmarks)(?:\.\w+)+")
PATH = re.compile(rf"(?<![\w./~$-])(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w/*]")
CODE = re.compile(r"```.*?```|(?<!`)`([^`\n]+)`(?!`)", re.S)


def wrong_names(markdown: str) -> list[str]:
    """What in a page claims to be a module, a function, a class or a file of this repository, and is not there.

    Everywhere: dotted names that begin with `alflb_megatron` or `benchmarks`, and paths that begin with a folder of
    the repository. In inline code also names without their beginning: `hosts/core.py`, `margins.of_groups`,
    `Balancer.commit`, and identifiers, `LoadCounter` or `bias_of`, that stand in no source. Of a table
    that says what moved (columns "before" and "now") the second column is read.
    """
    markdown = re.sub(r"(?m)^(\| before \| now \|\n\|---\|---\|\n)((?:\|.*\n)+)", _now, markdown)
    found = [name for name in DOTTED.findall(markdown) if not (Path(name).suffix in WRITTEN or _is_dotted(name))]
    found += [path for path in PATH.findall(markdown) if not any(ROOT.glob(path))]
    for code in filter(None, CODE.findall(markdown)):
        name = code.removesuffix("()")
        if (
            re.fullmatch(r"[\w./-]+", name)
            and not re.search(r"[A-Z]{3}", name)
            and not (PATH.fullmatch(name) or DOTTED.fullmatch(name))
        ):
            found += [name] * (not _is_short(name))
    return list(dict.fromkeys(found))


def wrong_docstrings(owner: Any = API) -> Iterator[tuple[str, str]]:
    """The same of the docstrings of a module or a class and all it holds: whose it is, and the name."""
    for name in wrong_names(owner.docstring.value) if owner.docstring else ():
        yield owner.path, name
    for member in owner.members.values():
        if not member.is_alias:
            yield from wrong_docstrings(member)


def _now(table: re.Match[str]) -> str:
    """A table of what moved, without its first column."""
    return "".join(f"|{line.split('|', 2)[2]}\n" for line in table[2].splitlines())


def _is_short(name: str) -> bool:
    path = Path(name)
    if path.suffix in WRITTEN:
        return name in OTHERS or any(f"/{file}".endswith(f"/{name}") for file in _files())
    if name.endswith("/"):
        return name in OTHERS or any(f"/{folder}/".endswith(f"/{name}") for folder in _folders())
    if "/" in name:
        return True
    head, *rest = name.split(".")
    if not rest:
        return name in OTHERS or not re.search(r"[a-z]_[a-z]{2}|[a-z][A-Z]", name) or name in _words()
    if head in SHARED or Path(name).suffix in DATA:
        return True
    owners = _owners().get(head, [])
    return not owners or any(_resolves(owner, rest) for owner in owners)


def _is_dotted(name: str) -> bool:
    head, *rest = name.split(".")
    if head == "benchmarks" or rest[0] == "recipes":
        folder, rest = (ROOT / "recipes", rest[1:]) if rest[0] == "recipes" else (ROOT / head, rest)
        if not rest:
            return True
        file = folder / f"{rest[0]}.py"
        return file.exists() and all(re.search(rf"\b{part}\b", file.read_text(encoding="utf-8")) for part in rest[1:])
    return _resolves(API, rest)


def _resolves(owner: Any, parts: list[str]) -> bool:
    try:
        return owner[".".join(parts)] is not None
    except (KeyError, griffe.AliasResolutionError):
        return False


@cache
def _owners() -> dict[str, list[Any]]:
    """Modules and classes of the package by their own name."""
    found: dict[str, list[Any]] = {}
    waiting = [API]
    while waiting:
        owner = waiting.pop()
        found.setdefault(owner.name, []).append(owner)
        waiting += [
            member for member in owner.members.values() if not member.is_alias and (member.is_module or member.is_class)
        ]
    return found


@cache
def _files() -> list[str]:
    folders = [ROOT / folder for folder in FOLDERS]
    return [path.name for path in ROOT.iterdir() if path.is_file()] + [
        str(path.relative_to(ROOT)) for folder in folders for path in folder.rglob("*") if path.is_file()
    ]


@cache
def _folders() -> set[str]:
    return {str(folder) for file in _files() for folder in Path(file).parents}


@cache
def _words() -> set[str]:
    """Every word of the sources, tests apart: a name that stands in none of them is nobody's."""
    return {
        word
        for file in _files()
        if Path(file).suffix in WRITTEN - {".md"} and not file.startswith(("docs/", "tests/"))
        for word in re.findall(r"\w+", file + " " + (ROOT / file).read_text(encoding="utf-8", errors="replace"))
    }
