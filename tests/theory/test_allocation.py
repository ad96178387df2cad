"""Ranks under a budget, against all choices tried one by one and against the closed form."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from theory import allocation


def brute_force(errors: list[np.ndarray], choices: list[np.ndarray], costs: list[float], budget: float) -> float:
    """The least total error of all combinations within the budget."""
    possible = itertools.product(*(range(len(r)) for r in choices))
    return min(
        sum(float(f[i]) for f, i in zip(errors, at, strict=True))
        for at in possible
        if sum(float(r[i]) * a for r, i, a in zip(choices, at, costs, strict=True)) <= budget
    )


def total(errors: list[np.ndarray], choices: list[np.ndarray], found: list[int]) -> float:
    return sum(float(f[list(r).index(rank)]) for f, r, rank in zip(errors, choices, found, strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_with_equal_costs_and_convex_errors_no_choice_is_better(seed: int) -> None:
    generator = np.random.default_rng(seed)
    choices = [np.arange(1, 7)] * 4
    errors = [generator.uniform(0.1, 10) / np.arange(1, 7) for _ in range(4)]
    for budget in (4.0, 7.0, 12.0, 24.0):
        found = allocation.ranks(errors, choices, [1.0] * 4, budget)
        assert sum(found) <= budget
        assert total(errors, choices, found) == pytest.approx(brute_force(errors, choices, [1.0] * 4, budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_with_other_costs_it_is_at_most_one_step_of_one_layer_above_the_best(seed: int) -> None:
    generator = np.random.default_rng(seed)
    choices = [np.array([1, 2, 4, 8])] * 4
    errors = [generator.uniform(0.1, 10) / r for r in choices]
    costs = list(generator.uniform(0.5, 3, 4))
    for budget in (sum(costs), 2.5 * sum(costs), 5 * sum(costs)):
        found = allocation.ranks(errors, choices, costs, budget)
        assert sum(r * a for r, a in zip(found, costs, strict=True)) <= budget * (1 + 1e-12)
        step = max(float(np.max(f[:-1] - f[1:])) for f in errors)
        assert total(errors, choices, found) <= brute_force(errors, choices, costs, budget) + step


def test_of_floor_attaining_laws_ranks_are_as_the_closed_form_says() -> None:
    n, t, a = np.array([64.0, 64.0, 256.0]), np.array([1.0, 9.0, 4.0]), np.array([1.0, 1.0, 2.0])
    choices = [np.arange(1, int(size) + 1) for size in n]
    errors = [size * trace / r for size, trace, r in zip(n, t, choices, strict=True)]
    found = np.array(allocation.ranks(errors, choices, list(a), 120.0))
    closed = np.sqrt(n * t / a)
    closed *= 120 / (a @ closed)
    assert np.abs(found - closed).max() <= 1 and a @ found <= 120


def test_uniform_ranks_are_no_better_at_the_same_cost() -> None:
    generator = np.random.default_rng(0)
    choices = [np.arange(1, 33)] * 10
    errors = [generator.lognormal(0, 2) / r for r in choices]
    for uniform in (1, 4, 16, 32):
        found = allocation.ranks(errors, choices, [1.0] * 10, 10.0 * uniform)
        assert total(errors, choices, found) <= sum(float(f[uniform - 1]) for f in errors) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("costs", "budget", "what"), [([1.0, 1.0], 1.5, "cost 2 already"), ([1.0, 0.0], 9.0, "positive"), ([1.0], 9.0, "one entry a layer")]
)
def test_what_cannot_be_is_refused(costs: list[float], budget: float, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        allocation.ranks([np.array([2.0, 1.0])] * 2, [np.array([1, 2])] * 2, costs, budget)
