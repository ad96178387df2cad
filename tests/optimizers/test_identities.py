"""(a) What is true of every step: full rank is AdamW to the last bit, batches are loops, and how α, the refresh and the transports act."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from optimizers import OPTIMIZERS, Fira, Frugal, GaLore, GoLore, Plumage, SpectralAdam, Subspace
from optimizers.frames import Balanced, Columns, Dense, Everything
from optimizers.inner import Adam
from optimizers.transports import ReprojectBoth, ReprojectFirst, Reset

SHAPES = [(24, 40), (40, 24), (32, 32)]


def gradients(shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    U, V = (torch.randn(*size, generator=generator, dtype=dtype) for size in ((shape[0], 6), (6, shape[-1])))
    noise = torch.randn(steps, *shape, generator=generator, dtype=dtype)
    return U @ V / 4 + 0.3 * noise


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int) -> list[torch.Tensor]:
    given = [gradients(tuple(p.shape), steps, p.dtype) for p in parameters]
    for t in range(steps):
        for i, (p, G) in enumerate(zip(parameters, given, strict=True)):
            p.grad = G[t] * (1 + i)
        optimizer.step()
    return [p.detach().clone() for p in parameters]


def matrices(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


IDENTITY: list[Any] = [
    pytest.param(GaLore, {"scale": 1.0}, id="galore", marks=pytest.mark.check("a", "galore")),
    pytest.param(GoLore, {"scale": 1.0}, id="golore", marks=pytest.mark.check("a", "golore")),
    pytest.param(Fira, {"scale": 1.0}, id="fira", marks=pytest.mark.check("a", "fira")),
    pytest.param(Frugal, {"part": "random"}, id="frugal", marks=pytest.mark.check("a", "frugal")),
    pytest.param(Plumage, {"scale": 1.0}, id="plumage", marks=pytest.mark.check("a", "plumage")),
    pytest.param(SpectralAdam, {"scale": 1.0}, id="spectral_adam", marks=pytest.mark.check("a", "spectral_adam")),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method, options", IDENTITY)
def test_full_rank_in_the_identity_basis_is_adamw_to_the_last_bit(
    method: type[Subspace], options: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    n = min(shape)
    mine, theirs = matrices([shape], dtype), matrices([shape], dtype)
    optimizer: Any = method(mine, lr=3e-3, rank=n, every=1000, weight_decay=0.1, betas=(0.9, 0.98), **options)
    weighted = method in (Plumage, SpectralAdam)
    eye = torch.eye(n, dtype=dtype)
    optimizer.inject = lambda *_: Balanced(eye, torch.ones(n, dtype=dtype)) if weighted else Dense(eye)
    peer = torch.optim.AdamW(theirs, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), foreach=False)
    assert torch.equal(run(optimizer, mine, 30)[0], run(peer, theirs, 30)[0])


@pytest.mark.check("a", "ldadam")
@pytest.mark.parametrize("shape", SHAPES)
def test_ldadam_of_full_rank_in_the_identity_basis_is_adamw(shape: tuple[int, int]) -> None:
    """To rounding: it carries its second moment through (N̂ − M̂²) + M̂² at every step."""
    n = min(shape)
    mine, theirs = matrices([shape]), matrices([shape])
    optimizer = OPTIMIZERS["ldadam"](mine, lr=3e-3, rank=n, betas=(0.9, 0.98), weight_decay=0.1)  # pyright: ignore[reportCallIssue]
    optimizer.inject = lambda *_: Dense(torch.eye(n, dtype=torch.float64))
    peer = torch.optim.AdamW(theirs, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98), foreach=False)
    torch.testing.assert_close(run(optimizer, mine, 30)[0], run(peer, theirs, 30)[0], rtol=0, atol=1e-11)


@pytest.mark.check("a", "flora")
@pytest.mark.parametrize("shape", SHAPES)
def test_flora_of_full_rank_in_the_identity_basis_is_momentum(shape: tuple[int, int]) -> None:
    n = min(shape)
    mine = matrices([shape])
    start, M = mine[0].detach().clone(), torch.zeros(shape, dtype=torch.float64)
    optimizer = OPTIMIZERS["flora"](mine, lr=0.1, rank=n, beta=0.8)  # pyright: ignore[reportCallIssue]
    optimizer.inject = lambda *_: Dense(torch.eye(n, dtype=torch.float64))
    result = run(optimizer, mine, 10)[0]
    for G in gradients(shape, 10):
        M = 0.8 * M + 0.2 * G
        start = start - 0.1 * M
    torch.testing.assert_close(result, start, rtol=0, atol=1e-12)


@pytest.mark.check("a", "apollo")
@pytest.mark.check("a", "apollo_mini")
@pytest.mark.parametrize("method", ["apollo", "apollo_mini"])
@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_moves_along_the_gradient(method: str, shape: tuple[int, int]) -> None:
    """Every row of the larger dimension moves along its own gradient; with one factor a matrix, all by the same."""
    (p,) = matrices([shape])
    before, G = p.detach().clone(), gradients(shape, 1)[0]
    optimizer = OPTIMIZERS[method]([p], lr=0.1, **({"rank": 4} if method == "apollo" else {}))
    run(optimizer, [p], 1)
    ratio = (before - p.detach()) / G
    ratio = ratio if shape[0] >= shape[1] else ratio.mT
    assert bool((ratio > 0).all())
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-9, atol=0)
    V = optimizer.state[p]["V"]
    R = (G if shape[0] >= shape[1] else G.mT) @ V  # at the first step Adam's direction is the sign of R, but for ε
    length = V.shape[1] ** 0.5 / R.norm(dim=1, keepdim=True) if method == "apollo" else 128**0.5 * R.numel() ** 0.5 / R.norm()
    torch.testing.assert_close(ratio, (0.1 * length).expand_as(ratio), rtol=1e-5, atol=0)
    if method == "apollo_mini":
        torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_a_group_without_rank_is_adamw_to_the_last_bit(method: str) -> None:
    mine, theirs = matrices([(24, 40), (7,), ()], torch.float32), matrices([(24, 40), (7,), ()], torch.float32)
    options: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.9, 0.98), "eps": 1e-7}
    optimizer = OPTIMIZERS[method]([{"params": mine, "rank": None, **options}], lr=1.0)
    peer = torch.optim.AdamW(theirs, **options, foreach=False)
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        optimizer.step()
        peer.step()
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_a_batch_of_equal_shapes_is_the_loop_over_them(method: str) -> None:
    shapes: list[tuple[int, ...]] = [(24, 40), (24, 40), (40, 24), (24, 40), (16, 16), (16, 16)]
    results = []
    for foreach in (True, False):
        parameters = matrices(shapes)
        kind = OPTIMIZERS[method]
        options = kind.takes(every=3, rank=0.25 if method == "frugal" else 4, precision="full", freeze=False)
        optimizer = kind(parameters, lr=0.01, foreach=foreach, weight_decay=0.1, **options)
        results.append(run(optimizer, parameters, 8))
        assert {len(state) for state in optimizer.state.values()} != {0}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "method", [name for name in OPTIMIZERS if name not in ("frugal", "foam", "grad_norm_lorp", "gradlite")]
)  # these know rows from columns
def test_a_transposed_matrix_takes_the_transposed_step(method: str) -> None:
    (p,), (q,) = matrices([(24, 40)]), matrices([(24, 40)])
    q = nn.Parameter(q.detach().mT.contiguous())
    options = OPTIMIZERS[method].takes(rank=4, precision="full", adjust="none", freeze=False)
    first, second = OPTIMIZERS[method]([p], lr=0.01, **options), OPTIMIZERS[method]([q], lr=0.01, **options)
    for G in gradients((24, 40), 5):
        p.grad, q.grad = G, G.mT.contiguous()
        first.step()
        second.step()
    torch.testing.assert_close(p.detach(), q.detach().mT, rtol=0, atol=1e-9)


@pytest.mark.check("a", "galore")
def test_alpha_multiplies_the_lifted_step_and_nothing_else() -> None:
    moved = []
    for alpha in (0.25, 1.0):
        (p,) = matrices([(24, 40)])
        before = p.detach().clone()
        run(GaLore([p], rank=4, scale=alpha, lr=0.01), [p], 6)
        moved.append(p.detach() - before)
    torch.testing.assert_close(4 * moved[0], moved[1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("every", [1, 3, 100])
def test_the_frame_changes_every_t_steps_and_state_follows_the_transport(every: int) -> None:
    (p,) = matrices([(24, 40)])
    kept, reset = GaLore([p], rank=4, every=every), Frugal([p], rank=4, part="svd", every=every)
    for optimizer in (kept, reset):
        seen = []
        for G in gradients((24, 40), 9):
            p.grad = G
            optimizer.step()
            seen.append((optimizer.state[p]["V"].clone(), optimizer.state[p]["step"]))
        changed = [t for t in range(1, 9) if not torch.equal(seen[t][0], seen[t - 1][0])]
        assert changed == [t for t in range(1, 9) if t % every == 0]
        counts = [count for _, count in seen]
        assert counts == [t + 1 if optimizer is kept else t % every + 1 for t in range(9)]


def carried(transport: Any, old: Any, new: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    M = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    before = {"step": 50, "draws": 1, "exp_avg": 0.1 * M, "exp_avg_sq": 0.02 * M.square() + 0.01}
    after = dict(before)
    transport.carry(Adam(), after, old, new)
    return before, after


def test_transports() -> None:
    generator = torch.Generator().manual_seed(4)
    Q = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0]
    R = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    V = Q[:, :4]
    for transport in (ReprojectFirst(), ReprojectBoth(), ReprojectBoth(filled=True)):  # the same frame: nothing changes
        before, after = carried(transport, Dense(V), Dense(V))
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(after[key], before[key], rtol=1e-10, atol=1e-12)
        before, after = carried(transport, Dense(V), Dense(V @ R))  # rotated: the lifted momentum does not change
        torch.testing.assert_close(after["exp_avg"] @ (V @ R).mT, before["exp_avg"] @ V.mT, rtol=0, atol=1e-12)
    _, after = carried(ReprojectBoth(), Dense(V), Dense(Q[:, 4:8]))  # directions never seen
    assert float(after["exp_avg"].abs().max()) < 1e-12 and float(after["exp_avg_sq"].abs().max()) < 1e-12
    before, after = carried(ReprojectBoth(filled=True), Dense(V), Dense(Q[:, 4:8]))
    torch.testing.assert_close(after["exp_avg_sq"], before["exp_avg_sq"].mean(1, keepdim=True).expand(10, 4), rtol=1e-9, atol=1e-12)
    _, after = carried(Reset(), Dense(V), Dense(V))
    assert after == {"step": 0, "draws": 1}
    J = torch.tensor([3, 1, 7, 5])
    before, after = carried(ReprojectFirst(), Columns(J), Columns(torch.tensor([7, 2, 3, 9])))
    expected = torch.stack([before["exp_avg"][:, 2], torch.zeros(10), before["exp_avg"][:, 0], torch.zeros(10)], 1)
    torch.testing.assert_close(after["exp_avg"], expected.double())
    with pytest.raises(ValueError, match="Everything: state cannot be re-projected"):
        carried(ReprojectFirst(), Everything(), Everything())


def test_second_moments_of_rotated_numbers() -> None:
    """N ← (N − M²)(R∘R) + (MR)² is the exact mean square of xR for independent entries x of mean M and mean square N."""
    generator = torch.Generator().manual_seed(6)
    V = torch.linalg.qr(torch.randn(9, 3, generator=generator, dtype=torch.float64))[0]
    new = torch.linalg.qr(torch.randn(9, 3, generator=generator, dtype=torch.float64))[0]
    M, spread = torch.randn(1, 3, generator=generator, dtype=torch.float64), torch.rand(1, 3, generator=generator, dtype=torch.float64)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)  # every x = M ± spread, equally likely
    exact = ((M + signs * spread) @ (V.mT @ new)).square().mean(0, keepdim=True)
    state: dict[str, Any] = {"step": 1, "draws": 1, "exp_avg": M.clone(), "exp_avg_sq": M.square() + spread.square()}
    ReprojectBoth().carry(Adam(correct_bias=False), state, Dense(V), Dense(new))
    torch.testing.assert_close(state["exp_avg_sq"], exact, rtol=1e-12, atol=1e-12)
