"""(a) What is drawn, exactly: expectations over all outcomes of Grass's columns and GUM's coin; RSO's frames and the way it has made in them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from estimators.gaussian import Gaussian
from optimizers import GUM, RSO, Muon, Subspace
from optimizers.bases import Draw, FromLaw, top_right_singular
from optimizers.frames import ScaledColumns
from optimizers.gum import Coin, Tossed
from optimizers.selections import LargestColumns, SampledColumns
from optimizers.subspace import Rule
from optimizers.transports import Reset
from tests.monte_carlo import assert_mean
from tests.optimizers.test_identities import SHAPES, gradients, matrices, run
from tests.optimizers.test_identities_family import orthonormal, random, watched
from theory import coin, coordinate

# Grass


class Given:
    """In the place of a ``Draw``: the indices that are given, or those that one generator draws."""

    def __init__(self, drawn: Tensor | torch.Generator) -> None:
        self.drawn = drawn

    def each(self, G: Tensor, draw: Any) -> Tensor:
        return self.drawn if isinstance(self.drawn, Tensor) else draw(G, self.drawn)


def sampled(G: Tensor, r: int, drawn: Tensor | torch.Generator) -> ScaledColumns:
    frame = SampledColumns(r).choose(G, Given(drawn))  # pyright: ignore[reportArgumentType]
    assert isinstance(frame, ScaledColumns)
    return frame


def all_draws(G: Tensor, r: int) -> list[tuple[float, Tensor]]:
    """(probability, P = VVᵀ) of every tuple of indices, P as the frame of these indices makes it."""
    n = G.shape[1]
    q = G.norm(dim=0) / G.norm(dim=0).sum()
    identity = torch.eye(n, dtype=G.dtype)
    tuples = [torch.tensor(J) for J in itertools.product(range(n), repeat=r)]
    return [(float(q[J].prod()), sampled(G, r, J).passes(identity)) for J in tuples]


@pytest.mark.check("a", "grass_sampled")
@pytest.mark.parametrize("r", [1, 2, 3])
def test_sampled_columns_are_unbiased_with_their_exact_second_moment(r: int) -> None:
    """Over all nʳ tuples: E[P] = I, and E[PMP] is that of the core's coordinate law with these probabilities."""
    G = random(6, 4) * torch.tensor([3.0, 1.0, 0.5, 0.1])
    q = G.norm(dim=0) / G.norm(dim=0).sum()
    atoms = all_draws(G, r)
    assert sum(probability for probability, _ in atoms) == pytest.approx(1, abs=1e-12)
    mean = torch.stack([probability * P for probability, P in atoms]).sum(0)
    M = random(4, 4, seed=5)
    M = M + M.mT
    second = torch.stack([probability * P @ M @ P for probability, P in atoms]).sum(0)
    torch.testing.assert_close(mean, torch.eye(4).double(), rtol=0, atol=1e-12)
    expected = coordinate.weighted_second_moment(M.numpy(), r, q.numpy())
    np.testing.assert_allclose(second.numpy(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        coordinate.weighted_second_moment(M.numpy(), r, np.full(4, 0.25)),
        coordinate.second_moment(M.numpy(), r, replacement=True),
        atol=1e-12,
    )
    later = random(6, 4, seed=9)  # a gradient of the period, which the frame has not seen
    lifted = [probability * (later @ P) for probability, P in atoms]
    torch.testing.assert_close(torch.stack(lifted).sum(0), later, rtol=0, atol=1e-12)


@pytest.mark.check("a", "grass_sampled")
def test_columns_of_equal_norms_are_coordinates_with_replacement() -> None:
    G, M = torch.tensor([[2.0, -2, 2, 2], [1, 1, -1, 1]]).double(), random(4, 4)
    M = M + M.mT
    second = torch.stack([probability * P @ M @ P for probability, P in all_draws(G, 2)]).sum(0)
    np.testing.assert_allclose(second.numpy(), coordinate.second_moment(M.numpy(), 2, replacement=True), rtol=0, atol=1e-12)


@pytest.mark.check("a", "grass_sampled")
def test_columns_are_drawn_in_proportion_to_their_norms(generator: torch.Generator) -> None:
    G = random(6, 4) * torch.tensor([4.0, 2.0, 1.0, 0.5])
    q, square = G.norm(dim=0), G.square().sum(0)
    q, square = q / q.sum(), square / square.sum()
    assert min(float((q - other).abs().max()) for other in (square, torch.full_like(q, 0.25))) > 0.1  # what a resolution must tell apart

    def shares(size: int, generator: torch.Generator) -> Tensor:
        J = sampled(G.expand(size, 6, 4), 2, generator).J
        return nn.functional.one_hot(J, 4).double().mean(1)

    assert_mean(shares, q, draws=20_000, resolution=0.03, generator=generator)


@pytest.mark.check("a", "grass")
def test_the_largest_columns_are_those_that_lose_least() -> None:
    """Of all r-subsets; as they are."""
    G = random(6, 7) * torch.rand(7, generator=torch.Generator().manual_seed(2))
    for r in range(1, 8):
        frame = LargestColumns(r).choose(G, None)  # pyright: ignore[reportArgumentType]
        kept = lambda J: float(G[:, list(J)].square().sum())  # noqa: E731
        assert float(frame.passes(G).square().sum()) == pytest.approx(max(map(kept, itertools.combinations(range(7), r))))
        assert sorted(frame.tensors()["J"].tolist()) == sorted(G.norm(dim=0).argsort(descending=True)[:r].tolist())
        assert bool((frame.tensors()["scale"] == 1).all())


# RSO


class GaussianAdam(Subspace):
    """Adam in a Gaussian frame, begun anew with every frame."""

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(basis=FromLaw(group["rank"], Gaussian), every=4, inner=self.adam(group), transport=Reset())


@pytest.mark.check("a", "rso")
@pytest.mark.parametrize("shape", SHAPES)
def test_rso_without_pull_is_adam_in_gaussian_frames(shape: tuple[int, int]) -> None:
    (p,), (q,) = matrices([shape]), matrices([shape])
    first = RSO([p], 0.01, rank=4, every=4, scale=1.0, seed=5, weight_decay=0.1)
    second = GaussianAdam([q], 0.01, {"rank": 4}, seed=5, weight_decay=0.1)
    assert torch.equal(run(first, [p], 10)[0], run(second, [q], 10)[0])
    assert "way" not in first.state[p]


@pytest.mark.check("a", "rso")
@pytest.mark.parametrize("shape", SHAPES)
def test_the_way_is_the_sum_of_the_steps_since_the_frame_was_drawn(shape: tuple[int, int]) -> None:
    """And the weight is where the period began, and α·BVᵀ; the pull enters the sketch, which Adam sees."""
    (p,) = matrices([shape])
    optimizer = RSO([p], 0.01, rank=4, every=4, scale=0.7, pull=0.5)
    seen, start = watched(optimizer), p.detach().clone()
    way = M = torch.zeros(max(shape), 4).double()
    for t, G in enumerate(gradients(shape, 10)):
        if t % 4 == 0:
            start, way, M = p.detach().clone(), torch.zeros_like(way), torch.zeros_like(M)
        before, p.grad = way, G
        optimizer.step()
        way = way + seen[-1].move.numerator
        state = optimizer.state[p]
        assert torch.equal(state["way"], way) and state["step"] == t % 4 + 1
        moved = p.detach() - start
        torch.testing.assert_close(moved if shape[0] >= shape[1] else moved.mT, 0.7 * way @ state["V"].mT, rtol=0, atol=1e-12)
        M = 0.9 * M + 0.1 * (seen[-1].B + 0.5 * before)
        torch.testing.assert_close(state["exp_avg"], M, rtol=0, atol=1e-12)


# GUM


def tossed(G: Tensor, r: int, share: float, index: int) -> Coin:
    draw = Draw(names=("w",), seed=0, index=index, clock=0, turn=0, place=0, group=("w",))
    frame = Tossed(r, share).choose(G, draw)
    assert isinstance(frame, Coin)
    return frame


@pytest.mark.check("a", "gum")
@pytest.mark.parametrize("share", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("r", [1, 3])
def test_the_coin_is_unbiased_with_its_exact_variance(share: float, r: int) -> None:
    """Both outcomes with their probabilities, of the gradient that chose V, and the mean of a later one."""
    G, later = random(8, 6), random(8, 6, seed=9)
    frames = {frame.rest: frame for frame in (tossed(G, r, share, index) for index in range(100))}
    chances = {0: 1 - share, 1: share}
    for X in (G, later):
        mean = torch.stack([chances[rest] * frame.passes(X) for rest, frame in frames.items()]).sum(0)
        torch.testing.assert_close(mean, X, rtol=0, atol=1e-12)
    V = top_right_singular(G, r)
    leading = float((G @ V).square().sum())
    rest = float((G - G @ V @ V.mT).square().sum())
    variance = sum(chances[rest] * float((frame.passes(G) - G).square().sum()) for rest, frame in frames.items())
    assert variance == pytest.approx(coin.variance(leading, rest, share), rel=1e-12)


@pytest.mark.check("a", "gum")
def test_the_coin_falls_as_often_as_it_should(generator: torch.Generator) -> None:
    G = random(3, 2)

    def rest(size: int, _: torch.Generator) -> Tensor:
        return torch.tensor([float(tossed(G, 1, 0.3, index).rest) for index in range(size)], dtype=torch.float64)

    assert_mean(rest, 0.3, draws=6000, resolution=0.05, generator=generator)


@pytest.mark.check("a", "gum")
@pytest.mark.parametrize("shape", SHAPES)
def test_gums_weights_cancel(shape: tuple[int, int]) -> None:
    """Of the same coins, steps do not depend on q: NS does not see the size of a momentum that began anew."""
    coins, results = (0, 1, 1, 0), []
    for q in (0.1, 0.5, 0.8):
        (p,) = matrices([shape])
        optimizer = GUM([p], lr=0.05, rank=4, every=3, share=q, momentum=0.8, precision="full", weight_decay=0.1)
        frame = lambda _, t, q=q: Coin(orthonormal(min(shape), 4, seed=t), coins[t // 3], 1 / q if coins[t // 3] else 1 / (1 - q))  # noqa: E731
        optimizer.inject = frame
        results.append(run(optimizer, [p], 12)[0])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-8)
    assert float((results[0] - matrices([shape])[0].detach()).norm()) > 0.1


@pytest.mark.check("a", "gum")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-4), (torch.float64, 1e-10)])
def test_gum_of_full_rank_is_muon_begun_anew_every_period(shape: tuple[int, int], dtype: torch.dtype, tolerance: float) -> None:
    """NS(MV)Vᵀ = NS(M), and no coin: the rest would be rounding errors, and steps along them as long as any."""
    (p,), (q,) = matrices([shape], dtype), matrices([shape], dtype)
    options: dict[str, Any] = {"lr": 0.02, "momentum": 0.8, "precision": "full", "weight_decay": 0.1}
    optimizer, peer = GUM([p], rank=64, every=3, **options), Muon([q], nesterov=False, **options)
    for t, G in enumerate(gradients(shape, 15, dtype)):
        if t % 3 == 0:
            peer.state.clear()
        p.grad = q.grad = G
        optimizer.step()
        peer.step()
        assert optimizer.state[p]["rest"] == 0
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("q", [[0.5, 0.5], [0.5, 0.5, 0.0], [0.5, 0.3, 0.1], [[0.2, 0.3, 0.5]]])
def test_probabilities_are_checked(q: list[Any]) -> None:
    with pytest.raises(ValueError, match="must be 3 positive numbers with sum 1"):
        coordinate.weighted_second_moment(np.eye(3), 2, q)
