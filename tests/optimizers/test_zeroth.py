"""Zeroth order: what is probed and what is updated, weights that never move by accident, and faults."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from estimators import LAWS, Gaussian, keyed
from optimizers import ZEROTH_ORDER, LowRankLR, MeZO, SubZero, ZerothOrder
from optimizers.lozo import LOZO
from optimizers.shifted import shifted

METHODS = list(ZEROTH_ORDER)
RANKED: dict[str, Any] = {"rank": 2, "every": 3}


def make(method: str, model: nn.Module, lr: float = 0.01, **options: Any) -> ZerothOrder:
    own = {} if method == "mezo" else RANKED
    return ZEROTH_ORDER[method](model, lr, **(own | options))


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 4)).to(dtype)


def loss_of(model: nn.Module, dtype: torch.dtype = torch.float64) -> Callable[[], Tensor]:
    g = torch.Generator().manual_seed(1)
    X, Y = (torch.randn(16, k, generator=g, dtype=torch.float64).to(dtype) for k in (6, 4))
    return lambda: (model(X).double() - Y.double()).square().mean()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Matrix(nn.Module):
    """One m×n parameter and the loss ½‖W − A‖², whose differences along a direction have no error."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.W, self.A = nn.Parameter(torch.zeros_like(A)), A

    def forward(self) -> Tensor:
        return 0.5 * (self.W - self.A).square().sum()


