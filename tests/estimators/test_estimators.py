"""Sketch, lift, IPA, LR, tokens, the left side and error feedback: identities of every draw."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from estimators import HaarStiefel, SparseSign, SubsampledTransform, estimate, ipa, lift, lr, measure_estimates, on_left, sketch, tokens
from estimators import error_feedback as ef
from theory import moments, mse


@pytest.fixture
def problem(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(W, H, A) of the loss ½‖WH½ − A‖² in disguise: F(W) = ½tr(WHWᵀ) + ⟨A, W⟩, gradient WH + A."""
    W, A = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    X = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return W, X.mT @ X / 8, A


def quadratic(H: Tensor, A: Tensor):
    return lambda W: 0.5 * ((W @ H) * W).sum((-2, -1)) + (A * W).sum((-2, -1))


def test_estimate_is_the_lift_of_the_sketch(generator: torch.Generator) -> None:
    G = torch.randn(2, 1, 4, 6, generator=generator, dtype=torch.float64)
    V = HaarStiefel(n=6, rank=2).sample(5, generator=generator, dtype=torch.float64)
    together = estimate(G, V)
    assert together.shape == (2, 5, 4, 6)
    for i in range(2):
        for j in range(5):
            torch.testing.assert_close(together[i, j], G[i, 0] @ (V[j] @ V[j].mT), rtol=0, atol=1e-12)
    torch.testing.assert_close(together, lift(sketch(G, V), V))


