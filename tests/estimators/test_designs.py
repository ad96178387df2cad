"""Fixed-size designs: exact probabilities, joint ones too, against theory and against what multinomial gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from estimators.designs import DESIGNS, inclusion_probabilities
from tests.monte_carlo import assert_mean
from theory import optimal, spectral


@settings(deadline=None)
@given(
    sigma=st.lists(st.one_of(st.just(0.0), st.floats(1e-8, 1e4)), min_size=1, max_size=12).filter(lambda s: max(s) > 0),
    rank=st.integers(1, 12),
    floor=st.sampled_from([0.0, 1e-3, 0.3]),
)
def test_probabilities_agree_with_theory(sigma: list[float], rank: int, floor: float) -> None:
    """Two algorithms, all units at once here and one after the other there, one answer."""
    rank = min(rank, len(sigma))
    ours = inclusion_probabilities(torch.tensor(sigma, dtype=torch.float64), rank, floor)
    np.testing.assert_allclose(ours.numpy(), optimal.inclusion_probabilities(sigma, rank, floor), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("floor", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("rank", [1, 2, 17, 63, 64])
@pytest.mark.parametrize("zeros", [0, 5])
def test_spectra_over_twenty_orders_of_magnitude(zeros: int, rank: int, floor: float, generator: torch.Generator) -> None:
    """The smallest π, down to 1e-10 of the largest, is as exact as any. Many layers at once, half of them with equal eigenvalues among others."""
    exponents = -20 * torch.rand(16, 64, generator=generator, dtype=torch.float64)
    exponents[8:] = exponents[8:].round()
    sigma = 10**exponents
    sigma[:, :zeros] = 0
    ours = inclusion_probabilities(sigma, rank, floor).numpy()
    for mine, spectrum in zip(ours, sigma.numpy(), strict=True):
        expected = optimal.inclusion_probabilities(spectrum, rank, floor)
        np.testing.assert_allclose(mine, expected, rtol=1e-9, atol=0)
        assert bool((mine[spectrum > 0] > 0).all()) and mine.sum() == pytest.approx(rank, rel=1e-12)


def test_no_unit_is_lost_to_rounding() -> None:
    """1 + 1e-17 is 1 in float64, and yet the second unit is drawn once in 1e17 times."""
    np.testing.assert_allclose(
        inclusion_probabilities(torch.tensor([1.0, 1e-34], dtype=torch.float64), 1, 0.0).numpy(), [1.0, 1e-17], rtol=1e-9
    )


def test_probabilities_are_batched() -> None:
    sigma = torch.rand(4, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = inclusion_probabilities(sigma, 3, 1e-3)
    for i in range(4):
        torch.testing.assert_close(together[i, 1], inclusion_probabilities(sigma[i, 1], 3, 1e-3), rtol=1e-12, atol=0)


@pytest.mark.parametrize("design", DESIGNS)
@pytest.mark.parametrize("pi", [[0.9, 0.6, 0.3, 0.1, 0.1], [1.0, 0.3, 0.7, 1.0], [0.25] * 8, [1.0, 1.0], [1.0]])
def test_inclusion_is_exact_to_second_order(design: spectral.Design, pi: list[float], generator: torch.Generator) -> None:
    rank = round(sum(pi))

    def draw(size: int, generator: torch.Generator) -> torch.Tensor:
        J = DESIGNS[design](torch.tensor(pi, dtype=torch.float64), rank, (size,), generator)
        assert J.shape == (size, rank) and bool((J.diff(dim=-1) > 0).all())  # r different units, ascending
        inside = torch.zeros(size, len(pi), dtype=torch.float64).scatter_(1, J, 1.0)
        return (inside.unsqueeze(1) * inside.unsqueeze(2)).flatten(1)

    assert_mean(draw, torch.from_numpy(spectral.joint_inclusion(pi, design)), draws=100_000, resolution=0.02, generator=generator)


def test_multinomial_does_not_have_them(generator: torch.Generator) -> None:
    """Target .9/.6/.3/.1/.1 gives about .77/.63/.35/.12/.12."""
    pi = torch.tensor([0.9, 0.6, 0.3, 0.1, 0.1], dtype=torch.float64)
    J = torch.multinomial(pi.expand(100_000, -1), 2, replacement=False, generator=generator)
    seen = torch.zeros(100_000, 5).scatter_(1, J, 1.0).mean(0)
    torch.testing.assert_close(seen, torch.tensor([0.77, 0.63, 0.35, 0.12, 0.12]), rtol=0, atol=0.01)


@pytest.mark.parametrize("design", DESIGNS)
def test_designs_are_batched_over_layers(design: str, generator: torch.Generator) -> None:
    pi = torch.tensor([[0.5, 0.5, 1.0], [0.2, 0.9, 0.9]], dtype=torch.float64)
    J = DESIGNS[design](pi, 2, (1000, 4), generator)
    assert J.shape == (1000, 4, 2, 2)
    assert bool((J[:, :, 0] == 2).any(-1).all())  # the saturated unit of the first layer is always there


@pytest.mark.parametrize("design", DESIGNS)
def test_any_prefix_holds_its_share_rounded(design: str, generator: torch.Generator) -> None:
    """What lets the sketched form know its number of tail columns in advance."""
    pi = torch.tensor([0.7, 0.6, 0.5, 0.3, 0.3, 0.3, 0.3], dtype=torch.float64)
    J = DESIGNS[design](pi, 3, (5000,), generator)
    for k in range(1, 8):
        count, expected = (k > J).sum(-1), float(pi[:k].sum())
        assert int(count.min()) >= int(np.floor(expected - 1e-9)) and int(count.max()) <= int(np.ceil(expected + 1e-9))
