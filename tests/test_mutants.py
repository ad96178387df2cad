"""Wrong estimators that the checks must reject. Each is a mistake someone has made; the test prints which check killed it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from estimators import Coordinate, HaarStiefel, SparseSign, SpectralSampling, SubsampledTransform, TopSVD, lift, measure_estimates
from estimators.designs import inclusion_probabilities, systematic
from estimators.law import Law, scale
from estimators.subsampled_transform import dct_rows
from experiments.validate import Check, check_law
from experiments.validation.checks import exact
from experiments.validation.verdict import Verdict
from tests.estimators.test_contract import second_moment
from theory import Moments, moments, mse

N, R, C = 8, 3, 0.9


@dataclass(frozen=True, eq=False)
class Mutant(Law):
    """A law whose draw is ``wrong(batch, generator)``; the moments to hold it against come with the case."""

    wrong: Callable[[tuple[int, ...], torch.Generator], Tensor] = None  # type: ignore[assignment]  # pyright: ignore
    target: Law | None = None  # what it was fitted to
    stem: ClassVar[str] = "mutant"

    def _draw(self, batch: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        return self.wrong(batch, generator).to(dtype)

    def reference(self) -> Tensor | None:
        return None if self.target is None else self.target.reference()


def gaussian(batch: tuple[int, ...], g: torch.Generator, n: int = N, r: int = R) -> Tensor:
    return torch.randn(*batch, n, r, generator=g, dtype=torch.float64)


def haar(batch: tuple[int, ...], g: torch.Generator, c: float = C) -> Tensor:
    return HaarStiefel(n=N, rank=R, c=c).sample(*batch, generator=g, dtype=torch.float64)


S = second_moment(N)
SPECTRAL = SpectralSampling.from_second_moment(S, R, C)
SKETCH = SpectralSampling.from_second_moment(S, R, C, keep=3)
POOR = SpectralSampling.from_second_moment(torch.diag(torch.tensor([4.0, 2, 1, 1, 0, 0, 0, 0])).double(), R, C)  # σ with zeros
HAAR, COORDINATE, DCT = (law(n=N, rank=R, c=C) for law in (HaarStiefel, Coordinate, SubsampledTransform))
SPARSE = SparseSign(n=N, rank=R, c=C, sparsity=4.0)


def with_weights(law: SpectralSampling, design_pi: Tensor, weight_pi: Tensor) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    """A full spectral law that selects with one π and weighs with another."""

    def draw(batch: tuple[int, ...], g: torch.Generator) -> Tensor:
        J = systematic(design_pi, R, batch, g)
        assert law.basis is not None
        Q = law.basis.expand(*batch, N, N).gather(-1, J.unsqueeze(-2).expand(*batch, N, R))
        return Q * (C / weight_pi[J]).sqrt().unsqueeze(-2)

    return draw


def lapack_signs(batch: tuple[int, ...], g: torch.Generator) -> Tensor:
    return scale(N, R, C) * torch.linalg.qr(gaussian(batch, g))[0]


def gaussian_weights(batch: tuple[int, ...], g: torch.Generator) -> Tensor:
    return haar(batch, g) * torch.randn(*batch, 1, R, generator=g, dtype=torch.float64)


def multinomial(batch: tuple[int, ...], g: torch.Generator) -> Tensor:
    J = torch.multinomial(SPECTRAL.inclusion.expand(*batch, N), R, replacement=False, generator=g)
    assert SPECTRAL.basis is not None
    Q = SPECTRAL.basis.expand(*batch, N, N).gather(-1, J.unsqueeze(-2).expand(*batch, N, R))
    return Q * (C / SPECTRAL.inclusion[J]).sqrt().unsqueeze(-2)


def no_signs(batch: tuple[int, ...], g: torch.Generator) -> Tensor:
    J = torch.rand(*batch, N, generator=g).topk(R).indices
    return scale(N, R, C) * dct_rows(N, J, torch.float64).mT


def flat_dct(batch: tuple[int, ...], g: torch.Generator) -> Tensor:
    V = SubsampledTransform(n=N, rank=R, c=C).sample(*batch, generator=g, dtype=torch.float64)
    constant = (V.abs() - V.abs()[..., :1, :]).abs().amax(-2, keepdim=True) < 1e-9
    return torch.where(constant, V * math.sqrt(2), V)  # amplitude √(2/n) also at frequency 0


def tail_everywhere(batch: tuple[int, ...], g: torch.Generator) -> Tensor:
    """The tail frame drawn in all of space instead of on the complement of Q."""
    V = SKETCH.sample(*batch, generator=g, dtype=torch.float64)
    F = HaarStiefel(n=N, rank=R, c=R / N).sample(*batch, generator=g, dtype=torch.float64)
    assert SKETCH.basis is not None
    inside = (SKETCH.basis.mT @ V).square().sum(-2, keepdim=True) > 1e-9 * V.square().sum(-2, keepdim=True)
    return torch.where(inside, V, F * V.norm(dim=-2, keepdim=True))


def first_always(batch: tuple[int, ...], g: torch.Generator) -> Tensor:
    J = torch.cat([torch.zeros(*batch, 1, dtype=torch.long), 1 + torch.rand(*batch, N - 1, generator=g).topk(R - 1).indices], dim=-1)
    return torch.zeros(*batch, N, R, dtype=torch.float64).scatter_(-2, J.unsqueeze(-2), scale(N, R, C))


def uniform_pi(law: SpectralSampling) -> Tensor:
    return torch.full_like(law.inclusion, R / N)


def replaced_coordinates(batch: tuple[int, ...], g: torch.Generator) -> Tensor:
    return Coordinate(n=N, rank=R, c=C, replacement=True).sample(*batch, generator=g, dtype=torch.float64)


FROM_SIGMA = inclusion_probabilities(SPECTRAL.sigma.square(), R, 1e-3) if SPECTRAL.sigma is not None else torch.empty(0)  # π ∝ σ, not √σ
NO_FLOOR = inclusion_probabilities(POOR.sigma, R, 0.0) if POOR.sigma is not None else torch.empty(0)

# name: (wrong draw, the law it claims to be, the law it was fitted to)
MUTANTS: dict[str, tuple[Callable[[tuple[int, ...], torch.Generator], Tensor], Law, Law | None]] = {
    "scale off by 1 %": (lambda b, g: haar(b, g, 1.01 * C), HAAR, None),
    "√(r/n) for √(n/r)": (lambda b, g: haar(b, g) * (R / N), HAAR, None),
    "QR without the sign fix": (lapack_signs, HAAR, None),
    "Gaussian weights on orthonormal columns": (gaussian_weights, HAAR, None),
    "Gaussian sold as Haar": (lambda b, g: gaussian(b, g) * math.sqrt(C / R), HAAR, None),
    "sparse sign without √s": (lambda b, g: SPARSE.sample(*b, generator=g, dtype=torch.float64) / 2, SPARSE, None),
    "Rademacher sold as sparse sign": (
        lambda b, g: SparseSign(n=N, rank=R, c=C, sparsity=1.0).sample(*b, generator=g, dtype=torch.float64), SPARSE, None,
    ),
    "coordinates drawn with replacement": (replaced_coordinates, COORDINATE, None),
    "one coordinate always in": (first_always, COORDINATE, None),
    "DCT without random signs": (no_signs, DCT, None),
    "DCT amplitude wrong at frequency 0": (flat_dct, DCT, None),
    "1/π from π ∝ σ": (with_weights(SPECTRAL, SPECTRAL.inclusion, FROM_SIGMA), SPECTRAL, SPECTRAL),
    "selected with π ∝ σ": (with_weights(SPECTRAL, FROM_SIGMA, SPECTRAL.inclusion), SPECTRAL, SPECTRAL),
    "uniform weights n/r on spectral draws": (with_weights(SPECTRAL, SPECTRAL.inclusion, uniform_pi(SPECTRAL)), SPECTRAL, SPECTRAL),
    "multinomial inclusion": (multinomial, SPECTRAL, SPECTRAL),
    "no floor on π": (with_weights(POOR, NO_FLOOR, NO_FLOOR.clamp_min(1e-9)), POOR, POOR),
    "tail frame not on the complement": (tail_everywhere, SKETCH, SKETCH),
    "top-r SVD sold as unbiased": (
        lambda b, g: TopSVD.from_second_moment(S, R, C).sample(*b, generator=g, dtype=torch.float64), HAAR, None,
    ),
}  # fmt: skip


@cache
def honest(claimed: Law) -> Check:
    """Of the law itself, once for all that pretend to be it."""
    return check_law(claimed, resolution=0.01)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_law_is_rejected(name: str) -> None:
    wrong, claimed, fitted = MUTANTS[name]
    assert honest(claimed).holds, honest(claimed)  # the check accepts the law itself
    check = check_law(Mutant(n=N, rank=R, c=C, wrong=wrong, target=fitted), truth=exact(claimed), resolution=0.01, max_draws=3_000_000)
    report(name, check)


def report(name: str, check: Check) -> None:
    killers = [v for v in check.verdicts if abs(v.z) >= 5]
    assert killers, f"{name} survived:\n{check}"
    print(f"{name}: killed by " + ", ".join(f"{v.name} (z = {v.z:+.0f})" for v in killers))


def test_theory_that_counts_a_stale_basis_as_bias_is_rejected() -> None:
    """The mutant is on the other side: moments that drop what a stale basis does not span."""
    stale = SpectralSampling.from_second_moment(S, R, C)
    assert check_law(stale).holds
    truth = exact(stale)
    assert stale.basis is not None
    top = stale.basis[:, :R].numpy()
    wrong: Moments = replace(truth, mean=C * top @ top.T)
    report("stale basis counted as bias", check_law(stale, truth=wrong))


# Estimators

G = torch.randn(3, N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def zeroth_order(step: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int, torch.Generator], Tensor]:
    def draw(size: int, g: torch.Generator) -> Tensor:
        V, Z = haar((size,), g, 1.0), torch.randn(size, 3, R, generator=g, dtype=torch.float64)
        inner = (lift(Z, V) * G).sum((-2, -1))
        return lift(step(inner, Z), V)

    return draw


def own_basis(size: int, g: torch.Generator) -> Tensor:
    """V computed from the gradient itself with noise, as the top directions, and scaled as if it were independent."""
    noisy = G + 0.5 * torch.randn(size, 3, N, generator=g, dtype=torch.float64)
    V = torch.linalg.svd(noisy, full_matrices=False)[2].mT[..., :R]
    return noisy @ V @ V.mT * (N / R)


ESTIMATORS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "difference not divided by 2": zeroth_order(lambda inner, Z: 2 * inner[:, None, None] * Z),
    "direction normalised to the sphere": zeroth_order(lambda inner, Z: inner[:, None, None] * Z / Z.square().sum((-2, -1), keepdim=True)),
    "sign of the difference": zeroth_order(lambda inner, Z: inner.sign()[:, None, None] * Z),
    "basis from the gradient it projects, no inclusion weights": own_basis,
}


@pytest.mark.parametrize("name", ["honest", *ESTIMATORS])
def test_a_wrong_estimator_is_rejected(name: str) -> None:
    honest = zeroth_order(lambda inner, Z: inner[:, None, None] * Z)
    signal = (G.mT @ G).numpy()
    predicted = mse.lr(moments("haar_stiefel", N, R), 3, np.zeros_like(signal), signal)
    seen = measure_estimates(ESTIMATORS.get(name, honest), G, 200_000, generator=torch.Generator().manual_seed(0))
    verdicts = tuple(
        Verdict(name=what, estimate=e.value, standard_error=e.standard_error, theory=t, scale=t, required=0.1)
        for what, e, t in (("alignment", seen.alignment, predicted.alignment), ("E‖estimate − g‖²", seen.mse, predicted.total))
    )
    check = Check(subject=name, draws=seen.draws, verdicts=verdicts)
    if name == "honest":
        assert check.holds, check
        assert seen.bias is not None and abs(seen.bias.value) < 5 * seen.bias.standard_error
    else:
        report(name, check)
