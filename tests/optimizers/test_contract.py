"""What holds for every optimizer: state, checkpoints, gradients that are odd, parameters that are odd, and the loops people write."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import nn

from estimators import directions
from optimizers import OPTIMIZERS, GaLore, SpectralAdam, Subspace, per_layer, split_parameters
from optimizers.bases import top_right_singular
from theory import optimizer_state

METHODS = list(OPTIMIZERS)
RANK = 4


def make(method: str, parameters: Any, **options: Any) -> Subspace:
    """With one of the layers by turns, all gradients given, and weights rounded to the nearest."""
    kind = OPTIMIZERS[method]
    rank = {"apollo_mini": 1, "frugal": 1}.get(method, RANK)
    usual: dict[str, Any] = {"lr": 0.01, "rank": rank, "rounding": "nearest"} | kind.takes(freeze=False, every=3, layers=1)
    return kind(parameters, **(usual | options))


def parameter(shape: tuple[int, ...] = (24, 40), dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype))


def steps(optimizer: Subspace, parameters: list[nn.Parameter], count: int, start: int = 0) -> None:
    for t in range(start, start + count):
        generator = torch.Generator().manual_seed(100 + t)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_state_is_as_large_as_the_formula_says(method: str, shape: tuple[int, int]) -> None:
    p = parameter(shape)
    optimizer = make(method, [p])
    steps(optimizer, [p], 4)
    share = optimizer.state[p]["rest"] if method == "gum" else 1.0
    assert optimizer.state_bytes() == optimizer_state.state_bytes(method, *shape, RANK, share)
    assert all(isinstance(value, torch.Tensor | int | float) for value in optimizer.state[p].values())


def test_state_in_8_bits() -> None:
    p = parameter((96, 128))
    optimizer = GaLore([p], rank=32, states="8bit")
    steps(optimizer, [p], 3)
    numbers = 32 * 128
    assert optimizer.state_bytes() == 4 * 96 * 32 + 2 * (numbers + 4 * math.ceil(numbers / 256))
    q = parameter((96, 128))
    plain = GaLore([q], rank=32)
    steps(plain, [q], 3)
    start = parameter((96, 128)).detach()
    error = torch.linalg.norm(p.detach() - q.detach()) / torch.linalg.norm(q.detach() - start)
    assert 0 < float(error) < 0.05


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("foreach", [False, True])
def test_a_saved_state_continues_to_the_last_bit(method: str, dtype: torch.dtype, foreach: bool) -> None:
    parameters = [parameter(dtype=dtype), parameter((40, 24), dtype), parameter(dtype=dtype)]
    optimizer = make(method, parameters, foreach=foreach)
    steps(optimizer, parameters, 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = make(method, twins, foreach=foreach)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    before = [state.copy() for state in optimizer.state.values()]
    for old, new in zip(before, resumed.state.values(), strict=True):
        assert {key: getattr(value, "dtype", int) for key, value in old.items()} == {
            key: getattr(value, "dtype", int) for key, value in new.items()
        }
    steps(optimizer, parameters, 5, start=4)
    steps(resumed, twins, 5, start=4)
    assert all(torch.equal(p, q) for p, q in zip(parameters, twins, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_and_parameters_keep_their_shape_and_place(method: str) -> None:
    p = parameter()
    address, optimizer = p.data_ptr(), make(method, [p])
    G = torch.randn(24, 40)
    p.grad = G.clone()
    held = p.grad
    optimizer.step()
    assert p.data_ptr() == address and p.grad is held and torch.equal(held, G) and p.shape == (24, 40)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e20])
def test_a_gradient_that_is_not_finite_changes_nothing(method: str, bad: float) -> None:
    p, q = parameter(), parameter((7,))
    optimizer = make(method, [{"params": [("body.weight", p)]}, {"params": [("norm.weight", q)], "rank": None}])
    steps(optimizer, [p, q], 2)
    weights, states = [p.detach().clone(), q.detach().clone()], copy.deepcopy(dict(optimizer.state))
    assert p.grad is not None
    p.grad[3, 4] = bad
    with pytest.raises(ValueError, match=r"gradient of body\.weight is NaN, infinite, or too large to be squared; nothing was changed"):
        optimizer.step()
    assert torch.equal(p, weights[0]) and torch.equal(q, weights[1])
    for old, new in zip(states.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(old[key], new[key]) if isinstance(new[key], torch.Tensor) else old[key] == new[key] for key in new)


@pytest.mark.parametrize("method", METHODS)
def test_zero_gradients_move_nothing_and_do_no_harm_later(method: str) -> None:
    p = parameter()
    optimizer = make(method, [p], **OPTIMIZERS[method].takes(every=2))
    before = p.detach().clone()
    for _ in range(3):
        p.grad = torch.zeros(24, 40)
        optimizer.step()
    assert torch.equal(p, before)
    steps(optimizer, [p], 3)
    assert bool(torch.isfinite(p).all())
    assert float((p.detach() - before).abs().max()) > 1e-4


@pytest.mark.parametrize("method", [name for name in METHODS if name != "frugal"])
def test_a_rank_above_the_matrix_is_its_smaller_dimension(method: str) -> None:
    p, q = parameter((6, 10)), parameter((6, 10))
    for x, rank in ((p, 64), (q, 6)):
        steps(make(method, [x], rank=rank), [x], 4)
    assert torch.equal(p, q)


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_that_is_not_contiguous(method: str) -> None:
    p = nn.Parameter(parameter((40, 24)).detach().mT)
    q = nn.Parameter(p.detach().contiguous())
    assert not p.is_contiguous()
    for x in (p, q):
        steps(make(method, [x]), [x], 4)
    torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_weights_follow_float32_ones(method: str) -> None:
    p, q = parameter(dtype=torch.bfloat16), parameter()
    q.data.copy_(p.data)
    G = torch.randn(24, 40, generator=torch.Generator().manual_seed(3)).bfloat16()
    for x in (p, q):
        x.grad = G.to(x.dtype)
        optimizer = make(method, [x])
        optimizer.step()
        assert all(v.dtype != torch.bfloat16 for k, v in optimizer.state[x].items() if isinstance(v, torch.Tensor) and k != "error")
    assert torch.equal(p.detach(), q.detach().bfloat16())


def test_stochastic_rounding_is_right_on_average() -> None:
    """A step far below the spacing of bf16 moves the mean weight all the same."""
    p = nn.Parameter(torch.ones(64, 256, dtype=torch.bfloat16))
    optimizer = GaLore([p], lr=1e-3, rank=64, scale=1.0, rounding="stochastic")
    p.grad = torch.ones(64, 256, dtype=torch.bfloat16)
    optimizer.step()
    exact = nn.Parameter(torch.ones(64, 256))
    exact.grad = torch.ones(64, 256)
    GaLore([exact], lr=1e-3, rank=64, scale=1.0).step()
    moved, wanted = 1 - p.detach().double(), 1 - exact.detach().double()
    error = float((moved - wanted).std()) / math.sqrt(p.numel())
    assert abs(float(moved.mean() - wanted.mean())) < 5 * error and float(wanted.mean()) > 8 * error


@pytest.mark.parametrize("method", ["galore", "golore", "fira", "ldadam", "plumage", "spectral_adam"])
def test_an_svd_that_does_not_converge_goes_by_the_gram_matrix(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    G = torch.randn(24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = top_right_singular(G, 5)

    def fails(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("the algorithm failed to converge")  # pyright: ignore[reportPrivateImportUsage]

    monkeypatch.setattr(torch.linalg, "svd", fails)
    found = top_right_singular(G, 5)
    torch.testing.assert_close(found @ found.mT, expected @ expected.mT, rtol=0, atol=1e-10)
    p = parameter()
    optimizer = make(method, [p], random_from=10**9) if method == "golore" else make(method, [p])
    steps(optimizer, [p], 2)
    assert bool(torch.isfinite(p).all())
    both = GaLore([q := parameter()], rank=RANK, side="both")
    steps(both, [q], 2)
    U, V = both.state[q]["U"], both.state[q]["V"]
    torch.testing.assert_close(U.mT @ U, torch.eye(RANK), rtol=0, atol=1e-5)
    torch.testing.assert_close(V.mT @ V, torch.eye(RANK), rtol=0, atol=1e-5)


def test_the_randomized_basis_captures_what_the_svd_does() -> None:
    """A spectrum that decays as gradients' do: at least 99 % of the energy, also after the gradient has moved on."""
    generator = torch.Generator().manual_seed(9)
    U, V = (torch.linalg.qr(torch.randn(n, 96, generator=generator))[0] for n in (160, 96))
    G = (U * torch.arange(1, 97).float().pow(-1.0)) @ V.mT
    p = nn.Parameter(torch.zeros(160, 96))
    optimizer = GaLore([p], rank=24, every=1, basis="randomized")
    for t in range(4):
        p.grad = G + 0.3 * t * torch.roll(G, t, 1)
        optimizer.step()
        held = optimizer.state[p]["V"]
        exact = torch.linalg.svdvals(p.grad)[:24].square().sum()
        assert float((p.grad @ held).square().sum() / exact) >= 0.99
        torch.testing.assert_close(held.mT @ held, torch.eye(24), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_accumulated_gradients_clipping_and_schedules_are_those_of_any_optimizer(method: str) -> None:
    p, q = parameter(), parameter()
    first, second = make(method, [p]), make(method, [q])
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 0.1, 1.0, 4) for o in (first, second)]
    for t in range(5):
        G = torch.randn(2, 24, 40, generator=torch.Generator().manual_seed(t))
        p.grad = None
        for part in G:  # as two backward passes do
            p.grad = part.clone() if p.grad is None else p.grad.add_(part)
        q.grad = G.sum(0)
        for x in (p, q):
            assert float(torch.nn.utils.clip_grad_norm_([x], 1.0)) > 1
        first.step()
        second.step()
        for schedule in schedules:
            schedule.step()
    assert torch.equal(p, q)
    assert first.param_groups[0]["lr"] == pytest.approx(0.01)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("fira", "apollo", "apollo_mini")])
