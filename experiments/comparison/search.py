"""The search for a learning rate on a fixed number of trials, from where a method's own default is: up or down while that helps, then closer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from optimizers import OPTIMIZERS

FACTOR = 10**0.5  # between the first learning rates
USUAL = 3e-3  # of AdamW, for short trainings of small models; defaults below it are of methods that step as long as AdamW, for large ones


def start(method: str) -> float:
    """The default learning rate of an optimizer of ``OPTIMIZERS``, but the usual one where that is larger, and of anything else."""
    if method not in OPTIMIZERS:
        return USUAL
    return max(USUAL, float(OPTIMIZERS[method].default("lr")))


def first(method: str) -> list[float]:
    """Three learning rates around ``start``."""
    return around(start(method))


def around(rate: float) -> list[float]:
    """Three learning rates, ``rate`` the middle one."""
    return [rounded(rate * FACTOR**power) for power in (-1, 0, 1)]


def common(kind: type[Any], config: Any, varies: set[str]) -> dict[str, Any]:
    """What all trials of a comparison take from its configuration: the fields that the dataclass ``kind`` has too, without those that vary."""
    same = {field.name for field in fields(kind)} & {field.name for field in fields(config)}
    return {name: getattr(config, name) for name in same - varies}


def following(losses: Mapping[float, float]) -> float:
    """The next learning rate: beyond the best one if that is the smallest or largest so far, otherwise between it and its better neighbour.

    ``losses`` may be infinite. Raises ``ValueError`` for fewer than two.
    """
    if len(losses) < 2:
        raise ValueError(f"following({dict(losses)}): needs at least two learning rates")
    rates = sorted(losses)
    best = min(rates, key=lambda rate: losses[rate])
    place = rates.index(best)
    if place == 0:
        return rounded(best / FACTOR)
    if place == len(rates) - 1:
        return rounded(best * FACTOR)
    neighbour = min(rates[place - 1], rates[place + 1], key=lambda rate: losses[rate])
    return rounded(math.sqrt(best * neighbour))


def climb(tuning: Mapping[Any, list[Any]], further: int, score: Callable[[Any], float], train: Callable[[list[Any]], None]) -> None:
    """Train the trials of every contender, then ``further`` ones, each where ``following`` leads from those before.

    ``tuning``: contender → its trials, dataclasses with a field ``lr``, to which these are added; ``score``: the loss of a trained one.
    """
    train([trial for some in tuning.values() for trial in some])
    for _ in range(further):
        for some in tuning.values():
            some.append(replace(some[0], lr=following({trial.lr: score(trial) for trial in some})))
        train([some[-1] for some in tuning.values()])


def tuned(
    tuning: Mapping[Any, list[Any]],
    further: int,
    score: Callable[[Any], float],
    told: Callable[[Any, list[Any]], list[dict[str, Any]]],
    train: Callable[[list[Any]], None],
) -> tuple[list[dict[str, Any]], dict[Any, Any]]:
    """``climb``; then the rows of all trials, which ``told(contender, trials)`` gives with a field ``chosen``, and contender → the chosen trial."""
    climb(tuning, further, score, train)
    rows = {one: told(one, some) for one, some in tuning.items()}
    best = {one: next(trial for trial, row in zip(tuning[one], mine, strict=True) if row["chosen"]) for one, mine in rows.items()}
    return [row for mine in rows.values() for row in mine], best


def judged(trials: Sequence[Any], score: Callable[[Any], float]) -> list[dict[str, Any]]:
    """Of each trial its steps and loss, whether it is the best (the first of equals), and whether the best has an extreme learning rate."""
    losses, edges = [score(trial) for trial in trials], (min(trial.lr for trial in trials), max(trial.lr for trial in trials))
    best = losses.index(min(losses))
    return [
        {"steps": trial.steps, "loss": losses[i], "chosen": i == best, "at_edge": i == best and trial.lr in edges}
        for i, trial in enumerate(trials)
    ]


def rounded(rate: float) -> float:
    """To three digits, as it will be written."""
    return float(f"{rate:.3g}")
