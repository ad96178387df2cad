"""Generated blocks inside pages that people write: what stands between two markers is replaced, the rest is left alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

COMMAND = "python -m experiments.pages.readme"


def markers(name: str) -> tuple[str, str]:
    """The lines before and after the block ``name``."""
    return f"<!-- {name}: begin, written by {COMMAND} -->", f"<!-- {name}: end -->"


def updated(text: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """``text`` with fresh blocks between their markers. Raises ``ValueError`` when a marker is missing."""
    for name, block in blocks.items():
        begin, end = markers(name)
        if begin not in text or end not in text:
            raise ValueError(f"the text has no markers {begin!r} and {end!r}")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{block()}\n{end}{rest.partition(end)[2]}"
    return text
