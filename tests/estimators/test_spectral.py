"""The spectral law beyond the contract: its forms, edges, layers and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from estimators import SpectralSampling, TopSVD, measure
from estimators.law import Spectrum, eigenbasis
from estimators.spectral import complement_frame
from experiments.validate import check_law
from experiments.validation.checks import exact
from tests.estimators.test_contract import second_moment
from tests.monte_carlo import assert_mean
from theory import optimal


@pytest.mark.parametrize("keep", [0, 3, 5, 8])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_every_draw_has_r_columns_on_the_right_directions(keep: int, rank: int, generator: torch.Generator) -> None:
    law = SpectralSampling.from_second_moment(second_moment(8), rank, keep=keep)
    V = law.sample(200, generator=generator, dtype=torch.float64)
    gram = V.mT @ V
    off = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    assert float(off.abs().max()) < 1e-9 * float(gram.max())  # orthogonal columns
    # each column has length √(c/π) of its unit
    weights = 1 / law.inclusion
    length = gram.diagonal(dim1=-2, dim2=-1)
    assert float((length.unsqueeze(-1) / weights - 1).abs().amin(-1).max()) < 1e-9


def test_no_knowledge_is_haar_and_full_knowledge_is_the_optimum() -> None:
    S = second_moment(8)
    none = SpectralSampling.from_second_moment(S, 3, keep=0)
    assert none.keep == 0 and torch.allclose(none.inclusion, torch.full((8,), 3 / 8, dtype=torch.float64))
    assert none.reference() is None
    full = exact(SpectralSampling.from_second_moment(S, 3, floor=0.0))
    sigma = torch.linalg.eigvalsh(S).numpy()
    assert float((full.square * S.numpy()).sum()) == pytest.approx(optimal.optimal_value(sigma, 3), rel=1e-6)


def test_the_default_floor_costs_at_most_a_thousandth() -> None:
    for rank in (1, 3, 5):
        S = second_moment(8)
        floored = exact(SpectralSampling.from_second_moment(S, rank))
        value = optimal.optimal_value(torch.linalg.eigvalsh(S).numpy(), rank)
        assert value <= float((floored.square * S.numpy()).sum()) * (1 + 1e-9) <= 1.0011 * value


def test_sigma_with_exact_zeros_stays_unbiased() -> None:
    G = torch.randn(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)  # rank 2 of 6
    law = SpectralSampling.from_second_moment(G.mT @ G, 3)
    assert exact(law).unbiased
    assert check_law(law, resolution=0.05).holds


def test_layers_are_drawn_in_one_call(generator: torch.Generator) -> None:
    S = torch.stack([second_moment(6), torch.eye(6, dtype=torch.float64)])
    law = SpectralSampling.from_second_moment(S, 2, keep=3)
    V = law.sample(20_000, generator=generator, dtype=torch.float64)
    assert V.shape == (20_000, 2, 6, 2)
    assert law.inclusion.shape == (2, 6)
    vector = torch.linspace(1, 2, 6, dtype=torch.float64)

    def draw(size: int, generator: torch.Generator) -> torch.Tensor:
        return (vector @ law.sample(size, generator=generator, dtype=torch.float64)).square().sum(-1)  # aᵀPa of both layers

    expected = vector.square().sum().expand(2)
    assert_mean(draw, expected, draws=400_000, resolution=0.5 * float(expected[0]), generator=generator)
    with pytest.raises(ValueError, match="holds 2 layers"):
        check_law(law)
    with pytest.raises(ValueError, match="holds 2 layers"):
        measure(law, torch.ones(3, 6).double(), 10, generator=generator)
    assert TopSVD.from_second_moment(S + 1e-3 * S[0], 2).sample(5, generator=generator).shape == (5, 2, 6, 2)


@pytest.mark.parametrize("size", [1.0, 1e-7, 1e-14])
def test_rank_deficient_gradients_of_any_scale(size: float) -> None:
    G = size * torch.randn(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    S = G.mT @ G
    law = SpectralSampling.from_second_moment(S, 3)
    torch.testing.assert_close(torch.as_tensor(law.reference()), S, rtol=1e-9, atol=1e-9 * float(S.max()))
    assert check_law(law, resolution=0.05).holds


def test_complement_frames_are_orthonormal_and_outside(generator: torch.Generator) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        Q = torch.linalg.qr(torch.randn(40, 30, generator=generator, dtype=dtype))[0]
        for columns in (1, 5, 10):
            F = complement_frame(Q, torch.randn(7, 40, columns, generator=generator, dtype=dtype))
            assert float((Q.mT @ F).abs().max()) < tolerance
            assert float((F.mT @ F - torch.eye(columns, dtype=dtype)).abs().max()) < tolerance


def test_a_known_spectrum_is_used_as_it_is() -> None:
    S = second_moment(5)
    spectrum = eigenbasis("test", S)
    assert isinstance(spectrum, Spectrum)
    a, b = SpectralSampling.from_second_moment(spectrum, 2), SpectralSampling.from_second_moment(S, 2)
    torch.testing.assert_close(a.inclusion, b.inclusion)
    torch.testing.assert_close(TopSVD.from_second_moment(spectrum, 2).basis, TopSVD.from_second_moment(S, 2).basis)
    torch.testing.assert_close(torch.as_tensor(b.reference()), S)


def test_top_svd_of_a_matrix(generator: torch.Generator) -> None:
    G = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    V = TopSVD.from_matrix(G, 3).sample(generator=generator, dtype=torch.float64)
    torch.testing.assert_close(G @ V @ V.mT, G)  # rank 3: nothing is lost


Q4, eye = torch.eye(4, dtype=torch.float64)[:, :2], torch.eye(4, dtype=torch.float64)
two = torch.tensor([2.0, 1.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SpectralSampling(n=4, rank=2, design="multinomial"), "unknown design"),  # pyright: ignore[reportArgumentType]
        (lambda: SpectralSampling(n=4, rank=2, floor=1.5), "floor=1.5"),
        (lambda: SpectralSampling(n=4, rank=2, basis=Q4), "basis and sigma come together"),
        (lambda: SpectralSampling.from_basis(2 * Q4, two, 1.0, 2), "orthonormal columns"),
        (lambda: SpectralSampling.from_basis(Q4, torch.ones(3), 1.0, 2), "expected"),
        (lambda: SpectralSampling.from_basis(Q4, torch.ones(5, 2), 1.0, 2), "differ in layers"),
        (lambda: SpectralSampling.from_basis(Q4, torch.tensor([1.0, math.nan]), 1.0, 2), "NaN or infinite"),
        (lambda: SpectralSampling.from_basis(Q4 * math.nan, two, 1.0, 2), "NaN or infinite"),
        (lambda: SpectralSampling.from_basis(Q4, -two, 1.0, 2), "must not be negative"),
        (lambda: SpectralSampling.from_basis(Q4, two, math.nan, 2), "NaN or infinite"),
        (lambda: SpectralSampling.from_basis(Q4, 0 * two, 0.0, 2), "all zero"),
        (lambda: SpectralSampling(n=4, rank=2, tail=0.0), "all zero"),
        (lambda: SpectralSampling.from_second_moment(eye, 2, keep=5), "keep must be between"),
        (lambda: SpectralSampling.from_second_moment(-eye, 2), "indefinite"),
        (lambda: SpectralSampling.from_second_moment(torch.diag(torch.tensor([1.0, -1.0])), 1), "indefinite"),
        (lambda: SpectralSampling.from_second_moment(torch.zeros(4, 4), 2), "no positive eigenvalue"),
        (lambda: SpectralSampling.from_basis(Q4[:, 0], two, 1.0, 2), r"Q must be \(\*layers, n, k\)"),
        (lambda: SpectralSampling.from_basis(Q4, two[0], 1.0, 2), "got a number"),
        (lambda: SpectralSampling.from_basis(Q4, two, torch.ones(3), 2), "tail has shape"),
        (lambda: TopSVD(n=4, rank=2), "needs the basis of a gradient"),
        (lambda: TopSVD.from_matrix(torch.zeros(3, 4), 2), "no positive eigenvalue"),
        (lambda: TopSVD.from_matrix(torch.full((3, 4), math.inf), 2), "NaN or infinite"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
