"""Zeroth order: estimates against their exact moments, on one matrix, on logistic regression and on a transformer block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from estimators import LAWS, keyed
from optimizers import ZEROTH_ORDER, LowRankLR, MeZO, SubZero, ZerothOrder
from optimizers.lozo import LOZO
from tests.monte_carlo import assert_mean
from tests.optimizers.test_zeroth import Matrix, weights
from theory import Moments, moments, mse

METHODS = list(ZEROTH_ORDER)
RANKED: dict[str, Any] = {"rank": 2, "every": 3}


def law_moments(law: str, n: int, rank: int) -> Moments:
    return moments(LAWS[law].stem, n, rank)


def estimates(method: type[ZerothOrder], options: dict[str, Any], A: Tensor) -> Callable[[int, torch.Generator], Tensor]:
    """Estimates of the gradient −A of ``Matrix`` at W = 0: what one step at learning rate 1 takes away, each of its own seed."""

    def draw(size: int, generator: torch.Generator) -> Tensor:
        found = []
        for _ in range(size):
            model = Matrix(A)
            seed = int(torch.randint(2**31, (), generator=generator))
            method(model, 1.0, seed=seed, **options).step(model)
            found.append(-model.W.detach())
        return torch.stack(found)

    return draw


G = torch.randn(3, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64) * torch.logspace(0, -1, 5, dtype=torch.float64)
SIGNAL = (G.mT @ G).numpy()
NONE = np.zeros((5, 5))
HAAR = {side: moments("haar_stiefel", n, 2) for side, n in (("left", 3), ("right", 5))}
CASES: dict[str, tuple[type[ZerothOrder], dict[str, Any], Callable[[], mse.Decomposition]]] = {
    **{
        law: (LowRankLR, {"law": law, "rank": 2}, lambda law=law: mse.lr(law_moments(law, 5, 2), 3, NONE, SIGNAL))
        for law, kind in LAWS.items()
        if kind.unbiased and not kind.fitted and law != "hadamard"  # which needs a power of two
    },
    "three queries": (LowRankLR, {"rank": 2, "queries": 3}, lambda: mse.lr(law_moments("haar_stiefel", 5, 2), 3, NONE, SIGNAL, 3)),
    "mezo": (MeZO, {}, lambda: mse.lr(moments("haar_stiefel", 5, 5), 3, NONE, SIGNAL)),
    "lozo": (LOZO, {"rank": 2}, lambda: mse.lr(moments("gaussian", 5, 2), 3, NONE, SIGNAL)),
    "subzero": (SubZero, {"rank": 2}, lambda: mse.lr_two_sided(HAAR["left"], HAAR["right"], G.numpy())),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("case", CASES)
def test_estimates_have_their_exact_mean_and_error(case: str, generator: torch.Generator) -> None:
    """⟨Ĝ, g⟩/‖g‖² and ‖Ĝ − g‖² over their exact values; 1,200 draws would show it if a factor of two were missing."""
    method, options, exact = CASES[case]
    predicted, norm, draw = (
        exact(),
        float(G.square().sum()),
        estimates(method, {"every": 1} | options if method is not MeZO else options, G),
    )

    def statistics(size: int, g: torch.Generator) -> Tensor:
        X = draw(size, g)
        return torch.stack([(X * -G).sum((-2, -1)) / norm, (X + G).square().sum((-2, -1)) / predicted.total], -1)

    assert_mean(statistics, torch.ones(2, dtype=torch.float64), draws=1200, resolution=0.9, generator=generator)


class Logistic(nn.Module):
    """Mean logistic loss of Y ∈ {±1} on XWᵀ, summed over rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        g = torch.Generator().manual_seed(7)
        self.linear = nn.Linear(5, 3, bias=False).double()
        self.X = torch.randn(40, 5, generator=g, dtype=torch.float64)
        self.Y = torch.randn(40, 3, generator=g, dtype=torch.float64).sign()

    def forward(self) -> Tensor:
        return nn.functional.softplus(-self.Y * self.linear(self.X)).sum(1).mean()


