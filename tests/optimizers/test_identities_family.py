"""(a) The rest of the family, what is true of every step: full rank is AdamW, learned bases, rows with lengths, and blocks of columns.

Beside it: ``drawn`` (Grass, RSO, GUM), ``orthogonal`` (cosines, Muon, Trion, Dion, MoFaSGD), ``layers`` (LISA, OwLore, BAdam), test_quantized.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optimizers import COAP, FOAM, RSO, DCTAdamW, GaLore, GradNormLoRP, Grass, GrassSampled, OnlineSubspaceDescent, QGaLore, Subspace
from optimizers.bases import top_right_singular
from optimizers.foam import Folded
from optimizers.frames import Dense, Frame, ScaledColumns, dct_matrix
from optimizers.learned import correlation_gradient, online_gradient, sketched_directions
from optimizers.outputs import Context
from optimizers.q_galore import FourBit
from optimizers.quantized import pack, quantize
from tests.optimizers.test_identities import SHAPES, gradients, matrices, run
from tests.optimizers.transcriptions_family import Adam


def watched(optimizer: Subspace) -> list[Context]:
    """What the optimizer will have done, a step an entry."""
    seen: list[Context] = []
    optimizer.watch = lambda _, context: seen.append(context)
    return seen


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(n: int, r: int, seed: int = 3) -> Tensor:
    return torch.linalg.qr(random(n, r, seed=seed))[0]


def eye(n: int, dtype: torch.dtype) -> Frame:
    return Dense(torch.eye(n, dtype=dtype))


def every_column(n: int, dtype: torch.dtype) -> Frame:
    return ScaledColumns(torch.arange(n), torch.ones(n, dtype=dtype))


def coded_eye(n: int, dtype: torch.dtype) -> Frame:
    codes, scale, zero = quantize(torch.eye(n, dtype=dtype), 4)
    return FourBit(pack(codes), scale, zero, 1000, torch.zeros(0))


IDENTITY: list[Any] = [
    pytest.param(QGaLore, coded_eye, {"states": "float"}, id="q_galore", marks=pytest.mark.check("a", "q_galore")),
    pytest.param(COAP, eye, {}, id="coap", marks=pytest.mark.check("a", "coap")),
    pytest.param(OnlineSubspaceDescent, eye, {}, id="online_subspace", marks=pytest.mark.check("a", "online_subspace")),
    pytest.param(Grass, every_column, {}, id="grass", marks=pytest.mark.check("a", "grass")),
    pytest.param(GrassSampled, every_column, {}, id="grass_sampled", marks=pytest.mark.check("a", "grass_sampled")),
    pytest.param(RSO, eye, {"pull": 0.0}, id="rso", marks=pytest.mark.check("a", "rso")),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method, frame, options", IDENTITY)
def test_full_rank_in_the_identity_basis_is_adamw_to_the_last_bit(
    method: Any, frame: Any, options: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Of Online Subspace Descent as it stands: at V = I nothing is lost, and V has nowhere to go."""
    mine, theirs = matrices([shape], dtype), matrices([shape], dtype)
    optimizer = method(mine, lr=3e-3, rank=min(shape), every=1000, scale=1.0, weight_decay=0.1, betas=(0.9, 0.98), **options)
    optimizer.inject = lambda *_: frame(min(shape), dtype)
    peer = torch.optim.AdamW(theirs, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), foreach=False)
    assert torch.equal(run(optimizer, mine, 30)[0], run(peer, theirs, 30)[0])


@pytest.mark.check("a", "dct_adamw")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("every", [1, 4])
def test_dct_adamw_of_full_rank_is_adamw_of_the_rotated_matrix(shape: tuple[int, int], every: int) -> None:
    (p,), C = matrices([shape]), dct_matrix(min(shape), torch.float64, torch.device("cpu"))
    turn = (lambda X: C.mT @ X) if shape[0] < shape[1] else (lambda X: X @ C)
    q = nn.Parameter(turn(p.detach()))
    mine = DCTAdamW([p], lr=3e-3, rank=min(shape), every=every, weight_decay=0.1)
    theirs = torch.optim.AdamW([q], lr=3e-3, weight_decay=0.1)
    for G in gradients(shape, 10):
        p.grad, q.grad = G, turn(G)
        mine.step()
        theirs.step()
        torch.testing.assert_close(turn(p.detach()), q.detach(), rtol=0, atol=1e-12)


# COAP


@pytest.mark.check("a", "coap")
@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize("with_moment", [False, True])
def test_coaps_gradient_is_the_slope_of_its_loss(dim: int, with_moment: bool) -> None:
    """By central differences in every entry, at a G so small that nothing is cut."""
    G, V, M = 0.1 * random(7, 5), random(5, 2, seed=4), random(7, 2, seed=5)

    def loss(V: Tensor) -> Tensor:
        L = M @ V.mT
        cosines = (L * G).sum(dim) / (L.norm(dim=dim) * G.norm(dim=dim))
        return (G @ V @ V.mT - G).square().mean() * (1 - (cosines.mean() if with_moment else 0))

    h = 1e-6
    slope = torch.stack(
        [(loss(V + h * E.view_as(V)) - loss(V - h * E.view_as(V))) / (2 * h) for E in torch.eye(V.numel(), dtype=V.dtype)]
    ).view_as(V)
    assert float(slope.norm()) < 1
    torch.testing.assert_close(correlation_gradient(G, V, M if with_moment else None, dim), slope, rtol=1e-6, atol=1e-9)
    large, small = correlation_gradient(100 * G, V, None, dim), correlation_gradient(G, V, None, dim)
    assert float(large.norm()) == pytest.approx(1, abs=1e-5) and float(large.norm()) <= 1
    torch.testing.assert_close(large / large.norm(), small / small.norm(), rtol=1e-9, atol=1e-12)


