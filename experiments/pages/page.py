"""Elements of the HTML report: style, tables, figures, folded blocks. No network, light and dark, any width."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.pages import figures

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --page: #ffffff; --good: #116329; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d; --page: #0d1117; --good: #56d364; --bad: #ff7b72; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; }
p, figcaption, summary { color: var(--soft); }
figure { margin: 1rem 0; }
figure svg { max-width: 100%; height: auto; background: #fff; border-radius: 6px; padding: .5rem; box-sizing: border-box; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.yes { color: var(--good); }
.no { color: var(--bad); font-weight: 600; }
.verdict { font-size: 1.05rem; }
"""


def document(title: str, body: str) -> str:
    """A whole page around ``body``, which is HTML."""
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>{body}</body></html>\n"
    )


def table(rows: Sequence[dict[Any, Any]]) -> str:
    """An HTML table; floats to 4 significant digits, booleans as yes and NO."""
    if not rows:
        return "<p>nothing to show</p>"
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    lines = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row.values()) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"


def figure(draw: Callable[[], Figure], caption: str) -> str:
    """A figure as inline SVG with its caption."""
    return f"<figure>{figures.svg(draw())}<figcaption>{html.escape(caption)}</figcaption></figure>"


def details_block(title: str, body: str) -> str:
    """A block that is folded until opened."""
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as dictionaries."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def verdict(holding: int, total: int, of: str) -> str:
    state = "yes" if holding == total else "no"
    return f"<p class='verdict'><span class='{state}'>{holding} of {total}</span> {html.escape(of)} hold.</p>"


def every(values: Iterable[bool]) -> bool:
    return all(bool(value) for value in values)


def _cell(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "<span class='yes'>yes</span>" if value else "<span class='no'>NO</span>"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    if isinstance(value, list):
        value = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return "" if value is None else html.escape(str(value))