def test_learning_rate_zero_moves_nothing(method: str) -> None:
    p = parameter()
    before = p.detach().clone()
    steps(make(method, [p], lr=0.0), [p], 2)
    assert torch.equal(p, before)


@pytest.mark.parametrize("method", ["fira", "apollo", "apollo_mini"])
def test_learning_rate_zero_at_the_start_of_a_warm_up(method: str) -> None:
    """What is scaled by a ratio of norms must not divide by the learning rate."""
    p = parameter()
    before, optimizer = p.detach().clone(), make(method, [p], lr=0.0)
    steps(optimizer, [p], 1)
    assert torch.equal(p, before)
    optimizer.param_groups[0]["lr"] = 0.01
    steps(optimizer, [p], 1, start=1)
    assert bool(torch.isfinite(p).all()) and not torch.equal(p, before)


def test_draws_belong_to_names_and_not_to_positions() -> None:
    shapes = {"a.weight": (24, 40), "b.weight": (24, 40)}
    drawn = []
    for order in (("a.weight", "b.weight"), ("b.weight", "a.weight")):
        named = {name: parameter(shapes[name]) for name in order}
        optimizer = make("golore", list(named.items()))
        steps(optimizer, list(named.values()), 1)
        drawn.append({name: optimizer.state[p]["V"] for name, p in named.items()})
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in shapes)
    assert not torch.equal(drawn[0]["a.weight"], drawn[0]["b.weight"])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    steps(make("flora", [parameter()]), [parameter()], 1)
    assert torch.equal(torch.get_rng_state(), state)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 30, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.down(torch.relu(self.up(self.embed(ids))))))


