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
    """The laws asked for, and the sketched forms of those that have one (the spectral law), keeping these fractions of directions."""
    result = [Contender(name, name) for name in law]
    sketched = [name for name in law if hasattr(LAWS[name], "keep")]  # laws that can know some directions only
    return result + [Contender(f"{name} k={fraction:g}n", name, fraction) for name in sketched for fraction in keep]
