"""What a layer knows about its gradient: against the exact decomposition, by its trace, and in the loop with the spectral law."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from estimators import LAWS, HaarStiefel, SpectralSampling, convert, keyed, measure
from estimators.directions import Directions, gram_svd, of_gradient, refine
from experiments.validation.checks import exact
from tests.monte_carlo import assert_mean
from theory import mse

FAST, FLAT = 10.0, 0.0  # decay exponents of the singular values


def matrix(m: int, n: int, decay: float, seed: int = 0) -> Tensor:
    """m×n, singular values exp(−decay·i/min(m, n)), random singular vectors."""
    g = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U, V = (torch.linalg.qr(torch.randn(size, k, generator=g, dtype=torch.float64))[0] for size in (m, n))
    return (U * torch.exp(-decay * torch.arange(k, dtype=torch.float64) / k)) @ V.mT


def trace(known: Directions) -> float:
    """Σσ + (n − k)·tail."""
    n, k = known.Q.shape
    return float(known.sigma.sum() + (n - k) * known.tail)


def energy(known: Directions, G: Tensor) -> float:
    """‖GQ‖², what the known directions hold of G."""
    return float((G @ known.Q).square().sum())


def assert_orthonormal(Q: Tensor, tolerance: float = 1e-10) -> None:
    assert float((Q.mT @ Q - torch.eye(Q.shape[1], dtype=Q.dtype)).abs().max()) < tolerance


@pytest.mark.parametrize(("m", "n"), [(40, 60), (60, 40)])
@pytest.mark.parametrize("decay", [FAST, FLAT])
@pytest.mark.parametrize("k", [1, 6, 20, 33, 40])
def test_it_keeps_the_trace_whatever_it_finds(m: int, n: int, decay: float, k: int, generator: torch.Generator) -> None:
    G = matrix(m, n, decay)
    known = of_gradient(G, k, generator)
    assert known.Q.shape == (n, k) and known.sigma.shape == (k,) and known.tail.shape == ()
    assert_orthonormal(known.Q)
    assert bool((known.sigma.diff() <= 0).all()) and float(known.tail) >= 0
    assert trace(known) == pytest.approx(float(G.square().sum()), rel=1e-10)
    torch.testing.assert_close((G @ known.Q).square().sum(0), known.sigma, rtol=1e-9, atol=1e-12)  # σᵢ = ‖Gqᵢ‖²
    best = torch.linalg.svdvals(G)[:k].square()
    assert bool((known.sigma <= best * (1 + 1e-9)).all())  # no direction holds more than the best ones


@pytest.mark.parametrize(("m", "n"), [(40, 60), (60, 40)])
def test_a_decaying_spectrum_is_found_as_the_decomposition_finds_it(m: int, n: int, generator: torch.Generator) -> None:
    G, k = matrix(m, n, 4 * FAST), 6
    known = of_gradient(G, k, generator)  # a range finder: k + 8 < 40
    s, W = torch.linalg.svd(G, full_matrices=False)[1:]
    torch.testing.assert_close(known.sigma, s[:k].square(), rtol=1e-9, atol=0)
    torch.testing.assert_close((W[:k] @ known.Q).abs(), torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-6)
    assert float(known.tail) == pytest.approx(float(s[k:].square().sum()) / (n - k), rel=1e-6)


@pytest.mark.parametrize("decay", [FAST, FLAT])
@pytest.mark.parametrize(("m", "n", "k"), [(9, 14, 9), (14, 9, 9), (9, 14, 1), (9, 14, 5)])
def test_near_full_rank_it_is_the_decomposition_itself(m: int, n: int, k: int, decay: float, generator: torch.Generator) -> None:
    G = matrix(m, n, decay)
    known = of_gradient(G, k, generator)
    torch.testing.assert_close(known.sigma, torch.linalg.svdvals(G)[:k].square(), rtol=1e-10, atol=1e-14)
    assert_orthonormal(known.Q)
    if k == min(m, n):
        assert float(known.tail) < 1e-14  # nothing is left


@pytest.mark.parametrize(("m", "n"), [(9, 14), (14, 9), (12, 12)])
@pytest.mark.parametrize("rank", [12, 5, 0])
def test_the_gram_matrix_gives_the_decomposition(m: int, n: int, rank: int) -> None:
    """The route of a GPU: singular values to the square root of the precision, vectors that are orthonormal whatever the rank of G."""
    G = matrix(m, n, 1.0)
    U, s, W = torch.linalg.svd(G, full_matrices=False)
    G = (U[:, :rank] * s[:rank]) @ W[:rank]
    found, Q = gram_svd(G)
    p = min(m, n)
    assert found.shape == (p,) and Q.shape == (n, p) and bool((found.diff() <= 0).all())
    torch.testing.assert_close(found, torch.linalg.svdvals(G), rtol=1e-12, atol=3e-8)
    assert_orthonormal(Q)
    torch.testing.assert_close((G @ Q).norm(dim=0), found, rtol=1e-10, atol=3e-8)
    assert gram_svd(G.float())[1].dtype == torch.float32


def test_a_flat_spectrum_is_found_to_its_energy(generator: torch.Generator) -> None:
    G = torch.randn(60, 80, generator=generator, dtype=torch.float64)
    known = of_gradient(G, 10, generator)
    best = float(torch.linalg.svdvals(G)[:10].square().sum())
    assert 0.9 * best < energy(known, G) <= best * (1 + 1e-9)


def test_precision_and_refusals(generator: torch.Generator) -> None:
    G = matrix(30, 40, FAST)
    assert of_gradient(G.bfloat16(), 4, generator).Q.dtype == torch.float32
    assert trace(of_gradient(torch.zeros(5, 7), 2, generator)) == 0
    for k in (0, 31):
        with pytest.raises(ValueError, match=rf"of_gradient\(G=30x40, k={k}\): k must be between"):
            of_gradient(G, k, generator)


def law_of(known: Directions, rank: int, c: float = 1.0) -> SpectralSampling:
    return SpectralSampling.from_basis(*known, rank, c)


def sketch(G: Tensor, known: Directions, rank: int, generator: torch.Generator, c: float = 1.0) -> tuple[Tensor, Tensor]:
    """V of the spectral law and (GV)ᵀ(GV)."""
    V = law_of(known, rank, c).sample(generator=generator, dtype=torch.float64)
    return V, (G @ V).mT @ (G @ V)


@pytest.mark.parametrize("share", [0.2, 1.0])
@pytest.mark.parametrize("c", [1.0, 0.3])
def test_refine_moves_energy_only_inside_the_subspace(share: float, c: float, generator: torch.Generator) -> None:
    """Trace after = trace before + share·(what was seen there − what was believed there), whatever c."""
    G = matrix(20, 30, FAST)
    known = of_gradient(matrix(20, 30, FAST, seed=5), 6, generator)  # of another matrix: wrong about this one
    for _ in range(20):
        V, seen = sketch(G, known, 4, generator, c)
        F = V / V.norm(dim=0)
        belief = known.Q @ torch.diag(known.sigma - known.tail) @ known.Q.mT + known.tail * torch.eye(30, dtype=torch.float64)
        believed, present = float((F.mT @ belief @ F).trace()), float((G @ F).square().sum())
        new = refine(known, V, seen, share)
        assert_orthonormal(new.Q)
        assert bool((new.sigma.diff() <= 0).all()) and new.Q.shape == known.Q.shape
        assert trace(new) == pytest.approx(trace(known) + share * (present - believed), rel=1e-9)
        known = new


def test_with_full_weight_a_subspace_that_holds_the_top_shows_its_exact_energies(generator: torch.Generator) -> None:
    """A rotated basis of the top space: directions mixed and energies unknown, one sketch puts both right."""
    G, k = matrix(20, 30, FAST), 5
    s, W = torch.linalg.svd(G, full_matrices=False)[1:]
    mix = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))[0]
    known = Directions(W[:k].mT @ mix, torch.ones(k, dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64))
    V = known.Q * torch.linspace(1, 3, k, dtype=torch.float64)  # columns of any length
    new = refine(known, V, (G @ V).mT @ (G @ V), 1.0)
    torch.testing.assert_close(new.sigma, s[:k].square(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close((W[:k] @ new.Q).abs(), torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(new.tail, known.tail, rtol=1e-10, atol=0)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_alternated_with_draws_it_finds_the_leading_directions(share: float, generator: torch.Generator) -> None:
    G, k, rank = matrix(30, 40, 3 * FAST), 8, 4
    best = float(torch.linalg.svdvals(G)[:k].square().sum())
    wrong = of_gradient(matrix(30, 40, FAST, seed=9), k, generator)
    known = Directions(wrong.Q, wrong.sigma * 0 + 1.0, wrong.tail * 0 + 1.0)
    assert energy(known, G) < 0.7 * best
    for _ in range(400):
        V, seen = sketch(G, known, rank, generator)
        known = refine(known, V, seen, share)
    assert energy(known, G) > 0.998 * best
    assert trace(known) == pytest.approx(float(G.square().sum()), rel=0.01)
    W = torch.linalg.svd(G)[2]
    torch.testing.assert_close((W[:2] @ known.Q[:, :2]).abs(), torch.eye(2, dtype=torch.float64), rtol=0, atol=0.01)
    torch.testing.assert_close(known.sigma[:2], torch.linalg.svdvals(G)[:2].square(), rtol=0.01, atol=0)


def test_the_law_of_refined_directions_is_unbiased_and_has_the_error_of_theory(generator: torch.Generator) -> None:
    """By its exact moments, and by its draws; directions learned from the very gradient that is projected."""
    G, rank = matrix(6, 10, 3.0), 3
    known = of_gradient(matrix(6, 10, 3.0, seed=8), 4, generator)
    for _ in range(3):
        V, seen = sketch(G, known, rank, generator)
        known = refine(known, V, seen, 0.5)
    law = law_of(known, rank, 0.8)
    truth = exact(law)
    np.testing.assert_allclose(truth.mean, 0.8 * np.eye(10), atol=1e-10)
    signal = (G.mT @ G).numpy()
    predicted = mse.ipa(truth, np.zeros_like(signal), signal)
    size = float(G.square().sum())
    seen_ = measure(law, G, 60_000, generator=generator)
    assert 8 * seen_.mse.standard_error < 0.05 * size
    assert abs(seen_.mse.value - predicted.total) < 5 * seen_.mse.standard_error
    probe = torch.randn(3, 10, generator=generator, dtype=torch.float64)

    def draw(size: int, generator: torch.Generator) -> Tensor:
        return (probe @ law.sample(size, generator=generator, dtype=torch.float64)).square().sum(-1)  # aᵀPa

    expected = 0.8 * probe.square().sum(-1)
    assert_mean(draw, expected, draws=200_000, resolution=0.1 * float(expected.min()), generator=generator)


# Learned in the backward pass


def network(unused: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10), nn.Tanh()).double()
        if unused:
            model[1].register_module("spare", nn.Linear(12, 12).double())
    return model


def loss(model: nn.Module, step: int = 0, size: float = 1.0) -> Tensor:
    X = torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return size * (model(X) - X[:, :10].sin()).square().mean()


def full_gradient(model: nn.Module, step: int = 0) -> Tensor:
    """Of the third module's weight, from a plain model with the same weights."""
    twin = convert(copy.deepcopy(network()), rank=1).finalize()
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if name in twin.state_dict()})
    loss(twin, step).backward()
    gradient = twin.get_parameter("2.weight").grad
    assert gradient is not None
    return gradient.clone()


