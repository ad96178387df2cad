"""A coin between two parts of a gradient G = A + B: A/(1−q) with probability 1−q, B/q with probability q (GUM, arXiv 2510.17802).

Proof: the mean is A + B = G. E‖X − G‖² = (1−q)·‖A/(1−q) − A − B‖² + q·‖B/q − A − B‖², and for ⟨A, B⟩ = 0 the terms are
q²/(1−q)·‖A‖² + (1−q)·‖B‖² and q·‖A‖² + (1−q)²/q·‖B‖², in all q/(1−q)·‖A‖² + (1−q)/q·‖B‖². By the inequality of arithmetic and geometric means
that is at least 2‖A‖‖B‖, with equality at q/(1−q) = ‖B‖/‖A‖.
"""

from __future__ import annotations

import math


def variance(leading: float, rest: float, share: float) -> float:
    """E‖X − G‖² for orthogonal parts with ‖A‖² = ``leading``, ‖B‖² = ``rest`` and q = ``share``. Raises ``ValueError`` outside 0 < q < 1.

    >>> variance(4.0, 1.0, 0.5)
    5.0
    """
    _check("variance", leading, rest)
    if not 0 < share < 1:
        raise ValueError(f"variance(share={share}): must be in (0, 1)")
    return share / (1 - share) * leading + (1 - share) / share * rest


def best_share(leading: float, rest: float) -> float:
    """q of least variance: √rest/(√leading + √rest), where the variance is 2√(leading·rest). Raises ``ValueError`` when both are 0.

    >>> best_share(4.0, 1.0)
    0.3333333333333333
    """
    _check("best_share", leading, rest)
    if leading + rest == 0:
        raise ValueError("best_share(leading=0, rest=0): any share will do")
    return math.sqrt(rest) / (math.sqrt(leading) + math.sqrt(rest))


def _check(call: str, leading: float, rest: float) -> None:
    if min(leading, rest) < 0 or not math.isfinite(leading + rest):
        raise ValueError(f"{call}(leading={leading}, rest={rest}): must be finite and not negative")
