"""Protected directions: what earlier tasks read stays as it was, exactly; how the basis grows; and GORP on two layers with adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizers.gorp import GORP
from optimizers.protected import ProtectedAdamW, grown, off

EXACT = 1e-10
M_, N_, K_ = 6, 12, 4  # rows and columns of a weight, directions that the first task reads


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tasks() -> tuple[Tensor, Iterator[tuple[Tensor, Tensor]]]:
    """Inputs of the first task, (20, n) in a space of dimension K_, and batches of the second, whose inputs share some of it."""
    first = random(20, K_, seed=1) @ random(K_, N_, seed=2)
    return first, ((random(8, N_, seed=100 + i), random(8, M_, seed=200 + i)) for i in range(60))


def row_space(X: Tensor) -> Tensor:
    return grown(None, X, energy=1.0, most=0.9)


class Adapted(nn.Module):
    """(W + sBA)x, beside its plain form."""

    def __init__(self, lora_scale: float = 2.0, rank: int = 3) -> None:
        super().__init__()
        self.W, self.A, self.B = (nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(((M_, N_), (rank, N_), (M_, rank))))
        self.s = lora_scale

    def forward(self, X: Tensor) -> Tensor:
        return X @ self.W.mT + self.s * (X @ self.A.mT) @ self.B.mT

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": [getattr(self, part)], "part": {"W": "weight"}.get(part, part)} for part in ("W", "A", "B")]


def train(model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
    for X, Y in batches:
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        optimizer.step()


def test_a_protected_gradient_is_off_the_basis() -> None:
    G, P = random(3, M_, N_), row_space(random(5, N_))
    assert (off(G, P) @ P).abs().max() < EXACT and (off(off(G, P), P) - off(G, P)).abs().max() < EXACT
    assert (off(G, P) + G @ P @ P.mT - G).abs().max() < EXACT
    assert off(G, None) is G


def test_the_first_moment_of_a_layer_lies_in_the_row_space_of_its_inputs() -> None:
    """Why P can grow from moments: a gradient is ΔᵀX."""
    X = tasks()[0]
    moment = random(M_, 20) @ X
    P = grown(None, moment, energy=1.0, most=0.9)
    assert P.shape[1] == K_ and off(X, P).abs().max() < EXACT * X.abs().max()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_linear_rules_keep_the_outputs_of_the_first_task_where_the_gradient_is_projected(momentum: float) -> None:
    first, batches = tasks()
    W, P = nn.Parameter(random(M_, N_)), row_space(first)
    W.register_hook(lambda G: off(G, P))
    before, start = (first @ W.mT).detach().clone(), W.detach().clone()
    train(lambda X: X @ W.mT, torch.optim.SGD([W], lr=0.1, momentum=momentum), batches)
    assert (first @ W.mT - before).abs().max() < EXACT and (W - start).abs().max() > 0.1


def test_adam_on_the_entries_of_a_projected_gradient_does_not() -> None:
    """It divides entries by numbers of their own; the step has to be projected, too."""
    first, batches = tasks()
    W, P = nn.Parameter(random(M_, N_)), row_space(first)
    W.register_hook(lambda G: off(G, P))
    before = (first @ W.mT).detach().clone()
    train(lambda X: X @ W.mT, torch.optim.Adam([W], lr=0.01), batches)
    assert (first @ W.mT - before).abs().max() > 0.1


def test_adam_with_its_step_projected_keeps_the_outputs() -> None:
    first, batches = tasks()
    W = nn.Parameter(random(M_, N_))
    optimizer = ProtectedAdamW([W], lr=0.01)
    optimizer.protect(W, row_space(first))
    before, start = (first @ W.mT).detach().clone(), W.detach().clone()
    train(lambda X: X @ W.mT, optimizer, batches)
    assert (first @ W.mT - before).abs().max() < EXACT and (W - start).abs().max() > 0.1


def test_protected_adamw_without_a_basis_is_adamw() -> None:
    mine, theirs = (nn.Parameter(random(M_, N_)) for _ in range(2))
    train(lambda X: X @ mine.mT, ProtectedAdamW([mine], lr=0.01), tasks()[1])
    train(lambda X: X @ theirs.mT, torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.0), tasks()[1])
    assert torch.equal(mine, theirs)


def test_the_basis_of_protected_adamw_grows_by_its_first_moments() -> None:
    """Written out: M of the gradients off P, P by the leading right singular vectors of M; and a group without rank is AdamW's."""
    W, plain = (nn.Parameter(random(*shape)) for shape in ((M_, N_), (N_,)))
    optimizer = ProtectedAdamW([{"params": [W]}, {"params": [plain], "rank": None}], lr=0.01, energy=0.8, most=0.9)
    P = None
    for task in range(2):
        M = torch.zeros(M_, N_)
        for step in range(3):
            W.grad, plain.grad = random(M_, N_, seed=50 + 10 * task + step), random(N_, seed=90 + step)
            M = 0.9 * M + 0.1 * (W.grad if P is None else W.grad - W.grad @ P @ P.mT)
            optimizer.step()
        optimizer.end_task()
        expected = grown(P, M, 0.8, 0.9)
        P = optimizer.basis_of(W)
        assert P is not None and P.shape == expected.shape and (P @ P.mT - expected @ expected.mT).abs().max() < EXACT
        if task == 0:
            first = torch.linalg.svd(M)[2][: P.shape[1]]
            assert 0 < P.shape[1] < M_ and (P @ P.mT - first.mT @ first).abs().max() < EXACT
    assert optimizer.basis_of(plain) is None


