"""(a) Methods of fixed cosines and of near-orthogonal steps: their bases, Newton–Schulz, and what is kept of the momentum."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.fft
import torch
from torch import Tensor

from optimizers import DCTAdamW, Dion, MoFaSGD, Muon, Trion, orthogonal
from optimizers.frames import Cosines, Dense, dct_matrix
from optimizers.mofasgd import Factors, followed
from optimizers.orthogonal import QUINTIC, newton_schulz
from optimizers.selections import AlignedCosines
from optimizers.transports import Rotate
from tests.optimizers.test_identities import SHAPES, carried, gradients, matrices, run
from tests.optimizers.test_identities_family import orthonormal, random, watched

CPU = torch.device("cpu")


def oriented(X: Tensor, side: str = "smaller") -> Tensor:
    """As a method sees it whose projected dimension is the smaller or the larger one."""
    return X.mT if (X.shape[0] < X.shape[1]) == (side == "smaller") else X


# cosines


@pytest.mark.check("a", "dct_adamw")
@pytest.mark.check("a", "trion")
@pytest.mark.parametrize("n", [1, 2, 7, 32])
def test_the_cosine_matrix_is_orthogonal_and_scipys(n: int) -> None:
    C = dct_matrix(n, torch.float64, CPU)
    torch.testing.assert_close(C @ C.mT, torch.eye(n).double(), rtol=0, atol=1e-12)
    theirs: Any = scipy.fft.dct(np.eye(n), type=2, norm="ortho", axis=0)
    np.testing.assert_allclose(C.numpy(), theirs, rtol=0, atol=1e-12)


@pytest.mark.check("a", "dct_adamw")
@pytest.mark.check("a", "trion")
@pytest.mark.parametrize("n", [1, 4, 8])
def test_cosines_ranked_by_l2_lose_least_of_all_subsets(n: int) -> None:
    """‖G − GC_JC_Jᵀ‖ over all J; those ranked by l1 are others for the second matrix."""
    C = dct_matrix(n, torch.float64, CPU)
    sparse = torch.zeros(6, n).double()  # few large numbers in one column of GC, many small ones in the next
    sparse[0, 0], sparse[:, -1] = 1.0, 0.3
    for G, r in itertools.product((random(6, n), sparse @ C.mT), range(1, n + 1)):
        frame = AlignedCosines(r, "l2").choose(G, None)  # pyright: ignore[reportArgumentType]
        lost = lambda J: float((G - G @ C[:, J] @ C[:, J].mT).norm())  # noqa: E731
        least = min(lost(list(J)) for J in itertools.combinations(range(n), r))
        assert float((G - frame.passes(G)).norm()) == pytest.approx(least, abs=1e-12)
    if n > 1:
        assert AlignedCosines(1, "l1").choose(sparse @ C.mT, None).tensors()["J"].tolist() == [n - 1]  # pyright: ignore[reportArgumentType]
        assert AlignedCosines(1, "l2").choose(sparse @ C.mT, None).tensors()["J"].tolist() == [0]  # pyright: ignore[reportArgumentType]


@pytest.mark.check("a", "dct_adamw")
def test_rotation_moves_columns_and_rounds_nothing() -> None:
    before, after = carried(Rotate(), Cosines(torch.tensor([1, 3, 5, 7])), Cosines(torch.tensor([2, 3, 7, 9])))
    for name in ("exp_avg", "exp_avg_sq"):
        zero = torch.zeros(10).double()
        assert torch.equal(after[name], torch.stack([zero, before[name][:, 1], before[name][:, 3], zero], 1))
    assert after["step"] == before["step"]


@pytest.mark.check("a", "dct_adamw")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_what_passed_and_the_error_are_all_that_came(shape: tuple[int, int], norm: Any) -> None:
    """Σ lift(a) + e = ΣG after every step."""
    (p,) = matrices([shape])
    optimizer = DCTAdamW([p], lr=0.01, rank=4, every=2, norm=norm)
    seen, came, passed = watched(optimizer), torch.zeros(()), torch.zeros(())
    for G in gradients(shape, 8):
        p.grad = G
        optimizer.step()
        came, passed = came + oriented(G), passed + seen[-1].frame.passes(seen[-1].G)
        torch.testing.assert_close(passed + optimizer.state[p]["error"], came, rtol=0, atol=1e-12)


# Newton–Schulz and Muon


def quintic(s: Tensor, steps: int = 5) -> Tensor:
    """What becomes of singular values: the odd polynomial, iterated on them alone."""
    a, b, c = QUINTIC
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.check("a", "muon")
@pytest.mark.check("a", "gum")
@pytest.mark.check("a", "trion")
@pytest.mark.parametrize("shape", [*SHAPES, (5, 1)])
@pytest.mark.parametrize("steps", [1, 5])
def test_newton_schulz_changes_singular_values_and_no_singular_vectors(shape: tuple[int, int], steps: int) -> None:
    k = min(shape)
    U, V = orthonormal(shape[0], k), orthonormal(shape[1], k, seed=4)
    for s in (torch.ones(k).double(), torch.rand(k, generator=torch.Generator().manual_seed(1), dtype=torch.float64)):
        torch.testing.assert_close(newton_schulz((U * s) @ V.mT, steps), (U * quintic(s, steps)) @ V.mT, rtol=0, atol=1e-10)
    assert torch.equal(newton_schulz(U @ V.mT), newton_schulz(U @ V.mT, 5))


@pytest.mark.check("a", "muon")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_newton_schulz_brings_singular_values_towards_one(dtype: torch.dtype | None) -> None:
    """From condition numbers up to 30; the scalar polynomial says the same of every value from 0.01 of the norm on."""
    U, V = orthonormal(48, 32), orthonormal(32, 32, seed=4)
    X = (U * torch.logspace(0, 1.5, 32, dtype=torch.float64)) @ V.mT
    found = torch.linalg.svdvals(newton_schulz(X.float(), dtype=dtype))
    assert float(found.min()) > 0.6 and float(found.max()) < 1.3
    grid = torch.linspace(0.01, 0.7, 1000, dtype=torch.float64)
    two = quintic(torch.stack([grid, (1 - grid.square()).sqrt()], -1))
    assert float(two.min()) > 0.6 and float(two.max()) < 1.3


@pytest.mark.check("a", "muon")
@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (20, 8)])
def test_wide_products_round_where_narrow_ones_do(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every sum has one term its order cannot matter: X with one number in a row and a column is the recursion of each number, rounded to 16
    bits after every product, to the last bit. Leaving out a rounding shows."""
    monkeypatch.setattr(orthogonal, "multiplies_sixteen_bit", lambda _: False)
    a, b, c = QUINTIC
    g = torch.Generator().manual_seed(0)
    k = min(shape)
    rows, columns = torch.randperm(shape[0], generator=g)[:k], torch.randperm(shape[1], generator=g)[:k]
    X = torch.zeros(shape)
    X[rows, columns] = torch.randn(k, generator=g)
    narrow = X.bfloat16()
    narrow = narrow / torch.linalg.vector_norm(narrow)

    def recursion(inner: torch.dtype) -> Tensor:
        y = narrow[rows, columns].double()
        for _ in range(5):
            A = (y * y).bfloat16().double()
            y = (a * y + (b * A + c * A * A).to(inner).double() * y).bfloat16().double()
        return y

    found = newton_schulz(X, dtype=torch.bfloat16)
    assert torch.equal(found[rows, columns].double(), recursion(torch.bfloat16)) and int(found.count_nonzero()) == k
    assert not torch.equal(recursion(torch.float32), recursion(torch.bfloat16))


