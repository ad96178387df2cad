"""The laws as they enter a comparison: a registry key, a label, and what it is called with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from estimators import LAWS
from estimators.law import Law, Spectrum


@dataclass(frozen=True)
class Contender:
    """A law as it enters the comparison: a registry key and what to call it with."""

    label: str
    name: str
    keep: float | None = None  # fraction of directions, spectral only

    def fit(self, S: Tensor | Spectrum, rank: int, c: float) -> Law:
        """This law for gradients with second moment S."""
        n = (S.Q if isinstance(S, Spectrum) else S).shape[-1]
        options: dict[str, Any] = {} if self.keep is None else {"keep": max(1, round(self.keep * n))}
        return LAWS[self.name].from_second_moment(S, rank, c, **options)


def contenders(law: Sequence[str], keep: Sequence[float]) -> list[Contender]:
    """The laws asked for, and if the spectral one is among them its sketched forms that keep these fractions of the directions."""
    result = [Contender(name, name) for name in law]
    if "spectral" in law:
        result += [Contender(f"spectral k={fraction:g}n", "spectral", fraction) for fraction in keep]
    return result


def rank_of(ratio: float, n: int) -> int:
    """r for a fraction r/n, at least 1."""
    return max(1, round(ratio * n))