def test_what_is_protected_in_the_middle_of_a_task_stays_too() -> None:
    """Without ``end_task``: A must not go on in the V that its weight has left."""
    first, batches = tasks()
    model = Adapted()
    optimizer = GORP(model.groups(), lr=0.05, rank=3, every=7, lora_scale=model.s)
    train(model, optimizer, ((first, random(20, M_, seed=i)) for i in range(10)))
    before = model(first).detach().clone()
    optimizer.protect(model.W, row_space(first))
    assert (model(first) - before).abs().max() < EXACT
    assert all(set(optimizer.state[p]) <= {"draws", "P"} for p in model.parameters()), "no moment of the three is left, nor a frame"
    train(model, optimizer, batches)
    assert (model(first) - before).abs().max() < EXACT


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("rank", [3, 6])
def test_gorp_keeps_the_outputs_of_the_first_task_whatever_the_second_does(rank: int, own: bool) -> None:
    """Weight, both factors, and frames that change on the way, some wider than a gradient's rank off P. ``own``: P of the first moments alone, which
    hold all that the task reads where V is as wide; else of its inputs."""
    first, batches = tasks()
    model = Adapted()
    optimizer = GORP(model.groups(), lr=0.05, rank=rank, every=7, lora_scale=model.s, energy=1.0, most=0.9)
    train(model, optimizer, ((first, random(20, M_, seed=i)) for i in range(10)))
    before = model(first).detach().clone()
    optimizer.end_task()
    assert (model(first) - before).abs().max() < EXACT, "the exchange changes no output"
    if not own:
        optimizer.protect(model.W, row_space(first))
        assert (model(first) - before).abs().max() < EXACT
    P = optimizer.basis_of(model.W)
    assert P is not None
    start = copy.deepcopy(model.state_dict())
    train(model, optimizer, batches)
    kept = bool((model(first) - before).abs().max() < EXACT)
    assert kept == (not own or bool(off(first, P).abs().max() < EXACT)), "all of it if, and here only if, P holds what it reads"
    assert kept or (own and rank < K_)
    assert all((value - start[name]).abs().max() > 0.01 for name, value in model.state_dict().items()), "all three have learnt"
    assert (model.A @ P).abs().max() < EXACT


def test_a_plain_loop_takes_the_same_steps_and_grows_the_same_basis() -> None:
    """Written out for given gradients: a frame off P that changes every other step, first moments that follow it, second ones that stay, α on W
    alone; then P by the three moments, each of norm 1."""
    model, plain = Adapted(), Adapted()
    r, every, lr, scale, betas, eps = 2, 2, 0.05, 0.25, (0.9, 0.999), 1e-8
    optimizer = GORP(model.groups(), lr, rank=r, every=every, scale=scale, lora_scale=model.s, energy=0.8, betas=betas, eps=eps)
    P = row_space(random(2, N_, seed=7))
    for one in (model, plain):  # the exchange
        with torch.no_grad():
            if one is model:
                optimizer.protect(one.W, P)
            else:
                one.W.add_(one.s * one.B @ (one.A @ P) @ P.mT)
                one.A.copy_(off(one.A, P))
    V, M, S = torch.empty(0), dict[str, Tensor](), dict[str, Tensor]()
    for t in range(5):
        grads = {part: random(*getattr(model, part).shape, seed=900 + 10 * t + place) * 10**place for place, part in enumerate("WAB")}
        for part, G in grads.items():
            getattr(model, part).grad = G.clone()
        optimizer.step()
        if t % every == 0:
            new = torch.linalg.svd(off(grads["W"], P), full_matrices=False)[2][:r].mT
            M |= {part: M[part] @ V.mT @ new for part in M if part != "B"}
            V = new
        for part, G in grads.items():
            R = G if part == "B" else off(G, P) @ V
            M[part] = betas[0] * M.get(part, 0 * R) + (1 - betas[0]) * R
            S[part] = betas[1] * S.get(part, 0 * R) + (1 - betas[1]) * R.square()
            D = M[part] / (1 - betas[0] ** (t + 1)) / ((S[part] / (1 - betas[1] ** (t + 1))).sqrt() + eps)
            getattr(plain, part).data -= lr * (scale if part == "W" else 1) * (D if part == "B" else D @ V.mT)
        assert all((a - b).abs().max() < EXACT for a, b in zip(model.parameters(), plain.parameters(), strict=True)), t
    moments = [M["W"] @ V.mT, M["A"] @ V.mT, M["B"] @ plain.A.detach()]
    wanted = grown(P, torch.cat([X / torch.linalg.matrix_norm(X) for X in moments]), 0.8, 0.5)
    optimizer.end_task()
    found = optimizer.basis_of(model.W)
    assert (
        found is not None
        and found.shape == wanted.shape
        and found.shape[1] > 2
        and (found @ found.mT - wanted @ wanted.mT).abs().max() < EXACT
    )


