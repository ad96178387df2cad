"""The measurement: streaming equals batch, sketches equal full estimates, and every number equals its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from estimators import Coordinate, FixedBasis, Gaussian, HaarStiefel, Population, estimate, measure, measure_estimates
from estimators.measure import Running
from tests.monte_carlo import assert_mean


def test_running_equals_all_at_once(generator: torch.Generator) -> None:
    values = torch.randn(1000, 3, generator=generator, dtype=torch.float64) * 1e3 + 1e6
    running = Running()
    for part in values.split([1, 499, 2, 498]):
        running.update(part)
    for k, seen in enumerate(running.estimates):
        assert seen.value == pytest.approx(float(values[:, k].mean()), rel=1e-12)
        assert seen.standard_error == pytest.approx(float(values[:, k].std()) / 1000**0.5, rel=1e-9)
    single = Running()
    single.update(values[:1])
    assert single.estimates[0].standard_error == math.inf


@pytest.mark.parametrize("budget", [2**28, 4000])
def test_sketches_equal_full_estimates(budget: int, generator: torch.Generator) -> None:
    """The same draws through both: every statistic agrees, whatever the chunk size."""
    G = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    law = HaarStiefel(n=7, rank=3, c=0.8)

    def draw(size: int, generator: torch.Generator) -> Tensor:
        return estimate(G, law.sample(size, generator=generator, dtype=torch.float64))

    sizes: list[int] = []

    def recorded(size: int, generator: torch.Generator) -> Tensor:
        sizes.append(size)
        return draw(size, generator)

    fast = measure(law, G, 500, generator=torch.Generator().manual_seed(1), budget_bytes=2**28)
    plain = measure_estimates(recorded, G, 500, generator=torch.Generator().manual_seed(1), budget_bytes=2**28)
    for name in ("mse", "square", "alignment", "bias", "variance"):
        a, b = getattr(fast, name), getattr(plain, name)
        assert a.value == pytest.approx(b.value, rel=1e-9) and a.standard_error == pytest.approx(b.standard_error, rel=1e-7)
    torch.testing.assert_close(fast.mean, plain.mean)
    sizes.clear()
    small = measure_estimates(recorded, G, 500, generator=torch.Generator().manual_seed(1), budget_bytes=budget)
    assert sum(sizes) == 500 and max(sizes) * 4 * G.numel() * 8 <= budget
    assert abs(small.mse.value - plain.mse.value) < 5 * math.hypot(small.mse.standard_error, plain.mse.standard_error)


def test_memory_is_bounded_by_the_budget(generator: torch.Generator) -> None:
    law, seen = Gaussian(n=64, rank=8), []
    original = Gaussian.sample

    def spy(self: Gaussian, *batch: int, **options):
        seen.append(batch[0])
        return original(self, *batch, **options)

    Gaussian.sample = spy  # pyright: ignore[reportAttributeAccessIssue]
    try:
        measure(law, torch.ones(4, 64), 10_000, generator=generator, budget_bytes=2**20)
    finally:
        Gaussian.sample = original
    assert sum(seen) == 10_000 and max(seen) * 4 * 3 * 64 * 8 <= 2**20


def test_definitions_on_a_law_without_randomness(generator: torch.Generator) -> None:
    G = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    seen = measure(FixedBasis(n=6, rank=2), G, 10, generator=generator)
    lost = float(G[:, 2:].square().sum())
    assert seen.mse.value == pytest.approx(lost) and seen.mse.standard_error == pytest.approx(0, abs=1e-12)
    assert seen.bias is not None and seen.bias.value == pytest.approx(lost)
    assert seen.variance is not None and seen.variance.value == pytest.approx(0, abs=1e-12)
    assert seen.alignment.value == pytest.approx(float(G[:, :2].square().sum() / G.square().sum()))
    assert seen.mean is not None
    torch.testing.assert_close(seen.mean, torch.cat([G[:, :2], torch.zeros(3, 4, dtype=torch.float64)], dim=1))


@pytest.mark.parametrize("outlier", [1.0, 30.0])
def test_a_population_is_weighed_without_bias(outlier: float, generator: torch.Generator) -> None:
    """Mini-batches are drawn with unequal chances; means over the population must not move, also with one huge gradient in it."""
    G = torch.randn(6, 3, 5, generator=generator, dtype=torch.float64)
    G[2] *= outlier
    law, g = HaarStiefel(n=5, rank=2), G.mean(0)
    seen = measure(law, G, 200_000, generator=generator)
    second = float(G.square().sum() / 6)
    expected = 5 / 2 * second - float(g.square().sum())
    assert abs(seen.mse.value - expected) < 5 * seen.mse.standard_error < 0.05 * expected
    assert abs(seen.alignment.value - 1) < 5 * seen.alignment.standard_error
    assert seen.bias is not None and abs(seen.bias.value) < 5 * seen.bias.standard_error
    population = Population(G)
    assert float((population.chance * (1 / (6 * population.chance))).sum()) == pytest.approx(1)
    again = measure(law, population, 1000, generator=torch.Generator().manual_seed(0))
    same = measure(law, G, 1000, generator=torch.Generator().manual_seed(0))
    assert again.mse == same.mse


def test_squared_bias_is_unbiased_and_its_error_honest(generator: torch.Generator) -> None:
    """Over many measurements of 48 draws the mean squared bias is the true one, although each estimate is far noisier."""
    G = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    law = Coordinate(n=4, rank=1, c=0.5)

    def draw(size: int, generator: torch.Generator) -> Tensor:
        results = [measure(law, G, 48, generator=generator) for _ in range(size)]
        return torch.tensor([[m.bias.value, m.variance.value] for m in results if m.bias and m.variance], dtype=torch.float64)

    norm = float(G.square().sum())
    truth = torch.tensor([0.25 * norm, 0.25 * (4 - 1) * norm], dtype=torch.float64)
    assert_mean(draw, truth, draws=600, resolution=0.2 * norm, generator=generator)


def test_too_few_draws_say_so(generator: torch.Generator) -> None:
    seen = measure(HaarStiefel(n=4, rank=2), torch.ones(2, 4), 2, generator=generator)
    assert seen.bias is not None and seen.bias.standard_error == math.inf
    half = measure(HaarStiefel(n=4, rank=2), 1e-4 * torch.ones(2, 4, dtype=torch.float16), 10, generator=generator)
    assert half.mse.value > 0 and math.isfinite(half.mse.standard_error)
    zero = measure(HaarStiefel(n=4, rank=2), torch.zeros(3, 2, 4), 10, generator=generator)
    assert zero.mse.value == 0 and math.isnan(zero.alignment.value)


@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_named(generator: torch.Generator) -> None:
    law = HaarStiefel(n=4, rank=2)
    for gradients, draws, message in [
        (torch.ones(2, 5), 10, "must have 4 columns"),
        (torch.ones(4), 10, r"must be \(m, n\) or \(N, m, n\)"),
        (torch.full((2, 4), math.nan), 10, "NaN or infinite"),
        (torch.ones(2, 4), 1, "at least 2 draws"),
    ]:
        with pytest.raises(ValueError, match=message):
            measure(law, gradients, draws, generator=generator)
    with pytest.raises(ValueError, match="expected"):
        measure_estimates(lambda size, _: torch.ones(size, 3, 3), torch.ones(2, 4), 10, generator=generator)
