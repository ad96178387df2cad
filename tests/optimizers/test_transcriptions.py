"""(b) 50 steps of every rule against its naive float64 transcription, for wide, square and tall matrices, to 1e-9."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optimizers import Apollo, Fira, Flora, Frugal, GaLore, GoLore, LDAdam, Plumage, SpectralAdam, Subspace
from optimizers.frames import Balanced, Dense, Frame, Weighted
from tests.optimizers import transcriptions as naive

SHAPES = [(12, 20), (16, 16), (21, 9), (5, 40)]
STEPS, RANK, EVERY = 50, 4, 7
ADAM: dict[str, Any] = {"b1": 0.9, "b2": 0.97, "eps": 1e-6}
OURS: dict[str, Any] = {"rank": RANK, "every": EVERY, "betas": (0.9, 0.97), "eps": 1e-6}


def problem(shape: tuple[int, int]) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(sum(shape))
    U, V = rng.standard_normal((shape[0], 6)), rng.standard_normal((6, shape[1]))
    gradients = [(U + 0.1 * t * rng.standard_normal(U.shape)) @ V / 3 + 0.2 * rng.standard_normal(shape) for t in range(STEPS)]
    return rng.standard_normal(shape), gradients


def frames(shape: tuple[int, int], gaussian: bool = False) -> Callable[[int], np.ndarray]:
    """A projector of the smaller dimension for every period, (m, r)."""
    rng = np.random.default_rng(7)
    m = min(shape)
    drawn = [rng.standard_normal((m, RANK)) / np.sqrt(RANK) for _ in range(STEPS)]
    return lambda t: drawn[t // EVERY] if gaussian else np.linalg.qr(drawn[t // EVERY])[0]


def ours(
    optimizer: Callable[[list[nn.Parameter]], Subspace],
    W: np.ndarray,
    Gs: list[np.ndarray],
    P: Callable[[int], np.ndarray] | None,
    wrap: Callable[[int, torch.Tensor], Frame] = lambda _, V: Dense(V),
) -> list[np.ndarray]:
    p = nn.Parameter(torch.tensor(W))
    made = optimizer([p])
    if P is not None:
        made.inject = lambda _, t: wrap(t, torch.tensor(P(t)))
    out = []
    for G in Gs:
        p.grad = torch.tensor(G)
        made.step()
        out.append(p.detach().numpy().copy())
    return out


def compare(
    shape: tuple[int, int],
    optimizer: Callable[[list[nn.Parameter]], Subspace],
    rule: Callable[[np.ndarray, list[np.ndarray]], list[np.ndarray]],
    P: Callable[[int], np.ndarray] | None,
    **options: Any,
) -> None:
    W, Gs = problem(shape)
    mine = ours(optimizer, W, Gs, P, **options)
    wide = shape[0] < shape[1]  # the transcription projects rows; a square matrix is projected on its columns
    expected = rule(W if wide else W.T, [G if wide else G.T for G in Gs])
    for t, (a, b) in enumerate(zip(mine, expected, strict=True)):
        np.testing.assert_allclose(a, b if wide else b.T, rtol=0, atol=1e-9, err_msg=f"step {t}")
    assert np.abs(mine[-1] - W).max() > 0.05  # it went somewhere


@pytest.mark.check("b", "galore")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("code", [False, True])
def test_galore(shape: tuple[int, int], code: bool) -> None:
    P = frames(shape)
    variant = "reference-code" if code else "paper"
    compare(
        shape,
        lambda ps: GaLore(ps, lr=0.02, scale=0.7, weight_decay=0.1, variant=variant, **OURS),
        lambda W, Gs: naive.galore(W, Gs, P, lr=0.02, alpha=0.7, wd=0.1, code=code, **ADAM),
        P,
    )


@pytest.mark.check("b", "galore")
@pytest.mark.parametrize("shape", SHAPES)
def test_galore_adafactor(shape: tuple[int, int]) -> None:
    P = frames(shape)
    compare(
        shape,
        lambda ps: GaLore(ps, lr=0.02, scale=0.7, weight_decay=0.1, inner="adafactor", beta1=0.9, relative=1e-3, rank=RANK, every=EVERY),
        lambda W, Gs: naive.galore_adafactor(W, Gs, P, lr=0.02, alpha=0.7, b1=0.9, floor=1e-3, wd=0.1),
        P,
    )


@pytest.mark.check("b", "golore")
@pytest.mark.parametrize("shape", SHAPES)
def test_golore(shape: tuple[int, int]) -> None:
    P = frames(shape)
    compare(
        shape,
        lambda ps: GoLore(ps, lr=0.02, scale=0.7, weight_decay=0.1, **OURS),
        lambda W, Gs: naive.golore(W, Gs, P, EVERY, lr=0.02, alpha=0.7, wd=0.1, **ADAM),
        P,
    )


@pytest.mark.check("b", "flora")
@pytest.mark.parametrize("shape", SHAPES)
def test_flora(shape: tuple[int, int]) -> None:
    P = frames(shape, gaussian=True)
    compare(
        shape,
        lambda ps: Flora(ps, lr=0.02, beta=0.8, weight_decay=0.1, rank=RANK, every=EVERY),
        lambda W, Gs: naive.flora(W, Gs, P, EVERY, lr=0.02, beta=0.8, wd=0.1),
        P,
    )


@pytest.mark.check("b", "fira")
@pytest.mark.parametrize("shape", SHAPES)
def test_fira(shape: tuple[int, int]) -> None:
    P = frames(shape)
    compare(
        shape,
        lambda ps: Fira(ps, lr=0.02, scale=0.7, weight_decay=0.1, **OURS),
        lambda W, Gs: naive.fira(W, Gs, P, lr=0.02, alpha=0.7, wd=0.1, **ADAM),
        P,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "whole", [pytest.param(False, marks=pytest.mark.check("b", "apollo")), pytest.param(True, marks=pytest.mark.check("b", "apollo_mini"))]
)
def test_apollo(shape: tuple[int, int], whole: bool) -> None:
    P = frames(shape, gaussian=True)
    compare(
        shape,
        lambda ps: Apollo(ps, lr=0.02, scale=1.5, weight_decay=0.1, whole=whole, **OURS),
        lambda W, Gs: naive.apollo(W, Gs, P, lr=0.02, alpha=1.5, wd=0.1, whole=whole, **ADAM),
        P,
    )


@pytest.mark.check("b", "frugal")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sign", [False, True])
def test_frugal(shape: tuple[int, int], sign: bool) -> None:
    P = frames(shape)
    compare(
        shape,
        lambda ps: Frugal(ps, lr=0.02, part="random", rest="sign" if sign else "sgd", rest_scale=0.3, weight_decay=0.1, **OURS),
        lambda W, Gs: naive.frugal(W, Gs, P, EVERY, lr=0.02, c=0.3, wd=0.1, sign=sign, **ADAM),
        P,
    )


@pytest.mark.check("b", "ldadam")
@pytest.mark.parametrize("shape", SHAPES)
def test_ldadam(shape: tuple[int, int]) -> None:
    compare(
        shape,
        lambda ps: LDAdam(ps, lr=0.02, rho=0.8, weight_decay=0.1, rank=RANK, betas=(0.9, 0.97), eps=1e-6),
        lambda W, Gs: naive.ldadam(W, Gs, RANK, lr=0.02, rho=0.8, wd=0.1, **ADAM),
        None,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(Plumage, marks=pytest.mark.check("b", "plumage")),
        pytest.param(SpectralAdam, marks=pytest.mark.check("b", "spectral_adam")),
    ],
)
@pytest.mark.parametrize("weights", ["both", "lift"])
def test_spectral(shape: tuple[int, int], method: Any, weights: str) -> None:
    P = frames(shape)
    pi = np.random.default_rng(3).uniform(0.2, 1, (STEPS, RANK))

    def at(t: int) -> np.ndarray:
        return pi[t // EVERY]

    filled, half = method is SpectralAdam, weights == "both"
    kind = Balanced if half else Weighted
    compare(
        shape,
        lambda ps: method(ps, lr=0.02, scale=0.7, weight_decay=0.1, weights=weights, **OURS),
        lambda W, Gs: naive.spectral(W, Gs, P, at, EVERY, lr=0.02, alpha=0.7, wd=0.1, filled=filled, half=half, **ADAM),
        P,
        wrap=lambda t, Q: kind(Q, 1 / torch.tensor(at(t))),
    )
