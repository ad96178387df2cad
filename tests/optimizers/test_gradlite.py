"""GradLite: its recursions are those of estimators/error_feedback.py (a), its default is its transcription (b), who converges and who diverges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from estimators import ErrorBasis, Inputs, Keeper, LawOnFeatures, compress, error_feedback
from optimizers import GradLite
from optimizers.frames import Dense
from tests.optimizers.test_identities import gradients, matrices, run
from tests.optimizers.test_transcriptions import RANK, SHAPES, compare
from theory import feedback

Step = Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]


def recursion(step: Step, W: Tensor, Gs: Tensor, frames: list[Tensor], lr: float) -> list[Tensor]:
    """W after every step with C(X) = UUᵀX."""
    memory, out = torch.zeros_like(W), []
    for G, U in zip(Gs, frames, strict=True):
        sent, memory = step(lambda X, U=U: U @ (U.mT @ X), G, memory)
        W = W - lr * sent
        out.append(W)
    return out


def paid_twice(C: Any, G: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    return C(G + e), e + G - C(G)  # what was sent of e is not taken out of it


def forgetful(C: Any, G: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    return C(G + e), G - C(G)


@pytest.mark.check("a", "gradlite")
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("name", ["ef14", "ef21", "literal", "none"])
def test_each_recursion_is_the_one_of_the_core(name: str, shape: tuple[int, int]) -> None:
    """On frames that change at every step; and the recursions are told apart, from each other and from two that are wrong."""
    (p,), Gs = matrices([shape]), gradients(shape, 12)
    generator = torch.Generator().manual_seed(2)
    frames = [torch.linalg.qr(torch.randn(shape[0], 3, generator=generator, dtype=torch.float64))[0] for _ in Gs]
    start = p.detach().clone()
    optimizer = GradLite([p], lr=0.05, rank=3, feedback=name, residual="fp32", inner="sgd")
    optimizer.inject = lambda _, t: Dense(frames[t])
    mine = []
    for G in Gs:
        p.grad = G
        optimizer.step()
        mine.append(p.detach().clone())
    steps: dict[str, Step] = {one: getattr(error_feedback, one) for one in ("ef14", "ef21", "literal", "none")}
    for t, expected in enumerate(recursion(steps[name], start, Gs, frames, 0.05)):
        torch.testing.assert_close(mine[t], expected, rtol=0, atol=1e-12)
    for other in (*(step for one, step in steps.items() if one != name), paid_twice, forgetful):
        assert float((recursion(other, start, Gs, frames, 0.05)[-1] - mine[-1]).abs().max()) > 1e-3


@pytest.mark.check("a", "gradlite")
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_full_rank_in_the_identity_basis_is_adamw(shape: tuple[int, int]) -> None:
    mine, theirs = matrices([shape]), matrices([shape])
    optimizer = GradLite(mine, lr=3e-3, rank=shape[0], betas=(0.9, 0.98), weight_decay=0.1)
    optimizer.inject = lambda *_: Dense(torch.eye(shape[0], dtype=torch.float64))
    peer = torch.optim.AdamW(theirs, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), foreach=False)
    torch.testing.assert_close(run(optimizer, mine, 30)[0], run(peer, theirs, 30)[0], rtol=0, atol=1e-11)


@pytest.mark.check("a", "gradlite")
def test_what_the_weight_got_is_all_gradients_but_the_residual() -> None:
    (p,), Gs = matrices([(20, 12)]), gradients((20, 12), 25)
    start = p.detach().clone()
    optimizer = GradLite([p], lr=0.01, rank=3, residual="fp32", inner="sgd")
    for G in Gs:
        p.grad = G
        optimizer.step()
    torch.testing.assert_close((start - p.detach()) / 0.01, Gs.sum(0) - optimizer.state[p]["error"].mT, rtol=0, atol=1e-10)
    captured = optimizer.captured()
    assert captured.keys() == {"0.0"} and 0 < captured["0.0"] < 1


@pytest.mark.check("a", "gradlite")
def test_the_basis_follows_the_gradient_or_stands_still() -> None:
    """Of one gradient with a gap the running iteration finds the leading left singular vectors; the static frame is orthonormal and stays."""
    U, V = (torch.linalg.qr(torch.randn(n, 6, generator=torch.Generator().manual_seed(n), dtype=torch.float64))[0] for n in (20, 12))
    G = U @ torch.diag(torch.tensor([9.0, 8.0, 7.0, 0.5, 0.4, 0.3], dtype=torch.float64)) @ V.mT
    for basis in ("adaptive", "static"):
        (p,) = matrices([(20, 12)])
        optimizer, seen = GradLite([p], rank=3, basis=basis, feedback="none"), []
        for _ in range(8):
            p.grad = G
            optimizer.step()
            seen.append(optimizer.state[p]["V"].clone())
        torch.testing.assert_close(seen[-1].mT @ seen[-1], torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-12)
        if basis == "adaptive":
            torch.testing.assert_close(seen[-1] @ seen[-1].mT, U[:, :3] @ U[:, :3].mT, rtol=0, atol=1e-10)
        else:
            assert all(torch.equal(seen[0], later) for later in seen)


@pytest.mark.check("b", "gradlite")
@pytest.mark.parametrize("shape", SHAPES)
def test_transcription(shape: tuple[int, int]) -> None:
    """ef14, Adam in a running basis: 50 steps in naive numpy from the same first frame."""
    rng = np.random.default_rng(3)
    rank = min(RANK, *shape)
    first = np.linalg.qr(rng.standard_normal((shape[0], rank)))[0]
    lr, wd, b1, b2, eps = 0.02, 0.1, 0.9, 0.97, 1e-6

    def rule(W: np.ndarray, Gs: list[np.ndarray]) -> list[np.ndarray]:
        tall = shape[0] >= shape[1]  # ``compare`` gives wide matrices, and squares transposed
        W, Gs = (W.T, [G.T for G in Gs]) if tall else (W, Gs)
        e, U = np.zeros_like(W), first
        M, N = np.zeros((rank, W.shape[1])), np.zeros((rank, W.shape[1]))
        out = []
        for t, G in enumerate(Gs):
            v, old = G + e, U
            if t:
                U = np.linalg.qr(v @ (v.T @ old))[0]
                R = U.T @ old
                m, n = M / (1 - b1**t), N / (1 - b2**t)
                N = (1 - b2**t) * np.abs((R * R) @ (n - m**2) + (R @ m) ** 2)
                M = R @ M
            B = U.T @ v
            M, N = b1 * M + (1 - b1) * B, b2 * N + (1 - b2) * B**2
            W = (1 - lr * wd) * W - lr * U @ (M / (1 - b1 ** (t + 1)) / (np.sqrt(N / (1 - b2 ** (t + 1))) + eps))
            e = v - U @ B
            out.append(W.T if tall else W)
        return out

    def optimizer(ps: list[nn.Parameter]) -> GradLite:
        made = GradLite(ps, lr=lr, weight_decay=wd, betas=(b1, b2), eps=eps, rank=rank, residual="fp32")
        made.inject = lambda _, t: None if t else Dense(torch.tensor(first))
        return made

    compare(shape, optimizer, rule, None)


def descend(steps: int, lr: float, **options: Any) -> tuple[Tensor, Tensor]:
    """(x after ``steps`` on ½‖x‖², a 20×12 matrix; the part of it outside the last frame)."""
    (p,) = matrices([(20, 12)])
    optimizer = GradLite([p], lr=lr, rank=5, residual="fp32", inner="sgd", **options)
    for _ in range(steps):
        p.grad = p.detach().clone()
        optimizer.step()
    V = optimizer.state[p]["V"]
    return p.detach(), p.detach() - V @ (V.mT @ p.detach())


def test_feedback_with_a_running_basis_converges() -> None:
    """And the ablations do not: without feedback a static basis leaves what it misses where it was."""
    (start,) = matrices([(20, 12)])
    length = float(start.detach().norm())
    assert float(descend(1200, 0.05)[0].norm()) < 1e-6 * length
    left, outside = descend(1200, 0.05, feedback="none", basis="static")
    torch.testing.assert_close(left, outside, rtol=0, atol=1e-9 * length)
    assert float(outside.norm()) > 0.5 * length


@pytest.mark.parametrize("lr", [0.3, 0.02])
def test_the_literal_recursion_diverges_as_theory_says(lr: float) -> None:
    """What a static frame discards follows the linear map of theory/feedback.py, whose eigenvalues have modulus √(1+η), also at a small η."""
    (start,) = matrices([(20, 12)])
    outside = descend(1, 0.0, feedback="literal", basis="static")[1]
    step = feedback.literal_matrix(lr, 1.0, 0.0)
    for steps in (1, 2, 50, 400):
        expected = float(np.linalg.matrix_power(step, steps)[0, 0]) * outside
        found = descend(steps, lr, feedback="literal", basis="static")[1]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9 * float(expected.abs().max()))
    assert np.abs(np.linalg.eigvals(step)) == pytest.approx(feedback.literal_modulus(lr, 1.0)) and feedback.literal_modulus(lr, 1.0) > 1
    assert float(found.norm()) > 10 * float(start.detach().norm())


@pytest.mark.parametrize("inputs", [Inputs(), LawOnFeatures("coordinate", 1.0)], ids=str)
def test_the_directions_of_the_layers_do_not_break_convergence(inputs: Keeper) -> None:
    """Least squares through compressed layers: U starts from the error signals and turns to the residual. A U of Δ alone leaves 10⁶ times as much."""

    def ended(follow: bool) -> float:
        generator = torch.Generator().manual_seed(0)
        A, target = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((200, 12), (20, 12)))
        model = nn.Sequential(nn.Linear(12, 20, bias=False, dtype=torch.float64))
        (weight,) = model.parameters()
        nn.init.zeros_(weight)
        handle = compress(model, keeper=lambda _: ErrorBasis(inputs, 5))
        optimizer, keeper = GradLite([("0.weight", weight)], lr=0.05, rank=5, inner="sgd", residual="fp32"), handle.layers["0"].keeper
        assert isinstance(keeper, ErrorBasis)
        if follow:
            optimizer.start = lambda _: keeper.U
        else:
            optimizer.inject = lambda *_: Dense(keeper.U)  # pyright: ignore[reportArgumentType]
        for _ in range(750):
            optimizer.zero_grad()
            (model(A) - A @ target.mT).square().sum(1).mean().div(2).backward()
            optimizer.step()
            handle.step()
        return float((weight.detach() - target).square().sum())

    assert ended(True) < 1e-15 < 1e-9 < ended(False)


@pytest.mark.check("a", "gradlite")
def test_a_drawn_basis_is_unbiased() -> None:
    """Frames of the law on the left, one a step; their mean step is the gradient, with the variance of Haar–Stiefel, (m/r − 1)‖G‖²."""
    G = gradients((12, 20), 1)[0]
    (p,) = matrices([(12, 20)])
    optimizer = GradLite([p], lr=1.0, rank=3, basis="law", feedback="none", inner="sgd")
    steps = []
    for _ in range(4000):
        before, p.grad = p.detach().clone(), G
        optimizer.step()
        steps.append(before - p.detach())
    found = torch.stack(steps)
    along = (found * G).sum((1, 2)) / G.square().sum()
    squares = (found - G).square().sum((1, 2)) / G.square().sum()
    for values, expected in ((along, 1.0), (squares, 12 / 3 - 1)):
        error = float(values.std()) / len(values) ** 0.5
        assert abs(float(values.mean()) - expected) < 5 * error and 8 * error < 0.1 * expected


@pytest.mark.parametrize("residual, bytes_each", [("fp32", 4.0), ("bf16", 2.0), ("8bit", 1 + 4 / 256)])
def test_the_residual_is_kept_in_the_stated_precision(residual: str, bytes_each: float) -> None:
    """Its bytes; a round trip through a checkpoint; the same training but for rounding, which one without a residual is not."""

    def trained(steps: int, **options: Any) -> tuple[GradLite, nn.Parameter]:
        (p,) = matrices([(128, 64)], torch.float32)
        optimizer = GradLite([p], lr=0.01, rank=8, inner="sgd", **options)
        for G in gradients((128, 64), steps, torch.float32):
            p.grad = G
            optimizer.step()
        return optimizer, p

    optimizer, p = trained(6, residual=residual)
    kept = sum(v.numel() * v.element_size() for k, v in optimizer.state[p].items() if k.startswith("error"))
    assert kept == bytes_each * p.numel()
    again = GradLite([p], lr=0.01, rank=8, residual=residual, inner="sgd")
    again.load_state_dict(optimizer.state_dict())
    for k, v in again.state[p].items():
        assert not isinstance(v, Tensor) or (torch.equal(v, optimizer.state[p][k]) and v.dtype == optimizer.state[p][k].dtype)
    (start,) = matrices([(128, 64)], torch.float32)
    exact, none = trained(6, residual="fp32")[1].detach(), trained(6, feedback="none")[1].detach()
    moved = (exact - start.detach()).norm()
    away, without = float((p.detach() - exact).norm() / moved), float((none - exact).norm() / moved)
    assert away == 0 < without if residual == "fp32" else 0 < away < without / 8


def test_what_a_static_basis_leaves_out_never_comes_back() -> None:
    """ef14 with one frame for good is no feedback at all, in exact arithmetic; so it is refused where the basis is static."""
    ends = []
    for name in ("ef14", "none"):
        (p,) = matrices([(20, 12)])
        optimizer = GradLite([p], lr=0.05, rank=4, feedback=name, residual="fp32", inner="sgd")
        U = torch.linalg.qr(torch.randn(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
        optimizer.inject = lambda *_, U=U: Dense(U)
        ends.append(run(optimizer, [p], 40)[0])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="feedback='ef14', basis='static'"):
        GradLite(matrices([(8, 8)]), rank=2, basis="static")


def test_a_plain_recursion_refuses_adam() -> None:
    for name in ("ef21", "literal"):
        with pytest.raises(ValueError, match=f"GradLite\\(feedback='{name}', inner='adam'\\)"):
            GradLite(matrices([(8, 8)]), rank=2, feedback=name)
    wrong: list[dict[str, Any]] = [{"feedback": "none"}, {"inner": "sgd"}]
    for options in wrong:
        with pytest.raises(ValueError, match="unbiased steps need feedback='none' and inner='sgd'"):
            GradLite(matrices([(8, 8)]), rank=2, basis="law", **options)
