"""Elements of the HTML report: document, contents, tables, figures, folded blocks. No network, light and dark, any width."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.pages import browser, figures, inks

LONG = 36  # characters from which a cell is broken into lines
NUMBER = re.compile(r"[\[(<≤>≥~≈]*\s*[+−-]?(\.?\d|inf\b)")


@dataclass(frozen=True)
class Link:
    """A cell that leads to the element ``to`` of this page."""

    text: str
    to: str

    def __str__(self) -> str:
        return self.text


def many(values: Sequence[object], noun: str) -> str:
    """How many there are, with an s unless it is one."""
    return f"{len(values)} {noun}{'' if len(values) == 1 else 's'}"


def uncorrected(intervals: int) -> str:
    """What is said below so many 95 % intervals of differences."""
    return f"the {intervals} intervals of differences are not corrected for their number: one in twenty misses its difference on average"


def document(title: str, summary: str, body: str, sections: Sequence[Link] = ()) -> str:
    """A whole page around ``summary`` and ``body``, which are HTML; more than one section is listed between the two, on a wide page beside them."""
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width, initial-scale=1'><title>{html.escape(title)}</title>"
    contents = "".join(f"<li>{_cell(link)}</li>" for link in sections)
    nav = f"<nav aria-label='Contents'><strong>Contents</strong><ul>{contents}</ul></nav>" if len(sections) > 1 else ""
    return (
        f"<!doctype html><html lang='en'><head>{head}<style>{inks.variables(body)}{browser.STYLE}</style></head>"
        f"<body{' class=contents' if nav else ''}><header><h1>{html.escape(title)}</h1>{summary}</header>{nav}<main>{inks.apart(body)}</main>"
        f"<script>{browser.SCRIPT}</script></body></html>\n"
    )


def section(link: Link, body: str) -> str:
    """A part of the page with its heading, that ``link`` leads to."""
    return f"<section id='{html.escape(link.to)}'><h2>{html.escape(link.text)}</h2>{body}</section>"


def table(rows: Sequence[dict[Any, Any]]) -> str:
    """An HTML table that can be sorted; floats to 4 significant digits, booleans as yes and NO. Columns whose cells begin with a number are flush
    right, others are words."""
    if not rows:
        return "<p>nothing to show</p>"
    columns = {name: [_cell(row.get(name)) for row in rows] for name in rows[0]}
    kinds = {name: "" if all(not cell or NUMBER.match(cell) for cell in cells) else "words" for name, cells in columns.items()}
    head = "".join(f"<th{_class(kinds[name])}>{html.escape(str(name))}</th>" for name in columns)
    lines = "".join(
        "<tr>"
        + "".join(f"<td{_class('text' if _is_long(cell) else kinds[name])}>{cell}</td>" for name, cell in zip(columns, cells))
        + "</tr>"
        for cells in zip(*columns.values(), strict=True)
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"


def factored(rows: Sequence[dict[Any, Any]]) -> str:
    """A table of verdicts and of the columns in which rows differ, below a line of what they have in common; rows may lack columns."""
    columns = dict.fromkeys(name for row in rows for name in row)
    same = lambda values: len(values) > 1 and not isinstance(values[0], bool) and all(value == values[0] for value in values)  # noqa: E731
    shared = [name for name in columns if same([row.get(name) for row in rows])]
    common = "; ".join(f"{html.escape(str(name))} {_cell(rows[0][name])}" for name in shared if rows[0][name] is not None)
    line = f"<p>In all rows: {common}.</p>" if common else ""
    return line + table([{name: row.get(name) for name in columns if name not in shared} for row in rows])


def figure(draw: Callable[[], Figure], caption: str) -> str:
    """A figure as inline SVG with its caption."""
    drawn = inks.inline(figures.svg(draw()), caption)
    return f"<figure><div class='scroll'>{drawn}</div><figcaption>{html.escape(caption)}</figcaption></figure>"


def details_block(title: str, body: str) -> str:
    """A block that is folded until opened."""
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a frame as dictionaries."""
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def verdict(holding: int, total: int, of: str) -> str:
    return f"<p class='verdict'>{share(holding, total)} {html.escape(of)} hold.</p>"


def share(holding: int, total: int) -> str:
    """How many of how many, in the colour of the outcome."""
    return f"<span class='{'yes' if holding == total else 'no'}'>{holding:,} of {total:,}</span>"


def every(values: Iterable[bool]) -> bool:
    return all(bool(value) for value in values)


def _class(name: str) -> str:
    return f" class='{name}'" if name else ""


def _is_long(cell: str) -> bool:
    return not cell.startswith("<") and len(html.unescape(cell)) > LONG


def _cell(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "<span class='yes'>yes</span>" if value else "<span class='no'>NO</span>"
    if isinstance(value, Link):
        return f"<a href='#{html.escape(value.to)}'>{html.escape(value.text)}</a>"
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, list):
        value = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return "" if value is None else html.escape(str(value))
