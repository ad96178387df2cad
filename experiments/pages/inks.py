"""Figures on a page that is light or dark: every colour of a figure becomes a variable of the style sheet that has one value for each."""

from __future__ import annotations

import colorsys
import html
import itertools
import math
import re

PAPER, INK = "#0d1117", "#e6edf3"  # of the dark page
CONTRAST = 4.0  # to the paper: between what WCAG 2.2 asks of lines and points (3, 1.4.11) and of text (4.5, 1.4.3)
LEAST = 8.8  # CSS pixels: of the smallest label of a figure that the page has shrunk; then it scrolls
PAPERED = (
    r'<g id="patch_\d+">\s*<path [^>]*style="fill: #ffffff"/>\s*</g>'  # the backgrounds of a figure and its axes; the page is behind them
)
PIXELS = 96 / 72  # CSS pixels in a point


def dark(colour: str) -> str:
    """The colour on a dark page: a grey keeps its place between paper and ink, any other its hue, lightened until the paper sets it off.

    >>> dark("#ffffff"), dark("#000000"), dark("#d55e00")
    ('#0d1117', '#e6edf3', '#d55e00')
    """
    red, green, blue = _channels(colour)
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    if max(red, green, blue) - min(red, green, blue) < 0.02:
        return _hex(tuple(ink + (paper - ink) * lightness for paper, ink in zip(_channels(PAPER), _channels(INK), strict=True)))
    while contrast(colour, PAPER) < CONTRAST:
        lightness += 0.01
        colour = _hex(colorsys.hls_to_rgb(hue, lightness, saturation))
    return colour


def contrast(one: str, other: str) -> float:
    """Between 1 and 21, as WCAG defines it.

    >>> round(contrast("#ffffff", "#000000"), 9)
    21.0
    """
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def inline(svg: str, label: str) -> str:
    """The SVG of a figure as part of a page: colours as variables, its own style sheet, metadata and unused identifiers left out.

    It shrinks with the page as long as its text can be read. ``label`` is read to those who cannot see it.
    """
    for part in (r"<metadata>.*?</metadata>", r"<style.*?</style>", r"<!--.*?-->", r"<defs>\s*</defs>", PAPERED):
        svg = re.sub(part, "", svg, flags=re.DOTALL)
    used = set(re.findall(r"""(?:\(|href=["'])#([^)"']+)""", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"(?<=: )#([0-9a-f]{6})\b", r"var(--x\1)", svg)
    width = re.search(r'<svg[^>]* width="([\d.]+)pt"', svg)
    smallest = min((float(size) for size in re.findall(r'<text style="font-size: ([\d.]+)px', svg)), default=math.inf)
    least = f" style='min-width:{min(PIXELS, LEAST / smallest) * float(width[1]):.0f}px'" if width else ""
    svg = re.sub(r'(<svg[^>]*) height="[^"]*"', r"\1", svg, count=1)
    named = f"<svg role='img' aria-label='{html.escape(label)}'{least}"
    return re.sub(r"\n\s*", "\n", svg.replace("<svg", named, 1))


def apart(page: str) -> str:
    """``page`` with the number of each figure before its identifiers: two runs may have the same figure, and two figures the same marker."""
    figures = itertools.count(1)

    def renamed(found: re.Match[str]) -> str:
        number = next(figures)
        return re.sub(r"""( id="|\(#|href="#)""", rf"\1f{number}-", found[0])

    return re.sub(r"<svg .*?</svg>", renamed, page, flags=re.DOTALL)


def variables(page: str) -> str:
    """The part of the style sheet that gives the variables of the figures in ``page`` their two values."""
    colours = sorted({*re.findall(r"var\(--x([0-9a-f]{6})\)", page), "000000"})  # what has no colour is black
    light, darker = ("".join(f"--x{c}:{value(f'#{c}')};" for c in colours) for value in (str, dark))
    return f":root{{{light}}}\n@media (prefers-color-scheme: dark){{:root{{{darker}}}}}\n"


def _channels(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))


def _hex(channels: tuple[float, ...]) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in channels)


def _luminance(colour: str) -> float:
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _channels(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
