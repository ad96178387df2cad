"""Limits of fields that questions share; what is wrong is said with the value that was given."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
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


def ranks(file: Path) -> dict[str, int]:
    """r by layer name from a JSON file. Raises ``WrongInput`` when there is no such file, or when it holds anything else."""
    from experiments.runs import WrongInput  # not above: other fields need no torch

    try:
        found = json.loads(file.read_bytes())
    except OSError:
        raise WrongInput(f"ranks: there is no file {file}; lowrank advise and lowrank ranks write such files") from None
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found or not all(type(r) is int and r >= 1 for r in found.values()):
        raise WrongInput(f'ranks: {file} must hold positive integers by layer name, such as {{"model.layers.0.self_attn.q_proj": 8}}')
    return found


def ranks_sha256(file: Path | None) -> str:
    """Of the ranks in a file, however it is laid out; empty for none, and for a file that is not there, which ``ranks`` refuses when the run begins.
    Raises ``WrongInput`` for one that holds anything else."""
    return "" if file is None or not file.exists() else hashlib.sha256(json.dumps(ranks(file), sort_keys=True).encode()).hexdigest()
