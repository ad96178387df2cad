"""The directions of the error signals: what the running iteration finds, what it catches of them, and when it stands still."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from estimators import ErrorBasis, Inputs, Key, LawOnFeatures

CPU = torch.device("cpu")


def signals(t: int = 40, m: int = 12) -> tuple[Tensor, Tensor]:
    """Δ with three large singular values, and its leading right singular vectors."""
    generator = torch.Generator().manual_seed(3)
    U, V = (torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=torch.float64))[0] for n in (t, m))
    return U @ torch.diag(torch.tensor([9.0, 8.0, 7.0] + [0.5] * (m - 3), dtype=torch.float64)) @ V.mT, V[:, :3]


def see(basis: ErrorBasis, D: Tensor, first: int = 0, times: int = 1) -> None:
    """A backward pass in each of ``times`` steps from ``first`` on."""
    X = torch.randn(len(D), 5, generator=torch.Generator().manual_seed(4), dtype=D.dtype)
    for index in range(first, first + times):
        at = Key(0, "layer", index, 0, CPU)
        basis.gradient(basis.keep(X, at), D, at)


def frame(basis: ErrorBasis) -> Tensor:
    assert basis.U is not None
    return basis.U


def test_it_finds_what_catches_most() -> None:
    """After some passes over one Δ: its leading right singular vectors, orthonormal at every step, and the share of ‖Δ‖² that no other r can beat."""
    D, best = signals()
    basis = ErrorBasis(Inputs(), 3)
    caught = []
    for step in range(8):
        see(basis, D, step)
        U = frame(basis)
        torch.testing.assert_close(U.mT @ U, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
        assert basis.captured is not None
        torch.testing.assert_close(basis.captured, (D @ U @ U.mT).square().sum() / D.square().sum(), rtol=0, atol=1e-12)
        caught.append(float(basis.captured))
    torch.testing.assert_close(frame(basis) @ frame(basis).mT, best @ best.mT, rtol=0, atol=1e-9)
    assert all(a <= b + 1e-12 for a, b in pairwise(caught))
    assert caught[-1] == pytest.approx(float(torch.linalg.svdvals(D)[:3].square().sum() / D.square().sum()), abs=1e-12)


def test_a_static_basis_does_not_look() -> None:
    first, second = ErrorBasis(Inputs(), 3, static=True), ErrorBasis(Inputs(), 3, static=True)
    D, best = signals()
    see(first, D, times=3)
    see(second, torch.flip(D, (1,)))
    assert torch.equal(frame(first), frame(second))
    torch.testing.assert_close(frame(first).mT @ frame(first), torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float((frame(first).mT @ best).square().sum()) < 2  # of 3


@pytest.mark.parametrize("wrong", [0.0, float("nan"), float("inf")])
def test_signals_without_directions_change_nothing(wrong: float) -> None:
    D, _ = signals()
    basis = ErrorBasis(Inputs(), 3)
    see(basis, D)
    before, caught = frame(basis).clone(), basis.captured
    see(basis, D * wrong, 1)
    assert torch.equal(frame(basis), before) and basis.captured is caught


def test_it_moves_once_a_step() -> None:
    """Also where a step has two backward passes, by clipping or accumulation: the frame is that of the first."""
    D, _ = signals()
    basis = ErrorBasis(Inputs(), 3)
    see(basis, D)
    once = frame(basis)
    see(basis, torch.flip(D, (1,)))
    assert frame(basis) is once
    see(basis, D, 1)
    assert frame(basis) is not once


def test_its_state_goes_on_and_a_rank_may_be_a_fraction() -> None:
    D, _ = signals()
    one, two = (ErrorBasis(LawOnFeatures("gaussian", 0.5), 0.25) for _ in range(2))
    see(one, D, times=2)
    assert frame(one).shape == (12, 3)
    two.load_state_dict(one.state_dict())
    see(one, D, 2)
    see(two, D, 2)
    assert torch.equal(frame(one), frame(two)) and one.state_dict().keys() == {"U", "last"}
    for rank in (0, 1.5, True):
        with pytest.raises(ValueError, match="rank must be a positive integer, or a fraction of out_features"):
            ErrorBasis(Inputs(), rank)
