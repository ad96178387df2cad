"""What every notebook starts with: the one look of all figures, and two sizes: whole, and small enough for a test."""

from __future__ import annotations

import os
from typing import TypeVar

from experiments.pages import figures
from experiments.publish import committed

__all__ = ["SMOKE", "begin", "committed", "size"]

SMOKE = os.environ.get("LOWRANK_SMOKE", "0") not in ("", "0")
T = TypeVar("T")


def begin() -> None:
    """Set the look of the figures; call in the first cell."""
    figures.style()


def size(full: T, smoke: T) -> T:
    """``full``, or ``smoke`` when $LOWRANK_SMOKE is set, as ``make test`` does."""
    return smoke if SMOKE else full