# where the weights are


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_moves_at_learning_rate_zero_nor_when_a_forward_pass_breaks(method: str, dtype: torch.dtype) -> None:
    """To the last bit, whichever module breaks in whichever of the forward passes; then the next step is the one it would have been."""
    model, whole = net(dtype), net(dtype)
    before, loss = weights(model), loss_of(model, dtype)
    optimizer = make(method, model)
    for broken in range(4):
        optimizer, calls = make(method, model, 0.5, epsilon=0.1), 0

        def breaks(module: nn.Module, args: Any, broken: int = broken) -> None:  # noqa: ARG001
            nonlocal calls
            calls += 1
            if calls == 1 + broken % 2:
                raise RuntimeError("broken")

        hook = model[broken].register_forward_pre_hook(breaks)
        with pytest.raises(RuntimeError, match="broken"):
            optimizer.step(loss)
        hook.remove()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert optimizer.clock == 0 and all(p.grad is None for p in model.parameters())
    make(method, model, lr=0.0).step(loss)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.step(loss)
    make(method, whole, 0.5, epsilon=0.1).step(loss_of(whole, dtype))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters(), strict=True))
    assert not all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_everything_is_moved_once_where_it_is_read() -> None:
    """Tied parameters, a module that reads its children's, one that runs twice, and one inside another with the same parameter."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.norm = nn.LayerNorm(8)
            self.head = nn.Linear(8, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.norm(self.embedding(ids))
            return self.head(self.norm(self.attention(x, x, x)[0]))

    torch.manual_seed(0)
    model, twin = Tied().double().eval(), Tied().double().eval()
    change = {name: 0.1 * torch.randn_like(p) for name, p in model.named_parameters()}
    twin.load_state_dict(
        {name: value + change.get(name, 0) for name, value in model.state_dict().items() if name != "head.weight"}, strict=False
    )
    ids = torch.arange(6).reshape(2, 3)
    before = model(ids)
    names = {p: name for name, p in model.named_parameters()}
    with shifted(model, names, lambda name, p: p.detach() + change[name]) as seen:
        torch.testing.assert_close(model(ids), twin(ids), rtol=0, atol=1e-12)
        torch.testing.assert_close(model(ids), twin(ids), rtol=0, atol=1e-12)
    assert seen == set(change)
    assert torch.equal(model(ids), before) and not model._forward_hooks and not model.head._forward_pre_hooks


def test_what_no_module_reads_is_left_where_it_is_and_named() -> None:
    model = nn.ModuleDict({"used": net(), "pooler": nn.Linear(3, 3).double()})
    before, loss = weights(model), loss_of(model["used"])
    with pytest.warns(UserWarning, match="no module reads pooler.weight, pooler.bias in its own forward pass"):
        MeZO(model, 0.01).step(loss)
    assert all(torch.equal(p, before[name]) == name.startswith("pooler") for name, p in model.named_parameters())


# what is probed, and what the weights get


@pytest.mark.parametrize("form, queries", [("antithetic", 1), ("antithetic", 3), ("one_sided", 2), ("leave_one_out", 3)])
@pytest.mark.parametrize("momentum, weight_decay", [(0.0, 0.0), (0.7, 0.1)])
def test_lowrank_lr_is_its_rule(form: Any, queries: int, momentum: float, weight_decay: float) -> None:
    """Written out for one matrix over three periods, with V and Z from their keys."""
    g = torch.Generator().manual_seed(2)
    A = torch.randn(5, 7, generator=g, dtype=torch.float64)
    model, epsilon, lr, law = Matrix(A), 0.3, 0.02, LAWS["haar_stiefel"](n=7, rank=2, c=0.6)
    options: dict[str, Any] = {"form": form, "queries": queries, "momentum": momentum, "weight_decay": weight_decay, "epsilon": epsilon}
    optimizer = LowRankLR(model, lr, rank=2, every=3, c=0.6, seed=4, **options)
    W, M, old = torch.zeros_like(A), torch.zeros(5, 2, dtype=torch.float64), torch.zeros(7, 2, dtype=torch.float64)
    F = lambda W: 0.5 * (W - A).square().sum()  # noqa: E731
    for t in range(8):
        V = keyed.draw(law, 4, "W.V", t // 3, dtype=torch.float64)
        Z = [torch.randn(5, 2, generator=keyed.generator(4, f"W.Z{i}", t), dtype=torch.float64) for i in range(queries)]
        there = [F(W + epsilon * z @ V.mT) for z in Z]
        if form == "antithetic":
            delta = [(a - F(W - epsilon * z @ V.mT)) / (2 * epsilon) for a, z in zip(there, Z, strict=True)]
        elif form == "one_sided":
            delta = [(a - F(W)) / epsilon for a in there]
        else:
            delta = [(a - sum(b for b in there if b is not a) / (queries - 1)) / epsilon for a in there]
        B = torch.stack([d * z for d, z in zip(delta, Z, strict=True)]).mean(0)
        if t % 3 == 0:
            M = M @ old.mT @ V / (0.6 * 7 / 2)
        M = momentum * M + (1 - momentum) * B
        W = (1 - lr * weight_decay) * W - lr * M @ V.mT
        old = V
        optimizer.step(model)
        torch.testing.assert_close(model.W.detach(), W, rtol=0, atol=1e-12)


def test_mezo_is_its_rule() -> None:
    model = net()
    loss, W, epsilon = loss_of(model), weights(net()), 1e-3
    optimizer, twin = MeZO(model, 0.05, epsilon=epsilon, seed=3), net()
    other = loss_of(twin)
    for t in range(3):
        z = {
            name: torch.randn(p.shape, generator=keyed.generator(3, f"{name}.Z0", t), dtype=torch.float64)
            for name, p in model.named_parameters()
        }
        found = []
        for sign in (1, -1):
            twin.load_state_dict({name: value + sign * epsilon * z[name] for name, value in W.items()})
            found.append(float(other()))
        delta = (found[0] - found[1]) / (2 * epsilon)
        W = {name: value - 0.05 * delta * z[name] for name, value in W.items()}
        assert float(optimizer.step(loss)) == pytest.approx(sum(found) / 2)
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), W[name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lozo_is_lowrank_lr_with_the_gaussian_law(momentum: float) -> None:
    """ε√r in the place of ε. Of the paper's own letters: V standard normal, D = UVᵀ, W − ηδUVᵀ/r, N VᵀV′/n at a new V."""
    A = torch.randn(5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, theirs = Matrix(A), Matrix(A)
    a = LOZO(ours, 0.01, **RANKED, epsilon=0.1, momentum=momentum)
    b = LowRankLR(theirs, 0.01, law="gaussian", **RANKED, epsilon=0.1 * math.sqrt(2), momentum=momentum)
    W, N, before = torch.zeros_like(A), torch.zeros(5, 2, dtype=torch.float64), None
    for t in range(8):
        V = keyed.draw(Gaussian(n=7, rank=2, c=2.0), 0, "W.V", t // 3, dtype=torch.float64)
        U = torch.randn(5, 2, generator=keyed.generator(0, "W.Z0", t), dtype=torch.float64)
        delta = float(((W - A) * (U @ V.mT)).sum())  # of a quadratic, exactly
        if before is not None and t % 3 == 0:
            N = N @ before.mT @ V / 7
        N = momentum * N + (1 - momentum) * delta * U
        W = W - 0.01 * N @ V.mT / 2
        before = V
        a.step(ours)
        b.step(theirs)
        torch.testing.assert_close(ours.W.detach(), W, rtol=0, atol=1e-12)
        torch.testing.assert_close(theirs.W.detach(), W, rtol=0, atol=1e-12)


def test_the_first_update_of_a_period_of_lozos_code_is_not_what_was_probed() -> None:
    A = torch.randn(5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model = Matrix(A)
    optimizer = LOZO(model, 0.01, **RANKED, variant="reference-code", epsilon=0.1)
    for t in range(7):
        W = model.W.detach().clone()
        first = keyed.generator(0, "W.stream", t // 3 * 3)
        V = torch.randn(7, 2, generator=first, dtype=torch.float64)
        probed = torch.randn(5, 2, generator=first if t % 3 == 0 else keyed.generator(0, "W.stream", t), dtype=torch.float64)
        updated = torch.randn(5, 2, generator=keyed.generator(0, "W.stream", t), dtype=torch.float64)
        assert torch.equal(probed, updated) == (t % 3 != 0)
        optimizer.step(model)
        delta = ((W - A) * (probed @ V.mT)).sum()
        torch.testing.assert_close(model.W.detach(), W - 0.01 * delta * updated @ V.mT, rtol=0, atol=1e-12)


def test_subzero_without_its_factor_is_itself_with_another_step() -> None:
    A = torch.randn(5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    a, b = Matrix(A), Matrix(A)
    factor = math.sqrt(5 * 7) / 2
    one = SubZero(a, 0.01, **RANKED, epsilon=0.1)
    two = SubZero(b, 0.01 * factor**2, **RANKED, epsilon=0.1 * factor, scaled=False)
    for _ in range(7):
        one.step(a)
        two.step(b)
        torch.testing.assert_close(a.W.detach(), b.W.detach(), rtol=0, atol=1e-12)
    laws = one.directions_of(one.param_groups[0])
    from optimizers.zeroth import Key

    U, V = laws.frame(Key(0, "W", 0), a.W)
    assert U is not None and V is not None
    torch.testing.assert_close(U.mT @ U, 5 / 2 * torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(V.mT @ V, 7 / 2 * torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-12)


# faults


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_queries_without_a_finite_loss_are_left_out_and_counted(bad: float) -> None:
    """What is left is the mean over the others, as if they alone had been asked; with none left nothing changes but the clock."""
    A = torch.randn(5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    model, calls = Matrix(A), 0

    def loss() -> Tensor:
        nonlocal calls
        calls += 1
        return model() + (bad if calls == 2 else 0.0)  # the second query of three

    optimizer = MeZO(model, 0.1, queries=3, epsilon=0.1)
    optimizer.step(loss)
    Z = [torch.randn(5, 7, generator=keyed.generator(0, f"W.Z{i}", 0), dtype=torch.float64) for i in (0, 2)]
    expected = sum(0.1 * (A * z).sum() * z for z in Z) / 2
    torch.testing.assert_close(model.W.detach(), expected, rtol=0, atol=1e-12)
    assert optimizer.skipped == 1 and optimizer.clock == 1
    before = model.W.detach().clone()
    for form, options in (("antithetic", {}), ("one_sided", {}), ("leave_one_out", {"queries": 3})):
        all_bad = make("lowrank_lr", model, form=form, **options)
        told = all_bad.step(lambda: model() * bad)
        assert torch.equal(model.W, before)
        assert not math.isfinite(float(told)) and all_bad.skipped == options.get("queries", 1) and all_bad.clock == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_continues_to_the_last_bit(method: str, dtype: torch.dtype) -> None:
    """In the middle of a period, momentum included."""
    options: dict[str, Any] = {"momentum": 0.9, "rounding": "stochastic", "epsilon": 0.05}
    model, twin = net(dtype), net(dtype)
    optimizer, loss = make(method, model, 0.05, **options), loss_of(model, dtype)
    for _ in range(4):
        optimizer.step(loss)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    twin.load_state_dict(saved["model"])
    resumed = make(method, twin, 0.05, **options)
    resumed.load_state_dict(saved["optimizer"])
    other = loss_of(twin, dtype)
    for _ in range(4):
        assert torch.equal(optimizer.step(loss), resumed.step(other))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert resumed.clock == 8


def test_a_schedule_and_a_frozen_parameter() -> None:
    model = net()
    first = next(model.parameters())
    frozen = first.detach().clone()
    first.requires_grad_(False)
    optimizer = MeZO(model, 0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t else 1.0)
    optimizer.step(loss_of(model))
    schedule.step()
    after = weights(model)
    optimizer.step(loss_of(model))
    assert torch.equal(first, frozen) and all(torch.equal(p, after[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: MeZO(m, epsilon=0.0), "epsilon=0.0"),
        (lambda m: MeZO(m, -1.0), "lr=-1.0"),
        (lambda m: MeZO(m, form="two_sided"), "unknown form, known are antithetic, one_sided, leave_one_out"),
        (lambda m: MeZO(m, form="leave_one_out"), "leave_one_out needs at least 2 queries"),
        (lambda m: MeZO(m, queries=0), "queries=0"),
        (lambda m: MeZO(m, momentum=1.0), "momentum=1.0 in"),
        (lambda m: MeZO(m, rounding="up"), "unknown rounding 'up'"),
        (lambda m: LowRankLR(m, law="spectral"), "no gradient to fit a law to"),
        (lambda m: LowRankLR(m, law="haar"), "known are gaussian"),
        (lambda m: LowRankLR(m, every=0), "every=0"),
        (lambda m: LowRankLR(m, c=0.0), "c must be positive"),
        (lambda m: LowRankLR(m, rank=0), "rank"),
        (lambda m: LOZO(m, variant="code"), "unknown, known are paper, reference-code"),
        (lambda m: SubZero(m, every=0), "every=0"),
        (lambda m: MeZO(m).step(), "needs the loss as a function"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[nn.Module], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(net())


def test_a_rank_above_a_matrix_is_cut() -> None:
    model = net()
    LowRankLR(model, 0.01, rank=100).step(loss_of(model))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