@pytest.mark.check("a", "coap")
def test_coaps_sketch_of_a_matrix_of_rank_r_is_exact() -> None:
    """From any start; two matrices at once as one after the other."""
    G = random(2, 20, 3) @ random(2, 3, 9, seed=4)
    found = sketched_directions(G, random(2, 9, 3, seed=5))
    torch.testing.assert_close(found, top_right_singular(G, 3), rtol=0, atol=1e-10)
    torch.testing.assert_close(sketched_directions(G[1], random(2, 9, 3, seed=5)[1]), found[1], rtol=0, atol=1e-12)


@pytest.mark.check("a", "coap")
def test_coaps_projector_is_orthonormal_after_sketches_and_goes_short_ways_between_them() -> None:
    (p,) = matrices([(24, 40)])
    optimizer = COAP([p], rank=4, every=2, recalibrate=3, basis_lr=0.05)
    V = torch.zeros(0)
    for t, G in enumerate(gradients((24, 40), 14)):
        old, p.grad = V, G
        optimizer.step()
        V = optimizer.state[p]["V"].clone()
        if t % 6 == 0:
            torch.testing.assert_close(V.mT @ V, torch.eye(4).double(), rtol=0, atol=1e-12)
        elif t % 2 == 0:
            assert 0 < float((V - old).norm()) <= 0.05
        else:
            assert torch.equal(V, old)


# Online Subspace Descent


@pytest.mark.check("a", "online_subspace")
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_the_online_gradient_is_autograds(penalty: float) -> None:
    G, V = random(2, 12, 7), random(2, 7, 3, seed=4).requires_grad_()
    unit = G / torch.linalg.matrix_norm(G, keepdim=True)
    loss = (unit @ V @ V.mT - unit).square().sum() + penalty * (V.mT @ V - torch.eye(3).double()).square().sum()
    (expected,) = torch.autograd.grad(loss, V)
    torch.testing.assert_close(online_gradient(G, G @ V.detach(), V.detach(), penalty), expected, rtol=0, atol=1e-10)


@pytest.mark.check("a", "online_subspace")
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_singular_directions_are_where_the_online_gradient_vanishes(penalty: float) -> None:
    """The leading ones, in any rotation; other orthonormal ones are not."""
    G = random(12, 7)
    V = top_right_singular(G, 3) @ orthonormal(3, 3)
    assert float(online_gradient(G, G @ V, V, penalty).abs().max()) < 1e-14
    assert float(online_gradient(G, G @ orthonormal(7, 3), orthonormal(7, 3), penalty).abs().max()) > 1e-2


@pytest.mark.check("a", "online_subspace")
@pytest.mark.parametrize("shape", SHAPES)
def test_online_subspace_descent_of_gradients_in_one_subspace_is_galore(shape: tuple[int, int]) -> None:
    """V loses nothing of them from the start, so that it stays. By "sgd": Adam takes steps of full length along a rounding error."""
    results, tall = [], shape[0] >= shape[1]
    Q = orthonormal(min(shape), 4)
    shared: dict[str, Any] = {"lr": 0.01, "rank": 4, "weight_decay": 0.1, "every": 1000}
    for method in (OnlineSubspaceDescent, GaLore):
        (p,) = matrices([shape])
        optimizer = method([p], **shared, **method.takes(basis="sgd" if method is OnlineSubspaceDescent else "exact"))
        for G in gradients((max(shape), 4), 12):
            p.grad = G @ Q.mT if tall else Q @ G.mT
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


# GradNormLoRP


@pytest.mark.check("a", "grad_norm_lorp")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_rows_are_as_long_as_adam_makes_them(shape: tuple[int, int], weight_decay: float) -> None:
    """(1 − ηλ)(g − η·Adam(radial)), whatever the directions do; what the frame sees is orthogonal to every row."""
    (p,), adam = matrices([shape]), Adam(0.9, 0.98, 1e-8)
    optimizer = GradNormLoRP([p], lr=0.02, rank=4, every=3, betas=(0.9, 0.98), weight_decay=weight_decay)
    seen = watched(optimizer)
    for G in gradients(shape, 8):
        W, p.grad = p.detach().clone(), G
        length = W.norm(dim=1)
        radial = (G * W).sum(1) / length
        optimizer.step()
        expected = (1 - 0.02 * weight_decay) * (length.numpy() - 0.02 * adam(radial.numpy()))
        np.testing.assert_allclose(p.detach().norm(dim=1).numpy(), expected, rtol=1e-12, atol=0)
        tangent = seen[-1].G if shape[0] >= shape[1] else seen[-1].G.mT
        assert float((tangent * W).sum(1).abs().max()) < 1e-12
        torch.testing.assert_close(tangent + (radial / length)[:, None] * W, G, rtol=0, atol=1e-12)


