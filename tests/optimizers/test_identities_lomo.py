"""(a) LOMO and AdaLomo: descent and Adafactor to the last bits, tensors of any shape, and steps inside the backward pass: one gradient at a time,
shared and frozen weights, clipping by the norm of all in two passes, and what a gradient that is not finite leaves as it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from optimizers import LOMO, AdaLomo, GaLore, PerLayer, Subspace, per_layer, split_parameters
from tests.optimizers.test_identities import SHAPES, matrices

BOTH = [
    pytest.param(LOMO, id="lomo", marks=pytest.mark.check("a", "lomo")),
    pytest.param(AdaLomo, id="adalomo", marks=pytest.mark.check("a", "adalomo")),
]
ANY: list[tuple[int, ...]] = [(24, 40), (40, 24), (7,), (1,), (), (3, 4, 5), (4, 3, 2, 2)]


def tensors(shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(steps, *shape, generator=torch.Generator().manual_seed(5), dtype=dtype)


def trained(optimizer: torch.optim.Optimizer, p: nn.Parameter, Gs: Tensor) -> Tensor:
    for G in Gs:
        p.grad = G.to(p.dtype)
        optimizer.step()
    return p.detach()


# the rules


@pytest.mark.check("a", "lomo")
@pytest.mark.parametrize("shape", ANY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lomo_is_torchs_sgd_to_the_last_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    (p,), (q,) = matrices([shape], dtype), matrices([shape], dtype)
    Gs = tensors(shape, 20, dtype)
    assert torch.equal(trained(LOMO([p], lr=0.1), p, Gs), trained(torch.optim.SGD([q], lr=0.1), q, Gs))


@pytest.mark.check("a", "lomo")
@pytest.mark.parametrize("shape", ANY)
def test_decay_of_descent_is_the_same_coupled_or_not(shape: tuple[int, ...]) -> None:
    (p,), (q,) = matrices([shape]), matrices([shape])
    options, Gs = {"lr": 0.1, "weight_decay": 0.3}, tensors(shape, 20)
    mine, theirs = trained(LOMO([p], **options), p, Gs), trained(torch.optim.SGD([q], **options), q, Gs)  # pyright: ignore
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


@pytest.mark.check("a", "adalomo")
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (5, 5), (1, 9), (9, 1), (7,), (1,), ()])
@pytest.mark.parametrize("size", [1.0, 1e-5])
def test_adalomo_is_torchs_adafactor(shape: tuple[int, ...], size: float) -> None:
    """Without decay, which is scaled otherwise there, and while its rate is below 1/√t. Small weights are below the least RMS."""
    (p,), (q,) = matrices([shape]), matrices([shape])
    p.data, q.data = size * p.data, size * q.data
    Gs = tensors(shape, 30)
    Gs[10] *= 50
    mine = trained(AdaLomo([p], lr=0.05), p, Gs)
    theirs = trained(torch.optim.Adafactor([q], lr=0.05, eps=(1e-30, 1e-3), foreach=False), q, Gs)
    torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-14)


@pytest.mark.check("a", "adalomo")
@pytest.mark.parametrize("shape", SHAPES)
def test_squares_of_rank_one_are_factored_exactly(shape: tuple[int, int]) -> None:
    """|G| = abᵀ at every step, with any signs: U is the matrix of signs."""
    (p,) = matrices([shape])
    generator = torch.Generator().manual_seed(2)
    a, b = (torch.rand(n, generator=generator, dtype=torch.float64) + 0.1 for n in shape)
    signs = torch.randn(8, *shape, generator=generator, dtype=torch.float64).sign()
    optimizer, W = AdaLomo([p], lr=0.05, weight_decay=0.2), p.detach().clone()
    for S in signs:
        p.grad = torch.outer(a, b) * S
        optimizer.step()
        rate = 0.05 * W.square().mean().sqrt()
        W = (1 - 0.2 * rate) * W - rate * S
        torch.testing.assert_close(p.detach(), W, rtol=0, atol=1e-12)


@pytest.mark.check("a", "adalomo")
@pytest.mark.parametrize("shape", [*SHAPES, (7,)])
def test_adalomo_does_not_know_the_scale_of_the_loss_and_steps_no_longer_than_its_rate(shape: tuple[int, ...]) -> None:
    """A gradient out of the ordinary makes a step of exactly that length."""
    (p,), (q,) = matrices([shape]), matrices([shape])
    first, second = AdaLomo([p], lr=0.05), AdaLomo([q], lr=0.05)
    lengths = []
    for t, G in enumerate(tensors(shape, 12)):
        before = p.detach().clone()
        p.grad = G * (100 if t == 8 else 1)
        q.grad = 1024.0 * p.grad
        first.step()
        second.step()
        step = (p.detach() - before).square().mean().sqrt()
        lengths.append(float(step / (0.05 * before.square().mean().sqrt())))
    torch.testing.assert_close(p, q, rtol=0, atol=1e-13)
    assert max(lengths) <= 1 + 1e-12 and lengths[8] == pytest.approx(1, abs=1e-12) and min(lengths) < 0.9


@pytest.mark.parametrize("kind", BOTH)
def test_a_tensor_of_any_shape_is_a_matrix_of_one_row(kind: type[Subspace]) -> None:
    """Also one that is not laid out in order, and in bfloat16, as torch makes them of convolutions for GPUs; state: none, or one number more than
    there are."""
    for shape in ANY[2:]:
        Gs = tensors(shape, 6)
        (p,), (q,) = matrices([shape]), matrices([shape])
        q = nn.Parameter(q.detach().reshape(1, -1).clone())
        mine, row = kind([p], lr=0.05, weight_decay=0.1), kind([q], lr=0.05, weight_decay=0.1)
        assert torch.equal(trained(mine, p, Gs).reshape(1, -1), trained(row, q, Gs.reshape(6, 1, -1)))
        assert mine.state_bytes() == (0 if kind is LOMO else 8 * (p.numel() + 1))
    for dtype in (torch.float64, torch.bfloat16):
        (p,), (q,) = matrices([(4, 3, 2, 2)], dtype), matrices([(4, 3, 2, 2)], dtype)
        q = nn.Parameter(q.detach().to(memory_format=torch.channels_last))
        assert not q.is_contiguous()
        Gs = tensors((4, 3, 2, 2), 6)
        assert torch.equal(trained(kind([p], lr=0.05), p, Gs), trained(kind([q], lr=0.05), q, Gs))
        moved = q.detach() - matrices([(4, 3, 2, 2)], dtype)[0].detach()
        assert float(moved.abs().max()) > 0.05


def test_other_methods_still_want_matrices() -> None:
    with pytest.raises(ValueError, match=r"GaLore\(rank=4\): projects matrices, got a parameter of shape \(7,\)"):
        GaLore(matrices([(7,)]), rank=4)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("shape", [(24, 40), (7,)])
def test_arithmetic_is_float32_beside_16_bit_weights(kind: type[Subspace], shape: tuple[int, ...]) -> None:
    """One step from equal weights is that of float32 rounded; many small ones arrive with stochastic rounding and do not without."""
    (p,), (q,) = matrices([shape], torch.bfloat16), matrices([shape], torch.bfloat16)
    q = nn.Parameter(q.detach().float())
    G = tensors(shape, 1, torch.float32).bfloat16().float()
    mine, exact = trained(kind([p], lr=0.05), p, G), trained(kind([q], lr=0.05), q, G)
    assert torch.equal(mine, exact.bfloat16())
    ends = {}
    for rounding in ("nearest", "stochastic"):
        p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        trained(kind([p], lr=1e-4, rounding=rounding), p, torch.ones(200, 64, 64))
        ends[rounding] = float(p.detach().float().mean())
    assert ends["nearest"] == 1.0 and abs(ends["stochastic"] - 0.98) < 1e-3


# inside the backward pass


class Net(nn.Module):
    """One layer used twice, a vector, a frozen layer and a dropout; float64."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.up, self.twice, self.still, self.down = (nn.Linear(*sizes) for sizes in ((5, 8), (8, 8), (8, 8), (8, 3)))
        self.scale, self.drop = nn.Parameter(torch.linspace(0.5, 1.5, 8)), nn.Dropout(p)
        self.double().still.requires_grad_(False)

    def forward(self, X: Tensor, saves: bool = False) -> Tensor:
        X = self.drop(self.twice(torch.tanh(self.up(X))))
        again = lambda X: torch.tanh(self.twice(X)) * self.scale  # noqa: E731
        X = checkpoint(again, X, use_reentrant=False) if saves else again(X)
        return self.down(self.still(X))


