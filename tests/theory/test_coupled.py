"""Where a sparse code dies, by iteration: the bounds hold from many starts, and are not empty."""

from __future__ import annotations

import numpy as np
import pytest

from theory import coupled

ETA = 0.02


def died(sigma: float, penalty: float, x: float, a: float, steps: int) -> int | None:
    """The first step with x = 0; None within ``steps``."""
    for t in range(steps + 1):
        if x == 0:
            return t
        x, a = coupled.descent(sigma, penalty, ETA, x, a)
    return None


def test_starts_that_stall_end_at_zero_within_the_bound_and_others_can_live() -> None:
    generator = np.random.default_rng(0)
    tight, lived = [], 0
    for _ in range(300):
        sigma, penalty, x, a = generator.uniform(0.5, 2), generator.uniform(0.1, 1), generator.uniform(0.01, 1), generator.uniform(0.01, 1)
        if coupled.stalls(sigma, penalty, x, a):
            bound = coupled.steps_to_vanish(sigma, penalty, ETA, x, a)
            seen = died(sigma, penalty, x, a, bound)
            assert seen is not None, (sigma, penalty, x, a)
            tight.append(seen / bound)
        else:
            lived += died(sigma, penalty, x, a, 3000) is None
    assert len(tight) > 30 and max(tight) > 0.9 and lived > 30


def test_at_zero_it_stays() -> None:
    assert coupled.descent(1.0, 0.6, 0.1, 0.0, 0.5) == (0.0, 0.5)  # σa ≤ λ
    assert coupled.descent(1.0, 0.4, 0.1, 0.0, 0.5)[0] == pytest.approx(0.01)
    assert float(coupled.loss(1.0, 0.6, 0.0, 0.5)) == 0.5


def test_the_coupled_step_revives_within_the_bound() -> None:
    generator = np.random.default_rng(1)
    tight = []
    for _ in range(100):
        sigma, penalty = generator.uniform(0.5, 2), generator.uniform(0.1, 1)
        x = generator.uniform(0.1, 0.8) * min(1.0, sigma**2 / (4 * penalty))  # a step of a is shorter than the distance of the two roots
        a = generator.uniform(0.01, 0.9) * penalty / sigma  # (σ − xa)a < λ
        bound = coupled.steps_to_revive(sigma, penalty, ETA, x, a)
        steps = 0
        while (after := coupled.descent(sigma, penalty, ETA, x, a))[0] <= x:  # then x̂ = x
            a, steps = after[1], steps + 1
            assert steps <= bound, (sigma, penalty, x, a)
        tight.append(steps / bound)
    assert max(tight) > 0.9


def test_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"coupled.stalls\(penalty=0.0\): must be positive"):
        coupled.stalls(1.0, 0.0, 0.1, 0.1)
    with pytest.raises(ValueError, match="this start need not stall"):
        coupled.steps_to_vanish(1.0, 0.1, ETA, 0.5, 0.5)
    with pytest.raises(ValueError, match=r"x must be below σ²/\(4λ\) = 0.25"):
        coupled.steps_to_revive(1.0, 1.0, ETA, 0.3, 0.1)
