"""Laws on tokens and on features: mean and error of a layer's gradient over its steps against the exact moments; and VeLoRA's projection."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from estimators import LAWS, Key, Law, LawOnFeatures, LawOnTokens, Measurement, SpectralSampling, TopSVD, VeLoRA, measure_estimates, tokens
from estimators.on_tokens import LawKeeper
from experiments.validation.checks import exact
from tests import enumeration
from theory import mse

T, M, N, R = 6, 3, 4, 2
CPU = torch.device("cpu")
AXES = {"tokens": LawOnTokens, "features": LawOnFeatures}


def problem() -> tuple[Tensor, Tensor]:
    """X and Δ with tokens of decaying size."""
    generator = torch.Generator().manual_seed(3)
    size = 1 / torch.arange(1, T + 1, dtype=torch.float64).sqrt()[:, None]
    return tuple(size * torch.randn(T, n, generator=generator, dtype=torch.float64) for n in (N, M))  # pyright: ignore[reportReturnType]


def predicted(axis: str, law: type[Law]) -> mse.Decomposition:
    """The exact error; of fitted laws in the coordinates of their own directions, min(T, n) in number."""
    X, D = problem()
    U, sigma, H = torch.linalg.svd(X, full_matrices=False)
    if law.fitted:
        kind: type[SpectralSampling] | type[TopSVD] = SpectralSampling if issubclass(law, SpectralSampling) else TopSVD
        moments = exact(kind.from_basis(torch.eye(len(sigma), dtype=torch.float64), sigma.square(), 1.0, R))
        G = (D.mT @ X @ H.mT).numpy()
        if axis == "features":
            return mse.ipa(moments, np.zeros((len(sigma), len(sigma))), G.T @ G)
        return mse.tokens(moments, (U.mT @ D).numpy(), (U.mT @ X).numpy())
    if axis == "tokens":
        return mse.tokens(exact(law(n=T, rank=R)), D.numpy(), X.numpy())
    G = (D.mT @ X).numpy()
    return mse.ipa(exact(law(n=N, rank=R)), np.zeros((N, N)), G.T @ G)


def seen(keeper: LawKeeper, draws: int, *, fixed: bool = False, factor: float = 1.0) -> Measurement:
    """The gradients of so many steps of a layer that sees the same X and Δ. ``fixed``: as if the step did not count."""
    X, D = problem()
    step = [0]

    def estimate() -> Tensor:
        step[0] += not fixed
        at = Key(0, "layer", step[0], 0, CPU)
        return factor * keeper.gradient(keeper.keep(X, at), D, at)

    return measure_estimates(lambda size, _: torch.stack([estimate() for _ in range(size)]), D.mT @ X, draws, generator=torch.Generator())


def agree(found: Measurement, expected: mse.Decomposition, resolution: float) -> bool:
    """Alignment and squared error within 5 standard errors, of which 8 are below the resolution."""
    pairs = (
        (found.alignment, expected.alignment, resolution),
        (found.mse, expected.total, resolution * max(expected.total, expected.signal)),
    )
    assert all(8 * one.standard_error <= limit for one, _, limit in pairs), [one for one, _, _ in pairs]
    return all(abs(one.value - theory) <= 5 * one.standard_error + 1e-9 * abs(theory) for one, theory, _ in pairs)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("axis", AXES)
def test_a_rule_says_whether_it_is_biased(axis: str, law: str) -> None:
    expected = predicted(axis, LAWS[law])
    assert (abs(expected.alignment - 1) < 1e-9 and expected.bias < 1e-18) is LAWS[law].unbiased is AXES[axis](law, R).unbiased


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("law", ["gaussian", "coordinate", "spectral", "top_svd"])
@pytest.mark.parametrize("axis", AXES)
def test_steps_of_a_layer_have_the_mean_and_error_of_theory(axis: str, law: str) -> None:
    """Of a kind each; that a layer draws V of its law holds of every draw (test_compressed.py)."""
    assert agree(seen(AXES[axis](law, R), 2500), predicted(axis, LAWS[law]), 0.4)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("mutant", [{"fixed": True}, {"factor": 1.25}, {"factor": R / T}], ids=str)
def test_a_wrong_layer_is_rejected(mutant: dict[str, float]) -> None:
    """One draw for all steps, a wrong scale, no scale."""
    assert not agree(seen(LawOnTokens("coordinate", R), 2500, **mutant), predicted("tokens", LAWS["coordinate"]), 0.4)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("replacement", [False, True])
def test_column_row_sampling_by_enumeration(replacement: bool) -> None:
    X, D = problem()
    mean, error, G = torch.zeros(M, N, dtype=torch.float64), 0.0, D.mT @ X
    for probability, V in enumeration.coordinate(T, R, 1.0, replacement):
        estimate = tokens(D, X, torch.from_numpy(V))
        mean += probability * estimate
        error += probability * float((estimate - G).square().sum())
    torch.testing.assert_close(mean, G, rtol=0, atol=1e-12)
    expected = predicted("tokens", LAWS["coordinate_replacement" if replacement else "coordinate"])
    assert error == pytest.approx(expected.total, rel=1e-12)


def test_randomized_automatic_differentiation_has_the_factors_that_it_states() -> None:
    for law, factor in (("gaussian", (N + R + 1) / R - 1), ("rademacher", (N + R - 1) / R - 1), ("haar_stiefel", N / R - 1)):
        expected = predicted("features", LAWS[law])
        assert expected.total == pytest.approx(factor * expected.signal, rel=1e-12)


def test_velora_projects_every_group_on_the_mean_sub_token_of_the_first_batch() -> None:
    X, D = problem()
    keeper, at = VeLoRA(2), Key(0, "", 0, 0, CPU)
    parts = torch.cat([X[:, :2], X[:, 2:]])
    v = parts.mean(0) / parts.mean(0).norm()
    basis = torch.block_diag(v[:, None], v[:, None])
    for inputs in (X, 3 * X.flip(0)):  # the direction stays
        G = D.mT @ inputs
        torch.testing.assert_close(keeper.gradient(keeper.keep(inputs, at), D, at), G @ basis @ basis.mT, rtol=0, atol=1e-12)
    assert not keeper.unbiased and set(keeper.state_dict()) == {"v"}
    for nothing in (torch.zeros_like(X), torch.full_like(X, torch.nan)):
        fresh = VeLoRA(2)
        fresh.keep(nothing, at)
        assert fresh.v is None and fresh.state_dict() == {}