@pytest.mark.parametrize(("law", "c"), [("haar_stiefel", 1.0), ("rademacher", 0.6), ("spectral", 1.0)])
def test_the_gradient_of_B_lifted_is_c_times_the_full_gradient(law: str, c: float, generator: torch.Generator) -> None:
    """With the error of theory; the spectral law with the directions it fitted to this very gradient."""
    model = network()
    G = full_gradient(model)
    handle = convert(model, law=law, rank=3, c=c, targets=["2"], keep=5)
    layer = handle.layers["2"]
    loss(model).backward()
    handle.redraw()
    fitted = handle.law_of("2")
    assert type(fitted) is LAWS[law] and exact(fitted).unbiased
    assert torch.equal(layer.basis(), keyed.draw(fitted, 0, "2", 1, dtype=torch.float64))
    probe = torch.randn(10, generator=generator, dtype=torch.float64)
    probe /= (probe @ G).norm()
    signal = (G.mT @ G).numpy()
    predicted = mse.ipa(exact(fitted), 0 * signal, signal).total

    def draw(number: int, generator: torch.Generator) -> Tensor:
        estimates = []
        for V in fitted.sample(number, generator=generator, dtype=torch.float64):
            layer.hold(V)
            layer.B.grad = None
            loss(model).backward()
            assert layer.B.grad is not None
            estimates.append(layer.B.grad @ V.mT)
        E = torch.stack(estimates)
        aligned, entry, error = (E * G).sum((-2, -1)) / G.square().sum(), probe @ E @ (probe @ G), (E - G).square().sum((-2, -1))
        return torch.stack([aligned, entry, error / predicted], dim=-1)

    assert_mean(draw, torch.tensor([c, c, 1.0]).double(), draws=2000, resolution=0.3, generator=generator)