def test_weight_and_factor_share_their_frame_and_the_basis_is_their_moments() -> None:
    model = Adapted()
    optimizer = GORP(model.groups(), lr=0.05, rank=2, every=4, lora_scale=model.s, energy=1.0, most=0.9)
    train(model, optimizer, ((random(8, N_, seed=i), random(8, M_, seed=50 + i)) for i in range(6)))
    V, other = (optimizer.state[p]["V"] for p in (model.W, model.A))
    assert torch.equal(V, other) and V.shape == (N_, 2)
    A = model.A.detach().clone()
    optimizer.end_task()
    P = optimizer.basis_of(model.W)
    assert P is not None and P.shape == (N_, 2 + 3), "two directions of V, and three that A reads"
    assert off(torch.cat([V.mT, A]), P).abs().max() < EXACT
    assert (P.mT @ P - torch.eye(5, dtype=P.dtype)).abs().max() < EXACT
    assert all("exp_avg" not in state for state in optimizer.state.values())


def test_the_basis_grows_by_the_share_of_the_energy() -> None:
    s = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)  # energies 16, 9, 4, 1 of 30
    U, V = (torch.linalg.qr(random(rows, 4, seed=rows))[0] for rows in (M_, N_))
    M = U * s @ V.mT
    for energy, count in ((0.5, 1), (0.53, 1), (0.54, 2), (25 / 30 - 1e-9, 2), (0.9, 3), (0.97, 4), (1.0, 4)):
        P = grown(None, M, energy, 0.9)
        assert P.shape[1] == count and off(V[:, :count].mT, P).abs().max() < EXACT, energy
    held = grown(None, M, 0.5, 0.9)
    assert grown(held, M, 0.9, 0.9).shape[1] == 3, "what P holds counts"
    assert grown(held, M, 0.5, 0.9).shape[1] == 1, "enough is held"
    more = grown(held, random(M_, N_), 0.9, 0.9)
    assert torch.equal(more[:, :1], held) and (more.mT @ more - torch.eye(more.shape[1], dtype=M.dtype)).abs().max() < EXACT


def test_the_basis_never_fills_the_space() -> None:
    P = None
    for i in range(9):
        P = grown(P, random(20, N_, seed=i), 1.0, 0.5)
    assert P is not None and P.shape == (N_, N_ // 2)
    assert grown(None, torch.zeros(M_, N_), 0.9, 0.5).shape == (N_, 0)


def test_a_checkpoint_between_tasks_goes_on_as_if_nothing_had_happened() -> None:
    def begun() -> tuple[Adapted, GORP]:
        model = Adapted()
        return model, GORP(model.groups(), lr=0.05, rank=2, every=4, lora_scale=model.s)

    def task(number: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ((random(8, N_, seed=1000 * number + i), random(8, M_, seed=1000 * number + 50 + i)) for i in range(6))

    model, optimizer = begun()
    train(model, optimizer, task(1))
    optimizer.end_task()
    train(model, optimizer, task(2))
    again, resumed = begun()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (again, resumed)):
        train(one, its, task(3))
        its.end_task()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    P, Q = optimizer.basis_of(model.W), resumed.basis_of(again.W)
    assert P is not None and Q is not None and torch.equal(P, Q) and P.shape[1] > 0


def test_what_cannot_be_is_refused() -> None:
    model = Adapted()
    with pytest.raises(ValueError, match=r"GORP\(weight_decay=0.1\): decay moves what is protected"):
        GORP(model.groups(), weight_decay=0.1)
    with pytest.raises(ValueError, match=r"ProtectedAdamW\(weight_decay=0.1\): decay moves what is protected"):
        ProtectedAdamW([model.W], weight_decay=0.1)
    with pytest.raises(ValueError, match="energy must be in"):
        GORP(model.groups(), energy=1.5)
    with pytest.raises(ValueError, match="most=1"):
        grown(None, model.W.detach(), 0.9, 1.0)
    with pytest.raises(ValueError, match=r"part='A'\): factors of the weights"):
        GORP([model.groups()[1]])
    with pytest.raises(ValueError, match="unknown, known are other, weight"):
        GORP([{"params": [model.W], "part": "heavy"}])
