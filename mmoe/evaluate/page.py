"""What the pages of runs share: their look, and parts of HTML that need no other file."""

import base64
import html
from collections.abc import Iterator, Mapping, Sequence

STYLE = """
:root { --ink: #1b2733; --muted: #66788a; --rule: #d9dfe5; --green: #2d7a4b; --red: #b23a48; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 2rem 4rem; max-width: 75rem; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0; font-size: 1.9rem; letter-spacing: -0.01em; }
h2 { margin: 2.75rem 0 0.75rem; padding-top: 1rem; border-top: 1px solid var(--rule); font-size: 1.15rem; }
p { max-width: 46rem; } .muted { color: var(--muted); }
.facts { display: flex; flex-wrap: wrap; gap: 0.5rem 2.5rem; margin: 1.5rem 0 0; }
.facts div { min-width: 6rem; } .facts dt { color: var(--muted); font-size: 0.8rem; }
.facts dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.panels { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem 2rem; }
.panels img { display: block; width: 100%; min-width: 0; } .wide { grid-column: 1 / 3; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.9rem 0.4rem 0; border-bottom: 1px solid var(--rule); text-align: right;
  white-space: nowrap; }
th { color: var(--muted); font-weight: 500; font-size: 0.85rem; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
.stages th, .stages td { text-align: left; vertical-align: top; white-space: normal; }
.stages td:first-child { color: var(--muted); white-space: nowrap; } .stages th { color: var(--ink); font-size: 1rem; }
.stages small { color: var(--muted); }
.examples { display: grid; grid-template-columns: 1fr 1fr 1fr 1fr; gap: 1.5rem; }
@media (max-width: 50rem) { .panels, .examples { grid-template-columns: 1fr; } .wide { grid-column: auto; } }
.examples figure { margin: 0; } .examples img { height: 9rem; max-width: 100%; object-fit: contain;
  object-position: left; image-rendering: pixelated; }
figcaption { font-size: 0.9rem; line-height: 1.35; } figcaption span { display: block; }
figcaption b { display: inline-block; min-width: 5rem; color: var(--muted); font-weight: 400; }
figcaption i { font-style: normal; }
.right { color: var(--green); font-weight: 600; } .wrong { color: var(--red); font-weight: 600; }
pre { padding: 1rem; overflow-x: auto; border: 1px solid var(--rule); font-size: 0.8rem; line-height: 1.45; }
"""


def opening(name: str, description: str, facts: Mapping[str, str]) -> Iterator[str]:
    """The head, the headline and the facts, each a value under its name."""
    name, description = html.escape(name), html.escape(description)
    yield f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{STYLE}</style>\n</head>\n<body>"
    yield f'<h1>{name}</h1>\n<p class="muted">{description}</p>'
    yield '<dl class="facts">'
    yield from (f"<div><dt>{html.escape(fact)}</dt><dd>{value}</dd></div>" for fact, value in facts.items())
    yield "</dl>"


def drawing(kind: str, alt: str, svg: bytes) -> str:
    """A drawing of :func:`mmoe.evaluate.figures.svg`; ``kind``: ``half`` or ``wide``."""
    # A file of its own: inline, the identifiers of one drawing would be those of the next.
    return f'<img class="{kind}" alt="{alt}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def stage_table(stages: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A table with a column a stage; the cells are HTML."""
    yield '<div class="scroll"><table class="stages">'
    yield f"<tr><th></th>{''.join(f'<th>{html.escape(name)}</th>' for name in stages)}</tr>"
    for name, cells in rows.items():
        yield f"<tr><td>{html.escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    yield "</table></div>"