@pytest.mark.parametrize(("basis_every", "looks"), [(1, [0, 3, 7, 11, 15]), (2, [0, 7, 15])])
@pytest.mark.parametrize("law", ["spectral", "top_svd"])
def test_full_gradients_are_formed_in_the_first_micro_batch_of_the_last_step(law: str, basis_every: int, looks: list[int]) -> None:
    """K = 4: the steps (from 0) after which V changes; a layer that is never used keeps nobody else waiting."""
    model = network(unused=True)
    handle = convert(model, law=law, rank=3, refresh_every=4, basis_every=basis_every)
    optimizer = torch.optim.AdamW(handle.parameters(), lr=0.01)
    seen, G = [], full_gradient(model)
    assert type(handle.law_of("2")) is HaarStiefel
    V = handle.layers["2"].basis()
    scale = 16 / 3 if law == "spectral" else 1.0  # the columns of what follows
    torch.testing.assert_close(V.mT @ V, scale * torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-10)
    for step in range(18):
        for micro in range(2):
            armed = handle.layers["2"].observer is not None
            assert not (armed and micro) and handle.watching  # for the layer that is never used
            if armed:
                seen.append(step)
                G = full_gradient(model, step)
            loss(model, step + 100 * micro).backward()
        optimizer.step()
        handle.step(optimizer)
        optimizer.zero_grad()
        if seen[-1] == step:  # the new law knows that gradient
            law_, known = handle.law_of("2"), handle.fitting.known["2"]
            torch.testing.assert_close(known.sigma, torch.linalg.svdvals(G)[:6].square(), rtol=1e-9, atol=1e-12)
            assert type(law_) is LAWS[law] and "1.spare" not in handle.fitting.known
            if law == "top_svd":
                V, W = handle.layers["2"].basis(), torch.linalg.svd(G)[2][:3]
                torch.testing.assert_close(V @ V.mT, W.mT @ W, rtol=0, atol=1e-6)
            else:
                assert isinstance(law_, SpectralSampling) and law_.basis is known.Q
    assert seen == looks


@pytest.mark.parametrize("size", [math.nan, math.inf, 0.0, 1e-200, 1e200])
@pytest.mark.parametrize("law", ["spectral", "top_svd"])
@pytest.mark.parametrize("online", [0.0, 1.0])
def test_a_gradient_nothing_can_be_learned_from_is_passed_over(law: str, size: float, online: float) -> None:
    """NaN, infinite, zero, or of squares beyond the format: the law stays what it was."""
    model = network()
    handle = convert(model, law=law, rank=3, refresh_every=1, state="keep", online=online)
    loss(model, size=size).backward()
    handle.step()
    assert not handle.fitting.known and type(handle.law_of("2")) is HaarStiefel
    loss(model).backward()
    handle.step()
    known = handle.fitting.known["2"]
    loss(model, size=size).backward()
    handle.step()
    after = handle.fitting.known["2"]
    assert type(handle.law_of("2")) is LAWS[law] and bool(torch.isfinite(after.Q).all() & torch.isfinite(after.sigma).all())
    if not online or not size < 1:  # sketches may show that there is nothing; they cannot show NaN or infinity
        assert after is known
    assert bool(torch.isfinite(handle.layers["2"].basis()).all())