@pytest.mark.check("a", "grad_norm_lorp")
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_along_the_rows_change_no_direction(shape: tuple[int, int]) -> None:
    (p,) = matrices([shape])
    before = p.detach().clone()
    optimizer = GradNormLoRP([p], lr=0.02, rank=4, eps=1e-3)  # the frame sees rounding errors, which Adam would enlarge
    for size in (0.5, -0.2, 1.0):
        p.grad = size * p.detach()
        optimizer.step()
    directions = [X / X.norm(dim=1, keepdim=True) for X in (before, p.detach())]
    torch.testing.assert_close(*directions, rtol=0, atol=1e-12)
    assert float((p.detach().norm(dim=1) - before.norm(dim=1)).abs().min()) > 0.01


# FOAM


@pytest.mark.check("a", "foam")
@pytest.mark.parametrize("shape", SHAPES)
def test_foam_without_blocks_is_adam_with_the_correction_in_the_step(shape: tuple[int, int]) -> None:
    (p,), (q,) = matrices([shape]), matrices([shape])
    foam = FOAM([p], lr=0.01, level=0, scale=0.7, betas=(0.9, 0.98), eps=1e-3)
    peer = GaLore([q], lr=0.01, rank=min(shape), scale=0.7, every=1000, betas=(0.9, 0.98), eps=1e-3, variant="reference-code")
    peer.inject = lambda *_: eye(min(shape), torch.float64)
    torch.testing.assert_close(run(foam, [p], 20)[0], run(peer, [q], 20)[0], rtol=0, atol=1e-14)


@pytest.mark.check("a", "foam")
@pytest.mark.parametrize("level, columns", [(1, 8), (2, 10), (2, 9), (3, 5), (0, 3)])
def test_averages_are_those_of_the_columns_that_are_there(level: int, columns: int) -> None:
    """The last block of a row may be short; averages and what deviates from them are the gradient, all of which passes."""
    frame, G = Folded(level), random(2, 4, columns)
    starts = range(0, columns, 2**level)
    expected = torch.stack([G[..., start : start + 2**level].mean(-1) for start in starts], -1)
    torch.testing.assert_close(frame.sketch(G), expected, rtol=0, atol=1e-15)
    lifted = frame.lift(frame.sketch(G), G)
    assert lifted.shape == G.shape
    torch.testing.assert_close(frame.sketch(lifted), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close((lifted * (G - lifted)).sum(), torch.zeros(()).double(), rtol=0, atol=1e-12)
    assert frame.passes(G) is G


@pytest.mark.check("a", "foam")
def test_foam_of_gradients_that_are_equal_in_blocks_is_adam_of_one_of_them() -> None:
    """The last block is short, and the same all the same; a permutation within blocks permutes the steps."""
    (p,), (q,), (s,) = matrices([(6, 10)]), matrices([(6, 10)]), matrices([(6, 10)])
    peer = torch.optim.AdamW([q], lr=0.01, betas=(0.9, 0.98), eps=0.0, weight_decay=0.1)
    order = torch.tensor([2, 0, 1, 3, 7, 6, 5, 4, 9, 8])
    s.data = s.data[:, order].clone()
    first, second = (FOAM([x], lr=0.01, level=2, scale=1.0, betas=(0.9, 0.98), eps=0.0, weight_decay=0.1) for x in (p, s))
    for t, G in enumerate(gradients((6, 10), 8)):
        if t < 4:
            p.grad = q.grad = Folded(2).lift(Folded(2).sketch(G), G)
            first.step()
            peer.step()
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-12)
            s.grad = p.grad[:, order]
        else:
            p.grad, s.grad = G, G[:, order]
            first.step()
        second.step()
    torch.testing.assert_close(p.detach()[:, order], s.detach(), rtol=0, atol=1e-12)


@pytest.mark.check("a", "online_subspace")
def test_v_keeps_what_it_has_found_at_the_default_rate_and_not_at_ten_times_that() -> None:
    """A wide matrix whose gradients keep to 16 directions, at r = 16: V of the first gradient holds all of each, and must go on holding it."""
    g = torch.Generator().manual_seed(0)
    signal = torch.randn(16, 512, generator=g)
    gradients = [torch.randn(512, 16, generator=g) @ signal for _ in range(10)]

    def held(**options: Any) -> float:
        p = torch.nn.Parameter(torch.zeros(512, 512))
        optimizer = OnlineSubspaceDescent([p], rank=16, **options)
        for G in gradients:
            p.grad = G
            optimizer.step()
        Q = torch.linalg.qr(optimizer.state[p]["V"])[0]
        return float((gradients[-1] @ Q).square().sum() / gradients[-1].square().sum())

    assert held() > 0.99 and held(basis_lr=5.0) < 0.9
