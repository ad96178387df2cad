"""Ranks by a threshold, and what truncation costs: identities, and the threshold against the search through all values it could have."""

from __future__ import annotations

import numpy as np
import pytest

from theory import allocation, truncation


def some(seed: int, layers: int = 4) -> tuple[list[np.ndarray], list[float]]:
    """Spectra of different lengths and decay, and costs."""
    generator = np.random.default_rng(seed)
    return [np.sort(generator.lognormal(0, 1 + layer, 6 + layer))[::-1] for layer in range(layers)], list(generator.uniform(1, 3, layers))


def by_search(singular: list[np.ndarray], costs: list[float], budget: float) -> list[int]:
    """The smallest threshold whose ranks fit, of all normalised singular values."""
    normalised = [s / s[0] for s in singular]
    for threshold in np.sort(np.concatenate(normalised)):
        found = [int((s >= threshold).sum()) for s in normalised]
        if sum(r * a for r, a in zip(found, costs, strict=True)) <= budget:
            return found
    raise AssertionError("no threshold fits")


def test_the_tail_is_the_error_of_the_truncated_svd() -> None:
    W = np.random.default_rng(0).normal(size=(7, 5))
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    left = [float(np.linalg.norm(W - (U[:, :r] * s[:r]) @ Vt[:r]) ** 2) for r in range(1, 6)]
    assert truncation.tails(s) == pytest.approx(left, rel=1e-10, abs=1e-12)
    assert truncation.tails(s[::-1]) == pytest.approx(truncation.tails(s), rel=1e-14)


def test_no_matrix_of_that_rank_is_nearer() -> None:
    """Eckart–Young: random ones, and least squares on a random row space."""
    generator = np.random.default_rng(1)
    W = generator.normal(size=(6, 5)) * np.logspace(0, -1, 5)
    tails = truncation.tails(np.asarray(np.linalg.svd(W, compute_uv=False), dtype=np.float64))
    for r in (1, 2, 3, 4):
        for _ in range(50):
            Q = np.linalg.qr(generator.normal(size=(5, r)))[0]
            assert np.linalg.norm(W - W @ Q @ Q.T) ** 2 >= tails[r - 1] * (1 - 1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_threshold_is_the_smallest_that_fits(seed: int) -> None:
    singular, costs = some(seed)
    for share in (1.0, 1.5, 2.5, 4.0):
        budget = share * sum(costs)
        assert truncation.ranks(singular, costs, budget) == by_search(singular, costs, budget)


@pytest.mark.parametrize("seed", range(6))
def test_ranks_grow_with_the_budget_and_leave_less_than_one_step(seed: int) -> None:
    singular, costs = some(seed)
    everything = sum(len(s) * a for s, a in zip(singular, costs, strict=True))
    before = [1] * len(singular)
    for budget in np.linspace(sum(costs), everything, 40):
        found = truncation.ranks(singular, costs, float(budget))
        spent = sum(r * a for r, a in zip(found, costs, strict=True))
        assert all(now >= then for now, then in zip(found, before, strict=True))
        assert spent <= budget * (1 + 1e-12) and budget - spent < max(costs) + 1e-9
        before = found
    assert before == [len(s) for s in singular]


def test_scale_of_a_layer_does_not_matter_and_equal_spectra_have_equal_ranks() -> None:
    singular, costs = some(3)
    scaled = [10.0**place * s for place, s in enumerate(singular)]
    assert truncation.ranks(scaled, costs, 3 * sum(costs)) == truncation.ranks(singular, costs, 3 * sum(costs))
    assert truncation.ranks([singular[0]] * 3, [1.0] * 3, 9.0) == [3] * 3


def test_limits_hold_and_what_they_save_goes_to_others() -> None:
    flat, steep = np.ones(8), np.logspace(0, -3, 8)
    assert truncation.ranks([flat, steep], [1.0, 1.0], 9.0) == [8, 1]
    assert truncation.ranks([flat, steep], [1.0, 1.0], 9.0, [5, 8]) == [5, 4]


@pytest.mark.parametrize("seed", range(4))
def test_the_ranks_of_least_error_have_no_more_error_than_those_of_the_threshold(seed: int) -> None:
    """Equal costs and convex tails, where the allocation is exact."""
    singular, _ = some(seed)
    tails = [truncation.tails(s) for s in singular]
    choices = [np.arange(1, len(s) + 1) for s in singular]
    for budget in (6.0, 12.0, 20.0):
        least, threshold = allocation.ranks(tails, choices, [1.0] * 4, budget), truncation.ranks(singular, [1.0] * 4, budget)
        error = [sum(float(f[r - 1]) for f, r in zip(tails, found, strict=True)) for found in (least, threshold)]
        assert error[0] <= error[1] * (1 + 1e-12) + 1e-12


@pytest.mark.parametrize(
    ("costs", "budget", "largest", "what"),
    [
        ([1.0, 1.0], 1.5, None, "ranks of 1 cost 2 already"),
        ([1.0, 0.0], 9.0, None, "positive"),
        ([1.0], 9.0, None, "one entry a layer"),
        ([1.0, 1.0], 9.0, [0, 2], "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(costs: list[float], budget: float, largest: list[int] | None, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        truncation.ranks([np.array([2.0, 1.0])] * 2, costs, budget, largest)