@pytest.mark.check("a", "muon")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_sees_no_scale(shape: tuple[int, int], dtype: torch.dtype | None) -> None:
    """Powers of two to the last bit, any other to rounding; zeros stay zeros, and the transpose has the transposed."""
    X = random(*shape).float()
    once = newton_schulz(X, dtype=dtype)
    assert torch.equal(newton_schulz(2.0**10 * X, dtype=dtype), once) and torch.equal(newton_schulz(2.0**-10 * X, dtype=dtype), once)
    torch.testing.assert_close(newton_schulz(-random(*shape) / 3), -newton_schulz(random(*shape)), rtol=0, atol=1e-12)
    torch.testing.assert_close(newton_schulz(random(*shape).mT), newton_schulz(random(*shape)).mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(newton_schulz(random(2, *shape))[1], newton_schulz(random(2, *shape)[1]), rtol=0, atol=1e-12)
    assert not newton_schulz(torch.zeros(shape), dtype=dtype).any()


@pytest.mark.check("a", "muon")
@pytest.mark.check("c", "muon")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adjust, weight_decay", [("original", 0.0), ("original", 0.3), ("match_rms_adamw", 0.1)])
def test_muon_is_torchs(shape: tuple[int, int], nesterov: bool, adjust: str, weight_decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The live one, with the same products in bfloat16."""
    monkeypatch.setattr(orthogonal, "multiplies_sixteen_bit", lambda _: True)
    mine, theirs = matrices([shape], torch.float32), matrices([shape], torch.float32)
    options: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "nesterov": nesterov, "weight_decay": weight_decay}
    peer = torch.optim.Muon(theirs, adjust_lr_fn=adjust, **options)
    a, b = run(Muon(mine, adjust=adjust, **options), mine, 12)[0], run(peer, theirs, 12)[0]
    assert float((a - b).norm() / b.norm()) <= 1e-6
    assert float((a - matrices([shape], torch.float32)[0].detach()).norm() / b.norm()) > 0.01


@pytest.mark.check("a", "muon")
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_knows_nothing_of_the_size_of_gradients(nesterov: bool) -> None:
    (p,), (q,) = matrices([(24, 40)], torch.float32), matrices([(24, 40)], torch.float32)
    first, second = (Muon([x], lr=0.02, nesterov=nesterov) for x in (p, q))
    for G in gradients((24, 40), 6, torch.float32):
        p.grad, q.grad = G, 2.0**-12 * G
        first.step()
        second.step()
    assert torch.equal(p, q)


# momentum that keeps what was not passed on


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mu", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(
    "method, side",
    [
        pytest.param(Trion, "smaller", marks=pytest.mark.check("a", "trion")),
        pytest.param(Dion, "larger", marks=pytest.mark.check("a", "dion")),
    ],
)
def test_momentum_loses_a_share_of_what_is_passed_on(method: Any, side: str, mu: float, shape: tuple[int, int]) -> None:
    """A = M + G is what the frame sees, and M ← A − (1−μ)·lift(B) what stays; with μ = 1 the sum of all gradients."""
    (p,) = matrices([shape])
    optimizer = method([p], lr=0.01, rank=4, mu=mu)
    seen, M, total = watched(optimizer), torch.zeros(()).double(), torch.zeros(()).double()
    for G in gradients(shape, 6):
        p.grad, total = G, total + oriented(G, side)
        optimizer.step()
        A, frame = M + oriented(G, side), seen[-1].frame
        assert torch.equal(seen[-1].G, A)
        M = optimizer.state[p]["momentum"].clone()
        V = frame.V if isinstance(frame, Dense) else dct_matrix(min(shape), torch.float64, CPU)[:, optimizer.state[p]["J"]]
        torch.testing.assert_close(M, A - (1 - mu) * A @ V @ V.mT, rtol=0, atol=1e-12)
        if mu == 1:
            assert torch.equal(M, total)


@pytest.mark.check("a", "trion")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adjust", ["original", "spectral"])
def test_trion_of_full_rank_is_muon(shape: tuple[int, int], adjust: str) -> None:
    """NS(AC)Cᵀ = NS(A), and M = μA makes A heavy-ball momentum, which is Muon's but for a size that NS does not see."""
    mine, theirs = matrices([shape]), matrices([shape])
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "adjust": adjust, "precision": "full"}
    first = Trion(mine, rank=min(shape), mu=0.9, **options)
    second = Muon(theirs, momentum=0.9, nesterov=False, **options)
    torch.testing.assert_close(run(first, mine, 8)[0], run(second, theirs, 8)[0], rtol=0, atol=1e-10)


@pytest.mark.check("a", "dion")
@pytest.mark.parametrize("shape", SHAPES)
def test_dions_factors_are_orthonormal_and_of_unit_columns(shape: tuple[int, int]) -> None:
    """The update −η·f·PQᵀ has norm η·f·√r."""
    (p,) = matrices([shape])
    optimizer = Dion([p], lr=0.01, rank=4, eps=0.0)
    seen = watched(optimizer)
    for G in gradients(shape, 6):
        before, p.grad = p.detach().clone(), G
        optimizer.step()
        P: Any = seen[-1].frame
        Q = optimizer.state[p]["Q"]
        torch.testing.assert_close(P.V.mT @ P.V, torch.eye(4).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(Q.norm(dim=0), torch.ones(4).double(), rtol=0, atol=1e-12)
        step = (p.detach() - before) / (-0.01 * (shape[0] / shape[1]) ** 0.5)
        torch.testing.assert_close(oriented(step, "larger"), Q @ P.V.mT, rtol=0, atol=1e-11)
        assert float(step.norm()) == pytest.approx(2.0, abs=1e-10)


@pytest.mark.check("a", "dion")
@pytest.mark.parametrize("shape", SHAPES)
def test_a_momentum_of_rank_r_is_passed_on_whole(shape: tuple[int, int]) -> None:
    """PRᵀ = A whatever Q was, so that M = μA."""
    (p,) = matrices([shape])
    optimizer = Dion([p], lr=0.01, rank=3, mu=0.9)
    U, A = orthonormal(shape[0], 3), torch.zeros(())
    for t in range(5):
        p.grad = U @ random(3, 3, seed=t) @ orthonormal(shape[1], 3, seed=4).mT
        A = 0.9 * A + p.grad
        optimizer.step()
        torch.testing.assert_close(optimizer.state[p]["momentum"], 0.9 * oriented(A, "larger"), rtol=0, atol=1e-12)


# MoFaSGD


def factors(m: int, n: int, r: int) -> Factors:
    return Factors(orthonormal(m, r), orthonormal(n, r, seed=4), torch.linspace(3, 1, r, dtype=torch.float64))


def dense(given: Factors) -> Tensor:
    return (given.U * given.sigma) @ given.V.mT


@pytest.mark.check("a", "mofasgd")
@pytest.mark.parametrize("m, n, r", [(12, 9, 2), (9, 12, 4), (6, 8, 5), (7, 7, 7), (8, 5, 1)])
def test_the_followed_factors_are_the_best_of_their_rank(m: int, n: int, r: int) -> None:
    """Of β·UΣVᵀ + Ĝ, whose dense decomposition is cut; all of it where r is full. 2r may be more than either side."""
    old, G = factors(m, n, r), random(m, n, seed=6)
    new = followed(old, G, 0.8)
    left, right = old.U @ old.U.mT, old.V @ old.V.mT
    tangent = left @ G + G @ right - left @ G @ right
    U, s, Vh = torch.linalg.svd(0.8 * dense(old) + tangent, full_matrices=False)
    torch.testing.assert_close(dense(new), (U[:, :r] * s[:r]) @ Vh[:r], rtol=0, atol=1e-10)
    torch.testing.assert_close(new.sigma, s[:r], rtol=0, atol=1e-12)
    for X in (new.U, new.V):
        torch.testing.assert_close(X.mT @ X, torch.eye(r).double(), rtol=0, atol=1e-12)
    if r == min(m, n):
        torch.testing.assert_close(dense(new), 0.8 * dense(old) + G, rtol=0, atol=1e-10)


@pytest.mark.check("a", "mofasgd")
def test_what_passes_is_an_orthogonal_projection_of_the_gradient() -> None:
    """Onto the matrices that share a side with the factors that met it."""
    old = factors(9, 7, 2)
    G, X = random(9, 7, seed=6), random(9, 7, seed=7)
    frame = Factors(old.U, old.V, old.sigma, old)
    torch.testing.assert_close(frame.passes(frame.passes(G)), frame.passes(G), rtol=0, atol=1e-12)
    torch.testing.assert_close((frame.passes(G) * X).sum(), (G * frame.passes(X)).sum(), rtol=0, atol=1e-12)
    for inside in (old.U @ random(2, 7), random(9, 2) @ old.V.mT):
        torch.testing.assert_close(frame.passes(inside), inside, rtol=0, atol=1e-12)


@pytest.mark.check("a", "mofasgd")
@pytest.mark.parametrize("shape", SHAPES)
def test_mofasgd_of_full_rank_steps_along_the_polar_factor_of_the_momentum(shape: tuple[int, int]) -> None:
    (p,) = matrices([shape])
    optimizer = MoFaSGD([p], lr=0.01, rank=min(shape), beta=0.8, weight_decay=0.1)
    W, M = p.detach().clone(), torch.zeros(()).double()
    for G in gradients(shape, 6):
        p.grad = G
        optimizer.step()
        M = 0.8 * M + G
        U, _, Vh = torch.linalg.svd(M, full_matrices=False)
        W = (1 - 0.01 * 0.1) * W - 0.01 * U @ Vh
        torch.testing.assert_close(p.detach(), W, rtol=0, atol=1e-10)


@pytest.mark.check("a", "mofasgd")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mofasgd_makes_no_step_along_rounding_errors(dtype: torch.dtype) -> None:
    """A gradient of rank one at r = 8: the step is ηuvᵀ, of length η, at every step; singular values that are rounding would each add as much."""
    g = torch.Generator().manual_seed(0)
    u, v = torch.randn(40, 1, generator=g, dtype=dtype), torch.randn(1, 60, generator=g, dtype=dtype)
    p = torch.nn.Parameter(torch.zeros(40, 60, dtype=dtype))
    optimizer = MoFaSGD([p], lr=1.0, rank=8)
    for _ in range(5):
        before = p.detach().clone()
        p.grad = 30 * u @ v
        optimizer.step()
        torch.testing.assert_close(before - p.detach(), u @ v / (u.norm() * v.norm()), rtol=0, atol=1e-5)