class Block(nn.Module):
    """A transformer block with a loss on what comes out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True).double()
        self.X, self.Y = torch.randn(4, 6, 8, dtype=torch.float64), torch.randn(4, 6, 8, dtype=torch.float64)

    def forward(self) -> Tensor:
        return (self.block(self.X) - self.Y).square().mean()


def predicted(gradients: dict[str, Tensor], law: str, rank: int) -> float:
    """E‖Ĝ − g‖² of all parameters together, matrices in the law and the others whole, with what each adds to the slopes of all others."""
    own: dict[str, tuple[Moments, int, np.ndarray]] = {}
    for name, g in gradients.items():
        flat = g if g.ndim == 2 else g.reshape(1, -1)
        m, n = flat.shape
        kind = law_moments(law, n, min(rank, m, n)) if g.ndim == 2 else moments("haar_stiefel", n, n)
        own[name] = (kind, m, (flat.mT @ flat).numpy())
    slopes = {name: mse.slope(kind, 0 * signal, signal) for name, (kind, _, signal) in own.items()}
    everything = sum(slopes.values())
    return sum(mse.lr(kind, m, 0 * signal, signal, elsewhere=everything - slopes[name]).total for name, (kind, m, signal) in own.items())


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [Logistic, Block])
@pytest.mark.parametrize("law", ["haar_stiefel", "gaussian"])
def test_whole_models_have_their_exact_mean_and_error(kind: type[nn.Module], law: str, generator: torch.Generator) -> None:
    """At a small ε the loss is linear along a direction. ⟨Ĝ, g⟩/‖g‖² is one; ‖Ĝ − g‖² is that of all parameters, each in the noise of all."""
    model = kind()
    model().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    start, norm = weights(model), sum(float(g.square().sum()) for g in gradients.values())
    expected = predicted(gradients, law, 2)
    model.zero_grad()

    def statistics(size: int, g: torch.Generator) -> Tensor:
        rows = []
        for _ in range(size):
            model.load_state_dict(start)
            seed = int(torch.randint(2**31, (), generator=g))
            LowRankLR(model, 1.0, law=law, rank=2, every=1, epsilon=1e-5, seed=seed).step(model)
            X = {name: start[name] - p.detach() for name, p in model.named_parameters()}
            along = sum(float((X[name] * value).sum()) for name, value in gradients.items()) / norm
            rows.append([along, sum(float((X[name] - value).square().sum()) for name, value in gradients.items()) / expected])
        return torch.tensor(rows, dtype=torch.float64)

    draws = 900 if kind is Logistic else 500
    assert_mean(statistics, torch.ones(2, dtype=torch.float64), draws=draws, resolution=0.9, generator=generator)


def test_differences_of_second_order_leave_no_error_on_a_quadratic_and_one_on_logistic_loss() -> None:
    """Antithetic slopes are those of the gradient exactly at any ε where the third derivative is zero, and to ε² elsewhere."""
    model = Logistic()
    model().backward()
    assert model.linear.weight.grad is not None
    g, start = model.linear.weight.grad.clone(), model.linear.weight.detach().clone()
    model.zero_grad()

    def error(epsilon: float, form: Any) -> float:
        model.linear.weight.data.copy_(start)
        MeZO(model, 1.0, epsilon=epsilon, form=form, seed=1).step(model)
        z = torch.randn(3, 5, generator=keyed.generator(1, "linear.weight.Z0", 0), dtype=torch.float64)
        return abs(float(((start - model.linear.weight.detach()) / z).mean()) - float((g * z).sum()))

    assert error(1e-2, "antithetic") / error(1e-3, "antithetic") == pytest.approx(100, rel=0.02)
    assert error(1e-2, "one_sided") / error(1e-3, "one_sided") == pytest.approx(10, rel=0.02)
