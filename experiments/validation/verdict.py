"""A verdict: a measured number, its standard error, the exact value, and the smallest defect that would have been seen.

A verdict holds only when the run behind it was long enough: the defect it promises to see (``required``, relative to the exact value) must be
at least 8 standard errors wide. Noise can leave a verdict unresolved, it can never make one pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from scipy import stats

Z_LIMIT = 5.0  # two-sided probability 6e-7 a statistic
WIDTH = 8.0  # standard errors inside one resolution: a defect of that size is seen at z > 5 with probability 0.999
MANY = 2000  # draws beyond which Student's distribution is the normal one at 5 standard errors, to 2 %
ROUNDING = 1e-11  # relative spread of a statistic that is constant in exact arithmetic (float64)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One measured statistic beside its exact value.

    ``scale``: what relative numbers refer to, |theory| unless that is 0; ``required``: the largest acceptable ``resolution``; ``draws``: how
    many independent values stand behind the standard error, which matters when they are few.
    """

    name: str
    estimate: float
    standard_error: float
    theory: float
    scale: float
    required: float
    draws: float = math.inf

    @property
    def z(self) -> float:
        """Distance from the exact value in standard errors; rounding counts as error, so constants compare too.

        From few draws the ratio has Student's distribution; it is then mapped to the normal score of the same probability.
        """
        return student((self.estimate - self.theory) / self._error, self.draws)

    @property
    def resolution(self) -> float:
        """The smallest relative defect this run would have seen: 8 standard errors over the scale."""
        return WIDTH * self._error / self.scale

    @property
    def resolved(self) -> bool:
        """Whether the run was long enough to see a defect of the required size."""
        return self.resolution <= self.required

    @property
    def holds(self) -> bool:
        """Resolved, and within 5 standard errors of the exact value."""
        return self.resolved and abs(self.z) < Z_LIMIT

    @property
    def _error(self) -> float:
        return math.hypot(self.standard_error, ROUNDING * self.scale)

    def row(self) -> dict[str, Any]:
        """The verdict as plain values, for a table or a JSON line."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "draws"} | {
            "z": self.z,
            "resolution": self.resolution,
            "holds": self.holds,
        }

    def __str__(self) -> str:
        state = "holds" if self.holds else "FAILS" if self.resolved else "UNRESOLVED"
        return (
            f"{self.name}: {self.estimate:.6g} ± {self.standard_error:.2g}, theory {self.theory:.6g}, z = {self.z:+.2f}, "
            f"would have seen {100 * self.resolution:.2g} %: {state}"
        )


@dataclass(frozen=True, kw_only=True)
class Check:
    """All verdicts on one subject over one set of draws; its own numbers are those of the verdict that decides."""

    subject: str
    draws: int
    verdicts: tuple[Verdict, ...]

    @property
    def decisive(self) -> Verdict:
        """The first verdict that does not hold, else the one with the largest |z|."""
        failing = [v for v in self.verdicts if not v.holds]
        return failing[0] if failing else max(self.verdicts, key=lambda v: abs(v.z))

    @property
    def holds(self) -> bool:
        """Whether every verdict holds."""
        return all(v.holds for v in self.verdicts)

    @property
    def resolution(self) -> float:
        """The smallest relative defect that every verdict would have seen."""
        return max(v.resolution for v in self.verdicts)

    @property
    def estimate(self) -> float:
        """Of the decisive verdict."""
        return self.decisive.estimate

    @property
    def standard_error(self) -> float:
        """Of the decisive verdict."""
        return self.decisive.standard_error

    @property
    def theory(self) -> float:
        """Of the decisive verdict."""
        return self.decisive.theory

    @property
    def z(self) -> float:
        """Of the decisive verdict."""
        return self.decisive.z

    def __str__(self) -> str:
        return "\n".join([f"{self.subject}, {self.draws} draws", *(f"  {v}" for v in self.verdicts)])


def student(ratio: float, draws: float) -> float:
    """The normal score with the two-sided probability that ``ratio`` has under Student's distribution of ``draws`` − 1 degrees."""
    if draws > MANY:
        return ratio
    return math.copysign(float(stats.norm.isf(stats.t.sf(abs(ratio), draws - 1))), ratio)