def test_split_parameters() -> None:
    model = Tiny()
    matrices, rest = split_parameters(model, rank=4, others={"lr": 1e-4})
    assert [name for name, _ in matrices["params"]] == ["up.weight", "down.weight"] and matrices["rank"] == 4
    assert {name for name, _ in rest["params"]} == {"embed.weight", "up.bias", "down.bias", "norm.weight", "norm.bias"}
    assert rest["rank"] is None and rest["lr"] == 1e-4
    optimizer = GaLore([matrices, rest], lr=0.02)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 1e-4]
    chosen, _ = split_parameters(model, targets=lambda name, _: name == "up.weight")
    assert [name for name, _ in chosen["params"]] == ["up.weight"]
    with pytest.raises(ValueError, match=r"split_parameters\(Tiny, rank=128\): no matrix"):
        split_parameters(model, targets=lambda *_: False)


@pytest.mark.parametrize("method, accumulate", [(name, k) for name, kind in OPTIMIZERS.items() for k in ((1,) if kind.fused else (1, 3))])
def test_steps_inside_the_backward_pass_are_the_steps_after_it(method: str, accumulate: int) -> None:
    results, held = [], []
    for inside in (False, True):
        torch.manual_seed(0)
        model = Tiny()
        optimizer = make(method, split_parameters(model, rank=1 if method in ("apollo_mini", "frugal") else RANK, others={"lr": 1e-3}))
        handle = per_layer(optimizer, accumulate=accumulate) if inside else None
        for t in range(6):
            ids = torch.randint(0, 30, (4, 8), generator=torch.Generator().manual_seed(t))
            (model(ids).logsumexp(-1).mean() / accumulate).backward()
            if (t + 1) % accumulate == 0:
                held.append(all(p.grad is None for p in model.parameters()) == inside)
                optimizer.step()
                optimizer.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
        assert {state["clock"] for state in optimizer.state.values() if state} == {6 // accumulate}
        if handle is not None:
            handle.remove()
            model(torch.arange(5)).sum().backward()
            assert all(p.grad is not None for p in model.parameters())
    assert all(held)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_wrong_arguments_say_what_is_wrong() -> None:
    p = parameter()
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"rank": 0}, r"GaLore\(rank=0\): must be a positive integer, a fraction in \(0, 1\), or None"),
        ({"rank": 1.5}, r"GaLore\(rank=1.5\)"),
        ({"rank": 4, "lr": -1.0}, r"GaLore\(lr=-1.0\): must be finite and not negative"),
        ({"rank": 4, "betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)\): must be two numbers in \[0, 1\)"),
        ({"rank": 4, "states": "4bit"}, "unknown, known are float, 8bit"),
        ({"rank": 4, "variant": "code"}, "unknown, known are paper, reference-code"),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            GaLore([p], **options)
    with pytest.raises(ValueError, match=r"projects matrices, got a parameter of shape \(7,\); give it rank=None"):
        GaLore([parameter((7,))], rank=4)
    with pytest.raises(ValueError, match=r"Frugal\(part='svds'\): unknown, known are blocks"):
        OPTIMIZERS["frugal"]([p], part="svds")
    for method in ("trion", "dion", "mofasgd", "lomo", "adalomo"):
        with pytest.raises(ValueError, match=r"\(states='8bit'\): what this method keeps is not kept in 8 bits"):
            OPTIMIZERS[method]([p], rank=4, states="8bit")
    with pytest.raises(TypeError, match=r"GaLore\(ranks\): unknown option, known are basis, beta1, betas"):
        GaLore([p], ranks=4)
    p.grad = torch.randn(24, 40).to_sparse()
    with pytest.raises(TypeError, match="sparse gradients are not supported"):
        GaLore([p], rank=4).step()
    p.grad = torch.randn(24, 40)
    wrong = SpectralAdam([p], rank=4)
    wrong.inject = lambda *_: directions  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"SpectralAdam.inject: the frame must be Balanced, got module"):
        wrong.step()
    with pytest.raises(ValueError, match="accumulate=0"):
        per_layer(wrong, accumulate=0)


def test_a_closure_is_called_and_its_loss_returned() -> None:
    p = parameter()
    optimizer = GaLore([p], rank=RANK)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert float(optimizer.step(closure)) < float(first)
