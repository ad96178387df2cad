"""Limits of fields that questions share; what is wrong is said with the value that was given."""

from __future__ import annotations

from typing import Any

SEEDS = 2**32  # numpy's and torch's generators take smaller ones


def at_least(config: Any, least: float, *names: str) -> None:
    """Every value of the named fields, numbers or tuples of numbers. Raises ``ValueError`` for the first that is smaller, or no number."""
    for name in names:
        value = getattr(config, name)
        if not all(one >= least for one in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"{name} must be at least {least:g}, got {value}")


def seeds(config: Any) -> None:
    """Raises ``ValueError`` when the field ``seed``, where there is one, holds a number that generators do not take, or one of several twice."""
    value = getattr(config, "seed", 0)
    several = value if isinstance(value, tuple) else (value,)
    if not all(0 <= one < SEEDS for one in several):
        raise ValueError(f"seed must be between 0 and {SEEDS - 1}, got {' '.join(map(str, several))}")
    if len(set(several)) < len(several):
        raise ValueError(f"seed names one more than once: {' '.join(map(str, several))}")
