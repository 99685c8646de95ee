"""What `make site` does beyond MkDocs: pages from outside docs/, an API reference a room, formulas, names that exist.

MkDocs calls the functions named on_... (mkdocs.yml). Links to files of the repository lead to pages of theirs, so that
the site needs no address of any host. With --strict a warning here ends the build, as a broken link does.
"""

from __future__ import annotations

import html
import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from names import API, ROOT, wrong_docstrings, wrong_names

logger = logging.getLogger("mkdocs.hooks")

PREFIX = "repository/"
"""Where pages of files from outside docs/ lie in the site."""

LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)[^)#\s]+")
ENTRANCE = "Names that `alflb_megatron` itself offers. They are looked up when first used, so importing it is cheap."


def on_config(config: Any) -> Any:
    """Adds the API reference to the navigation: what the package offers, the plug-in's rooms, the lab's.

    Docstrings are looked through here, once.
    """
    for owner, name in wrong_docstrings():
        logger.warning("the docstring of %s names '%s', which is not there", owner, name)
    pages = reference()
    rooms = [name for name in pages if name != "api/index.md"]
    config.nav.append(
        {
            "API": [
                {"alflb_megatron": "api/index.md"},
                *({_title(name): name} for name in rooms if "lab." not in name),
                {"lab": [{_title(name): name} for name in rooms if "lab." in name]},
            ]
        }
    )
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the API, and one for each file outside docs/ that the navigation or some page leads to."""
    pages = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for uri, text in reference().items():
        files.append(File.generated(config, uri, content=text))
    waiting = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md"}
    while waiting:
        new = {source: _page_of(ROOT / source) for source in waiting}
        for source, text in new.items():
            files.append(File.generated(config, site_path(source), content=text))
        pages |= new
        linked = {_target(source, link.group()) for source, text in pages.items() for link in LINK.finditer(text)}
        waiting = {
            path for path in linked - pages.keys() if site_path(path).startswith(PREFIX) and (ROOT / path).is_file()
        }
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they lead in the site; a warning for every name that is not there."""
    uri = page.file.src_uri
    if uri.startswith("api/"):
        return markdown
    source = uri.removeprefix(PREFIX) if uri.startswith(PREFIX) else f"docs/{uri}"
    if not source.endswith(".py.md"):
        for name in wrong_names(markdown):
            logger.warning("%s names '%s', which is not there", source, name)

    def moved(link: re.Match[str]) -> str:
        target = _target(source, link.group())
        if not (ROOT / target).exists():
            return link.group()  # MkDocs reports it
        return posixpath.relpath(site_path(target), posixpath.dirname(uri) or ".")

    # In a formula within a line `<` would begin a tag of HTML.
    return LINK.sub(moved, re.sub(r"\$[^$`]+\$", lambda tex: tex.group().replace("<", r"\lt "), markdown))


def on_page_content(content: str, **_: Any) -> str:
    """TeX as MathML, which browsers show by themselves."""

    def shown(formula: re.Match[str]) -> str:
        return convert(html.unescape(formula["tex"]), display="block" if formula["open"] == "[" else "inline")

    return re.sub(
        r'<(span|div) class="arithmatex">\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]</\1>', shown, content, flags=re.S
    )


def reference() -> dict[str, str]:
    """Pages of the API by their address: the package's own names, then a page a room."""
    pages = {
        "api/index.md": f"# alflb_megatron\n\n{ENTRANCE}\n\n"
        + "\n".join(f"::: alflb_megatron.{name}\n" for name in API.exports or ())
    }
    for module in (*_rooms(API), *_rooms(API["lab"])):
        if module.name != "lab":
            name = module.path.removeprefix("alflb_megatron.")
            pages[f"api/{name}.md"] = f"# {name}\n\n::: {module.path}\n"
    return pages


def site_path(path: str) -> str:
    """Where the file `path` of the repository is in the site: a module in the page of its room."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    parts = Path(path).with_suffix("").parts
    if parts == ("alflb_megatron", "__init__"):
        return "api/index.md"
    if parts[0] == "alflb_megatron":
        return "api/" + ".".join(parts[1 : 3 if parts[1] == "lab" else 2]) + ".md"
    return PREFIX + path + ("" if path.endswith(".md") else ".md")


def _rooms(package: Any) -> Iterator[Any]:
    for name in sorted(package.modules):
        yield package.modules[name]


def _title(uri: str) -> str:
    return uri.removeprefix("api/").removeprefix("lab.").removesuffix(".md")


def _target(source: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _page_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    kind = {".py": "python", ".yaml": "yaml"}.get(path.suffix, "text")
    return text if path.suffix == ".md" else f"# {path.relative_to(ROOT)}\n\n```{kind}\n{text}\n```\n"