def net(p: float = 0.0) -> Net:
    torch.manual_seed(0)
    return Net(p)


def loss(model: Net, t: int, **options: Any) -> Tensor:
    X = torch.randn(6, 5, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    return model(X, **options).logsumexp(-1).mean()


def weights(model: Net) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", BOTH)
def test_one_gradient_is_there_at_a_time_shared_ones_are_summed_and_frozen_weights_rest(kind: Any) -> None:
    """Every parameter steps once a backward pass, with the gradient that the plain loop has for it, both uses in it."""
    model, plain = net(), net()
    optimizer, other = kind(model.named_parameters(), lr=0.05, weight_decay=0.1), kind(plain.named_parameters(), lr=0.05, weight_decay=0.1)
    start, seen, given = weights(model), [], {}
    optimizer.watch = lambda names, context: (
        seen.append((names, sum(p.grad is not None for p in model.parameters()))), given.update({names[0]: context.G.clone()})
    )  # fmt: skip
    per_layer(optimizer)
    for t in range(4):
        seen.clear()
        loss(model, t).backward()
        loss(plain, t).backward()
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert len(seen) == len(trained) and {names[0] for names, _ in seen} == trained and all(count == 1 for _, count in seen)
        for name, p in plain.named_parameters():
            assert (p.grad is None) == name.startswith("still.") and (p.grad is None or torch.equal(given[name].reshape(p.shape), p.grad))
        optimizer.step()
        other.step()
        other.zero_grad()
        for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(p, q) and torch.equal(p, start[name]) == name.startswith("still."), name
    assert not any(optimizer.state.get(p) for p in model.still.parameters())


def clipped(kind: Callable[[Net], Subspace], total: float, steps: int = 5, **options: Any) -> tuple[Net, Net, list[float]]:
    """Two passes a step, and torch's clipping of an ordinary step; the norms that the handle said are torch's."""
    model, plain = net(), net()
    optimizer, other = kind(model), kind(plain)
    handle, norms = per_layer(optimizer, clip_total=total), []
    for t in range(steps):
        norms.append(handle.backward(loss(model, t, **options)))
        assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        other.zero_grad()
        loss(plain, t).backward()
        theirs = torch.nn.utils.clip_grad_norm_(plain.parameters(), total)
        assert norms[-1] == pytest.approx(float(theirs), rel=1e-12)
        other.step()
    return model, plain, norms  # pyright: ignore[reportReturnType]


def assert_same(model: Net, plain: Net) -> None:
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


MADE: list[Any] = [
    pytest.param(lambda model: LOMO(model.named_parameters(), lr=0.5), id="lomo", marks=pytest.mark.check("a", "lomo")),
    pytest.param(lambda model: AdaLomo(model.named_parameters(), lr=0.05), id="adalomo", marks=pytest.mark.check("a", "adalomo")),
    pytest.param(lambda model: GaLore(split_parameters(model, rank=3), lr=0.01), id="galore"),
]


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("saves", [False, True])
def test_two_passes_clip_by_the_norm_of_all_gradients(made: Any, saves: bool) -> None:
    """Also where activations are recomputed, twice."""
    model, plain, norms = clipped(made, 0.05, saves=saves)
    assert min(norms) > 0.1
    assert_same(model, plain)


def _steps_too(handle: Any, p: Tensor) -> None:
    assert p.grad is not None
    handle.norms.append(p.grad.norm())
    handle.optimizer.step_of(p)
    p.grad = None


@pytest.mark.parametrize(
    "owner, name, wrong",
    [
        pytest.param(math, "hypot", max, id="the largest norm"),
        pytest.param(PerLayer, "_clipped", lambda _, p: torch.nn.utils.clip_grad_norm_([p], 0.05), id="each by its own"),
        pytest.param(PerLayer, "_clipped", lambda *_: None, id="nothing is clipped"),
        pytest.param(PerLayer, "_measured", _steps_too, id="the first pass steps"),
    ],
)
def test_clipping_in_another_way_is_seen(owner: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in the first pass by torch itself, which finds weights that are not those of the forward pass."""
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_same(*clipped(MADE[0].values[0], 0.05)[:2])


@pytest.mark.parametrize("kind", BOTH)
def test_a_norm_below_the_largest_changes_nothing_and_both_passes_drop_out_alike(kind: Any) -> None:
    results = []
    for total in (None, 1e6):
        model = net(0.5)
        optimizer = kind(model.named_parameters(), lr=0.05)
        handle = per_layer(optimizer, clip_total=total)
        torch.manual_seed(1)
        norms = []
        for t in range(4):
            norms.append(handle.backward(loss(model, t)))
            optimizer.step()
        assert all((norm is None) == (total is None) for norm in norms)
        results.append(weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# what is not finite, and what is refused


def spoiled(p: Tensor, bad: float) -> Any:
    """From now on one entry of its gradient is ``bad``; ``remove()`` ends it."""
    return p.register_hook(lambda G: torch.cat([G.new_full((1,), bad), G.flatten()[1:]]).view(G.shape))


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_a_gradient_that_is_not_finite_inside_one_pass(kind: Any, bad: float) -> None:
    """Layers nearer to the loss have stepped as without it; this one and those below have not; training then goes on as from there."""
    model, twin = net(), net()
    optimizer, other = kind(model.named_parameters(), lr=0.05), kind(twin.named_parameters(), lr=0.05)
    handles = [per_layer(o) for o in (optimizer, other)]
    for o, one in ((optimizer, model), (other, twin)):
        loss(one, 0).backward()
        o.step()
    before, state = weights(model), copy.deepcopy(dict(optimizer.state[model.twice.weight]))
    hook = spoiled(model.twice.weight, bad)
    with pytest.raises(
        ValueError, match=r"gradient of twice\.weight is NaN, infinite, or too large to be squared; this parameter was not changed"
    ):
        loss(model, 1).backward()
    hook.remove()
    loss(twin, 1).backward()
    after, whole = weights(model), weights(twin)
    for name in ("down.weight", "down.bias", "scale"):
        assert torch.equal(after[name], whole[name]) and not torch.equal(after[name], before[name])
    for name in ("up.weight", "up.bias", "twice.weight"):
        assert torch.equal(after[name], before[name]) and not torch.equal(after[name], whole[name])
    held = optimizer.state[model.twice.weight]
    assert held.keys() == state.keys() and all(bool(torch.all(torch.as_tensor(held[key] == state[key]))) for key in state)
    assert all(p.grad is None for p in model.parameters()) and not handles[0].passes
    loss(model, 2).backward()
    optimizer.step()
    assert all(not torch.equal(p, after[name]) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("bad", [math.nan, -math.inf, 1e200])
@pytest.mark.parametrize("name", ["up.weight", "down.weight", "scale"])
def test_a_gradient_that_is_not_finite_changes_nothing_in_two_passes(kind: Any, bad: float, name: str) -> None:
    model, twin = net(), net()
    results = []
    for one, spoils in ((model, True), (twin, False)):
        optimizer = kind(one.named_parameters(), lr=0.05)
        handle = per_layer(optimizer, clip_total=0.1)
        for t in range(3):
            if spoils and t == 1:
                before = weights(one)
                hook = spoiled(one.get_parameter(name), bad)
                with pytest.raises(
                    ValueError, match=rf"gradient of {name} is NaN, infinite, or too large to be squared; nothing was changed"
                ):
                    handle.backward(loss(one, 99))
                hook.remove()
                assert all(torch.equal(p, before[key]) and p.grad is None for key, p in one.named_parameters())
            handle.backward(loss(one, t))
            optimizer.step()
        results.append((weights(one), [dict(state) for state in optimizer.state.values()]))
    assert all(torch.equal(results[0][0][key], results[1][0][key]) for key in results[0][0])
    for mine, theirs in zip(results[0][1], results[1][1], strict=True):
        assert all(bool(torch.all(torch.as_tensor(mine[key] == theirs[key]))) for key in theirs)


@pytest.mark.parametrize("kind", BOTH)
def test_gradients_do_not_accumulate(kind: Any) -> None:
    """Not if it is asked for, and not if somebody passes backward twice; a second pass after the step is another step."""
    model = net()
    optimizer = kind(model.named_parameters(), lr=0.05)
    said = rf"per_layer\({kind.__name__}, accumulate=4\): while gradients accumulate they are held for all layers; use larger batches, or"
    with pytest.raises(ValueError, match=said):
        per_layer(optimizer, accumulate=4)
    per_layer(optimizer)
    loss(model, 0).backward()
    after = weights(model)
    with pytest.raises(ValueError, match=rf"per_layer\({kind.__name__}\): a second backward pass before optimizer\.step\(\)"):
        loss(model, 1).backward()
    assert all(torch.equal(p, after[name]) and p.grad is None for name, p in model.named_parameters())
    optimizer.step()
    loss(model, 1).backward()
    assert all(torch.equal(p, after[name]) != p.requires_grad for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"accumulate": 2, "clip_total": 1.0},
            r"per_layer\(GaLore, accumulate=2, clip_total=1.0\): while gradients accumulate they are held",
        ),
        ({"clip": 1.0, "clip_total": 2.0}, r"per_layer\(clip=1.0, clip_total=2.0\): one of the two"),
        ({"clip_total": 0.0}, r"per_layer\(clip_total=0.0\): must be positive and finite"),
        ({"clip": math.nan}, r"per_layer\(clip=nan\): must be positive and finite"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        per_layer(GaLore(split_parameters(net(), rank=3)), **options)


def test_one_pass_cannot_know_the_norm() -> None:
    model = net()
    before = weights(model)
    per_layer(LOMO(model.named_parameters(), lr=0.05), clip_total=1.0)
    with pytest.raises(ValueError, match=r"per_layer\(clip_total=1.0\): one backward pass cannot know the norm; call backward\(loss\)"):
        loss(model, 0).backward()
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