def test_the_left_side_is_the_transpose(generator: torch.Generator) -> None:
    G = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    U = HaarStiefel(n=4, rank=2).sample(3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(on_left(estimate, G, U), U @ U.mT @ G)


def test_ipa_is_the_sketched_gradient(problem: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> None:
    W, H, A = problem
    V = HaarStiefel(n=6, rank=2).sample(4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(ipa(quadratic(H, A), W, V), sketch(W @ H + A, V), rtol=0, atol=1e-12)
    leaf = W.clone().requires_grad_()
    with torch.no_grad():  # works there too, and leaves no trace on W
        torch.testing.assert_close(ipa(quadratic(H, A), leaf, V[0]), sketch(W @ H + A, V[0]))
    assert leaf.grad is None


def test_lr_is_exact_on_a_quadratic(problem: tuple[Tensor, Tensor, Tensor], generator: torch.Generator) -> None:
    """Antithetic: ⟨∇F, ZVᵀ⟩Z at any ε. One-sided: off by ε/2·⟨D, DH⟩Z."""
    W, H, A = problem
    V = HaarStiefel(n=6, rank=2).sample(4, generator=generator, dtype=torch.float64)
    Z = torch.randn(5, 4, 3, 2, generator=generator, dtype=torch.float64)
    D, g = lift(Z, V), W @ H + A
    inner = (g * D).sum((-2, -1))
    for epsilon in (1e-3, 0.5):
        seen = lr(quadratic(H, A), W, V, Z, epsilon=epsilon)
        torch.testing.assert_close(seen, (inner[..., None, None] * Z).mean(0), rtol=1e-9, atol=1e-9)
        one = lr(quadratic(H, A), W, V, Z, epsilon=epsilon, form="one_sided")
        curvature = epsilon / 2 * ((D @ H) * D).sum((-2, -1))
        torch.testing.assert_close(one, ((inner + curvature)[..., None, None] * Z).mean(0), rtol=1e-9, atol=1e-9)


def test_tokens_at_full_rank_is_the_gradient(generator: torch.Generator) -> None:
    delta, X = (torch.randn(7, k, generator=generator, dtype=torch.float64) for k in (3, 4))
    V = SubsampledTransform(n=7, rank=7).sample(2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(tokens(delta, X, V), (delta.mT @ X).expand(2, 3, 4), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sketch(torch.ones(3, 4), torch.ones(5, 2)), r"sketch\(G=\(3, 4\), V=\(5, 2\)\)"),
        (lambda: lift(torch.ones(3, 4), torch.ones(5, 2)), r"lift\(B=\(3, 4\), V=\(5, 2\)\)"),
        (lambda: ipa(torch.sum, torch.ones(3, 4), torch.ones(5, 2)), r"ipa\(W=\(3, 4\), V=\(5, 2\)\)"),
        (lambda: ipa(torch.sum, torch.full((3, 5), math.nan), torch.ones(5, 2)), "NaN or infinite"),
        (lambda: lr(torch.sum, torch.ones(3, 5), torch.ones(5, 2), torch.ones(3, 2)), "Z=\\(3, 2\\)"),
        (lambda: lr(torch.sum, torch.ones(3, 5), torch.ones(5, 2), torch.ones(1, 3, 2), epsilon=0.0), "epsilon=0.0"),
        (lambda: lr(torch.sum, torch.ones(3, 5), torch.ones(5, 2), torch.ones(1, 3, 2), form="forward"), "form='forward'"),  # pyright: ignore
        (lambda: estimate(torch.full((3, 4), math.nan), torch.ones(4, 2)), "sketch: G of shape"),
        (lambda: tokens(torch.full((3, 4), math.inf), torch.ones(3, 4), torch.ones(3, 2)), "tokens: delta"),
        (lambda: lr(torch.sum, torch.full((3, 5), math.nan), torch.ones(5, 2), torch.ones(1, 3, 2)), "lr: W"),
        (lambda: HaarStiefel(n=4, rank=2.0), "must be integers"),  # pyright: ignore
        (lambda: tokens(torch.ones(3, 4), torch.ones(4, 4), torch.ones(3, 2)), "number of tokens"),
        (lambda: SparseSign(n=4, rank=2, sparsity=0.5), "sparsity=0.5"),
        (lambda: SubsampledTransform(n=4, rank=2, transform="fft"), "unknown transform 'fft'"),  # pyright: ignore
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_annotations_are_enforced_under_test() -> None:
    with pytest.raises(Exception, match="Type-check error"):
        sketch(torch.ones(3, 4), torch.ones(5, 2))


# Error feedback


def halve(x: Tensor) -> Tensor:
    return x / 2


def test_error_feedback_bookkeeping(generator: torch.Generator) -> None:
    g, e = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    sent, left = ef.ef14(halve, g, e)
    torch.testing.assert_close(sent + left, g + e)  # nothing is lost
    update, memory = ef.ef21(halve, g, e)
    torch.testing.assert_close(update, e + (g - e) / 2)
    assert update is memory
    update, residual = ef.literal(halve, g, e)
    torch.testing.assert_close(update, g / 2 + e)
    torch.testing.assert_close(residual, e + g / 2)
    assert ef.none(halve, g, e)[1] is e
    torch.testing.assert_close(ef.none(halve, g, e)[0], g / 2)


def test_ef14_converges_and_the_literal_form_diverges_under_the_same_compressors() -> None:
    """One random coordinate of four kept at each step, the same sequence for both."""
    final = {}
    for name, method in (("ef14", ef.ef14), ("literal", ef.literal)):
        generator = torch.Generator().manual_seed(0)
        x, memory = torch.ones(1, 4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
        for _ in range(2000):
            kept = torch.nn.functional.one_hot(torch.randint(4, (1,), generator=generator), 4).double()
            update, memory = method(lambda v, kept=kept: v * kept, x, memory)
            x = x - 0.02 * update
        final[name] = float(x.norm())
    assert final["ef14"] < 1e-6 < 1e3 < final["literal"], final


# Against exact moments


def test_the_other_estimators_have_their_exact_error(generator: torch.Generator) -> None:
    """Token axis, both sides, several queries and one-sided differences: measured against theory/mse.py."""
    delta, X = (torch.randn(6, k, generator=generator, dtype=torch.float64) for k in (2, 3))
    G = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    token, left, right = HaarStiefel(n=6, rank=2), HaarStiefel(n=3, rank=2), SparseSign(n=5, rank=2)
    signal = (G.mT @ G).numpy()

    def both(size: int, g: torch.Generator) -> Tensor:
        U, V = (law.sample(size, generator=g, dtype=torch.float64) for law in (left, right))
        return on_left(estimate, estimate(G, V), U)

    def zeroth(form: str) -> Callable[[int, torch.Generator], Tensor]:
        def draw(size: int, g: torch.Generator) -> Tensor:
            V = right.sample(size, generator=g, dtype=torch.float64)
            Z = torch.randn(3, size, 3, 2, generator=g, dtype=torch.float64)
            return lift(lr(lambda W: (W * G).sum((-2, -1)), torch.zeros(3, 5).double(), V, Z, epsilon=1.0, form=form), V)  # pyright: ignore

        return draw

    law = moments("sparse_sign", 5, 2)
    cases = {
        "tokens": (
            lambda size, g: tokens(delta, X, token.sample(size, generator=g, dtype=torch.float64)),
            delta.mT @ X,
            mse.tokens(moments("haar_stiefel", 6, 2), delta.numpy(), X.numpy()),
        ),
        "two-sided": (both, G, mse.two_sided(moments("haar_stiefel", 3, 2), law, G.numpy())),
        "antithetic, three queries": (zeroth("antithetic"), G, mse.lr(law, 3, 0 * signal, signal, queries=3)),
        "one-sided, three queries": (zeroth("one_sided"), G, mse.lr(law, 3, 0 * signal, signal, queries=3)),
        "leave one out, three queries": (zeroth("leave_one_out"), G, mse.lr(law, 3, 0 * signal, signal, 3, leave_one_out=True)),
    }
    for name, (draw, target, predicted) in cases.items():
        seen = measure_estimates(draw, target, 200_000, generator=generator)
        assert 8 * seen.mse.standard_error < 0.1 * predicted.total, name
        assert abs(seen.mse.value - predicted.total) < 5 * seen.mse.standard_error, name
        assert abs(seen.alignment.value - predicted.alignment) < 5 * seen.alignment.standard_error < 0.1, name
