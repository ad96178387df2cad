"""The runtime checker behind jaxtyping annotations: beartype, which cannot check a method that returns ``Self`` on its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep673Exception


def checker(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with its arguments and result checked; unchanged where its result is ``Self``."""
    try:
        return beartype(function)
    except BeartypeDecorHintPep673Exception:
        return function
