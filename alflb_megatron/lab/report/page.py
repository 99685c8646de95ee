"""The HTML of `alflb report`: one page, no script, nothing from outside; Jinja2 escapes whatever comes from a file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Picture:
    """A PNG file, the heading over it, and what is to be seen in it."""

    name: str
    title: str
    caption: str
    file: Path

    @property
    def source(self) -> str:
        """The picture as a data: address."""
        return "data:image/png;base64," + base64.b64encode(self.file.read_bytes()).decode("ascii")


@dataclass(frozen=True)
class Table:
    """A table with a heading; the first column names the rows. `marks`: border style and colour of each run's line."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    marks: Sequence[tuple[str, str]] = ()


# The policy makes the browser refuse what the page does not have anyway: scripts, and anything from outside.
TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light; }
  * { box-sizing: border-box; }
  body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 1360px; color: #1c1e21; background: #fff;
         font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
  h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere; }
  h2 { font-size: 1.12rem; margin: 2rem 0 .5rem; padding-top: .6rem; border-top: 1px solid #e3e5e8;
       overflow-wrap: anywhere; }
  h3 { font-size: 1rem; margin: 0 0 .1rem; }
  p { margin: .2rem 0; max-width: 62rem; overflow-wrap: anywhere; }
  .quiet { color: #5d6269; font-size: .88rem; }
  .warn { border-left: 4px solid #D55E00; padding: .1rem .7rem; margin: .6rem 0; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
  th, td { padding: .3rem 1.1rem .3rem 0; text-align: left; vertical-align: top; }
  th { font-weight: 600; }
  thead th { vertical-align: bottom; border-bottom: 2px solid #c9cdd2; }
  tbody td, tbody th { border-bottom: 1px solid #eceef0; }
  td { overflow-wrap: break-word; max-width: 32rem; }
  .run { display: flex; gap: .5rem; align-items: baseline; max-width: 18rem; overflow-wrap: break-word; }
  .mark { flex: none; width: 1.3rem; height: .32em; border-top: 4px solid; }
  .pictures { display: grid; gap: 1.4rem 2rem;
              grid-template-columns: repeat(auto-fill, minmax(min(100%, 430px), 1fr)); }
  figure { margin: 0; max-width: 760px; }
  img { display: block; width: 100%; height: auto; }
  figcaption { color: #5d6269; font-size: .88rem; margin-top: .2rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="quiet">{{ subtitle }}</p>
{% for text in warnings %}<p class="warn">{{ text }}</p>
{% endfor %}
{% macro table(it) %}
<h2>{{ it.title }}</h2>
{% if it.rows %}<div class="scroll"><table>
<thead><tr>{% for cell in it.head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in it.rows %}{% set mark = it.marks[loop.index0] if it.marks else "" %}
<tr>{% for cell in row %}{% if loop.first %}<th scope="row">{% if mark %}<span class="run"><span class="mark"
style="border-top-style: {{ mark[0] }}; border-color: {{ mark[1] }}"></span><span>{{ cell }}</span></span>{% else %}
{{ cell }}{% endif %}</th>{% else %}<td>{{ cell }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}
</tbody></table></div>{% endif %}
{% if it.note %}<p class="quiet">{{ it.note }}</p>{% endif %}
{% endmacro %}
{% for it in tables_before %}{{ table(it) }}{% endfor %}
{% for title, pictures in sections %}
<h2>{{ title }}</h2>
<div class="pictures">
{% for it in pictures %}
<figure><h3>{{ it.title }}</h3><img src="{{ it.source }}" alt="{{ it.title }}">
<figcaption>{{ it.caption }}</figcaption></figure>
{% endfor %}
</div>
{% endfor %}
{% for it in tables_after %}{{ table(it) }}{% endfor %}
</body>
</html>
"""


def render_page(
    title: str,
    subtitle: str,
    warnings: Sequence[str],
    tables_before: Sequence[Table],
    sections: Sequence[tuple[str, Sequence[Picture]]],
    tables_after: Sequence[Table],
) -> str:
    """The page as text; every string is shown as it is, none becomes HTML."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    content: Mapping[str, Any] = {
        "title": title,
        "subtitle": subtitle,
        "warnings": warnings,
        "tables_before": tables_before,
        "sections": sections,
        "tables_after": tables_after,
    }
    return environment.from_string(TEMPLATE).render(content)
