"""The state policies, and those of the second moment alone: by their formulas, at V′ = V, inside one subspace, and with real optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from estimators import Coordinate, HaarStiefel, convert
from estimators.transport import POLICIES, SECONDS, Policy, Second, carry, change_of_basis, fill
from tests.monte_carlo import assert_mean

M_, N_, R_ = 5, 12, 4


def bases(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    V, new = HaarStiefel(n=N_, rank=R_).sample(2, generator=generator, dtype=torch.float64)
    return V * torch.linspace(1, 3, R_, dtype=torch.float64), new  # columns of different lengths, as the spectral law draws them


def state(generator: torch.Generator) -> dict[str, Any]:
    """AdamW's: no entry of M² is above N, except in the first row, as in Adam's first steps."""
    M = torch.randn(M_, R_, generator=generator, dtype=torch.float64)
    N = M.square() + torch.rand(M_, R_, generator=generator, dtype=torch.float64)
    N[0] = 0.3 * M[0].square()
    return {"step": torch.tensor(7.0), "exp_avg": M, "exp_avg_sq": N}


def carried(policy: Policy, old: dict[str, Any], V: Tensor, new: Tensor) -> dict[str, Any]:
    copy = {key: value.clone() for key, value in old.items()}
    carry(policy, copy, V, new)
    return copy


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_change_of_basis_is_least_squares(generator: torch.Generator) -> None:
    V, new = bases(generator)
    R = change_of_basis(V, new)
    close(R, torch.linalg.lstsq(V, new).solution)
    close(change_of_basis(V, V), torch.eye(R_, dtype=torch.float64))
    twice = V[:, [0, 0, 1, 2]]  # a coordinate drawn twice: the least-norm solution, finite
    close(twice @ change_of_basis(twice, new), twice @ torch.linalg.pinv(twice) @ new)


@pytest.mark.parametrize("order", [("step", "exp_avg", "exp_avg_sq"), ("exp_avg_sq", "exp_avg", "step")])
def test_each_policy_is_its_formula(order: tuple[str, ...], generator: torch.Generator) -> None:
    """In whatever order the optimizer keeps its state: N is moved with the old M, not with the one already moved."""
    V, new = bases(generator)
    full = state(generator)
    old = {key: full[key] for key in order}
    M, N = old["exp_avg"], old["exp_avg_sq"]
    R = torch.linalg.inv(V.mT @ V) @ V.mT @ new
    assert carried("reset", old, V, new) == {}
    for policy in POLICIES[1:]:
        assert carried(policy, old, V, new)["step"] == 7  # the bias correction goes on
    kept = carried("keep", old, V, new)
    assert torch.equal(kept["exp_avg"], M) and torch.equal(kept["exp_avg_sq"], N)
    first = carried("reproject_first", old, V, new)
    close(first["exp_avg"], M @ R)
    assert torch.equal(first["exp_avg_sq"], N)
    both = carried("reproject_both", old, V, new)
    close(both["exp_avg"], M @ R)
    close(both["exp_avg_sq"][1:], (N - M.square())[1:] @ R.square() + (M @ R).square()[1:])
    close(both["exp_avg_sq"][0], ((0.3**0.5 * M[0]) @ R).square())  # M counts as √N where M² is above N
    rows = carried("row_scale", old, V, new)
    assert not bool(rows["exp_avg"].any())
    close(rows["exp_avg_sq"], N.mean(1, keepdim=True).expand(M_, R_))


@pytest.mark.parametrize("policy", ["reproject_first", "reproject_both"])
@pytest.mark.parametrize("steps", [1, 5, 200])
def test_an_unchanged_subspace_leaves_the_state_unchanged(policy: Policy, steps: int, generator: torch.Generator) -> None:
    """Also the state that Adam has after few steps, when N lags far behind M²."""
    V, _ = bases(generator)
    B = nn.Parameter(torch.zeros(M_, R_, dtype=torch.float64))
    optimizer = torch.optim.AdamW([B], amsgrad=True)
    for _ in range(steps):
        B.grad = 1 + 0.1 * torch.randn(M_, R_, generator=generator, dtype=torch.float64)
        optimizer.step()
    old = dict(optimizer.state[B])
    new = carried(policy, old, V, V.clone())
    for key, value in old.items():
        close(new[key], value)
    assert bool((old["exp_avg_sq"] < old["exp_avg"].square()).all()), "the case the name promises"


@pytest.mark.parametrize("policy", ["reproject_first", "reproject_both"])
def test_inside_one_subspace_the_first_moment_is_carried_exactly(policy: Policy, generator: torch.Generator) -> None:
    """V′ = VR with R orthogonal, V of orthonormal columns: M → MR, and the lifted M·Vᵀ does not change."""
    V = HaarStiefel(n=N_, rank=R_, c=R_ / N_).sample(generator=generator, dtype=torch.float64)
    R = torch.linalg.qr(torch.randn(R_, R_, generator=generator, dtype=torch.float64))[0]
    old = state(generator)
    new = carried(policy, old, V, V @ R)
    close(new["exp_avg"], old["exp_avg"] @ R)
    close(new["exp_avg"] @ (V @ R).mT, old["exp_avg"] @ V.mT)
    if policy == "reproject_both":
        close(new["exp_avg_sq"].sum(1)[1:], old["exp_avg_sq"].sum(1)[1:])  # a rotation keeps Σ E[g²]


def test_signed_permutations_are_exact_for_both_moments(generator: torch.Generator) -> None:
    """The coordinate law draws the same coordinates in another order: each coordinate keeps its own M and N."""
    V = Coordinate(n=N_, rank=R_).sample(generator=generator, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    old = state(generator)
    new = carried("reproject_both", old, V, V[:, order] * sign)
    close(new["exp_avg"], old["exp_avg"][:, order] * sign)
    close(new["exp_avg_sq"], old["exp_avg_sq"][:, order])


def test_momentum_alone_and_empty_states(generator: torch.Generator) -> None:
    V, new = bases(generator)
    M = torch.randn(M_, R_, generator=generator, dtype=torch.float64)
    R = change_of_basis(V, new)
    expectations: dict[Policy, Tensor] = {"reproject_first": M @ R, "reproject_both": M @ R, "row_scale": 0 * M, "keep": M}
    for policy, expected in expectations.items():
        close(carried(policy, {"momentum_buffer": M}, V, new)["momentum_buffer"], expected)
    second = carried("reproject_both", {"exp_avg_sq": M.square()}, V, new)["exp_avg_sq"]  # no first moment: all of it is variance
    close(second, M.square() @ R.square())
    for policy in POLICIES:
        assert carried(policy, {}, V, new) == {}


@pytest.mark.parametrize("policy", [p for p in POLICIES if p not in ("reset", "keep")])
def test_a_state_of_unknown_meaning_is_refused_and_untouched(policy: Policy, generator: torch.Generator) -> None:
    V, new = bases(generator)
    old = state(generator) | {"exp_inf": torch.ones(M_, R_, dtype=torch.float64)}
    copy = {key: value.clone() for key, value in old.items()}
    with pytest.raises(ValueError, match=rf"carry\(policy='{policy}'\): do not know what the optimizer state 'exp_inf' means"):
        carry(policy, copy, V, new)
    assert all(torch.equal(copy[key], old[key]) for key in old)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_policy_is_named(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"carry\(policy='forget'\): unknown policy, known are reset, keep"):
        carry("forget", {}, *bases(generator))  # pyright: ignore[reportArgumentType]


# The second moment alone


def renewed(policy: Policy, second: Second | None, old: dict[str, Any], V: Tensor, new: Tensor, seed: int = 1) -> dict[str, Any]:
    copy = {key: value.clone() for key, value in old.items()}
    carry(policy, copy, V, new, second, torch.Generator().manual_seed(seed))
    return copy


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_of_the_second_moment_is_its_formula(policy: Policy, generator: torch.Generator) -> None:
    """Whatever happens to the first; and that is what it is without."""
    V, new = bases(generator)
    old = state(generator)
    M, N, R = old["exp_avg"], old["exp_avg_sq"], change_of_basis(V, new)
    rows = N.mean(1, keepdim=True)
    z = torch.randn(M_, R_, generator=torch.Generator().manual_seed(1))
    expected = {
        "zero": 0 * N,
        "keep": N,
        "reproject": carried("reproject_both", old, V, new)["exp_avg_sq"],
        "row_scale": rows.expand_as(N),
        "random": rows * z.square(),
        "first_batch": 0 * N,
    }
    assert set(expected) == set(SECONDS)
    for second, right in expected.items():
        found = renewed(policy, second, old, V, new)  # pyright: ignore[reportArgumentType]
        if (policy, second) == ("reset", "zero"):
            assert found == {}  # Adam anew
            continue
        close(found["exp_avg_sq"], right)
        close(found["exp_avg"], {"keep": M, "reproject_first": M @ R, "reproject_both": M @ R}.get(policy, 0 * M))
        assert found["step"] == 7 and bool((found["exp_avg_sq"] >= 0).all())
    own = {"reproject_both": "reproject", "row_scale": "row_scale", "keep": "keep", "reproject_first": "keep"}
    if policy in own:
        plain, same = renewed(policy, None, old, V, new), renewed(policy, own[policy], old, V, new)  # pyright: ignore[reportArgumentType]
        assert all(torch.equal(plain[key], same[key]) for key in plain)
    else:
        assert renewed(policy, None, old, V, new) == {}


def test_the_random_second_moment_has_the_scale_of_the_rows(generator: torch.Generator) -> None:
    """E[N] is the row's mean, E[N²] three times its square, E[NN′] its square: χ² of one degree of freedom, independent entries."""
    old = {"exp_avg_sq": torch.tensor([[1.0, 3.0], [0.0, 0.5]], dtype=torch.float64)}
    V = torch.eye(2, dtype=torch.float64)
    means = torch.tensor([[2.0], [0.25]], dtype=torch.float64)

    def draw(size: int, g: torch.Generator) -> Tensor:
        wide = {"exp_avg_sq": old["exp_avg_sq"].repeat(size, 1)}  # rows are independent
        carry("keep", wide, V, V, "random", g)
        squares = wide["exp_avg_sq"].view(size, 2, 2) / means
        return torch.cat([squares.flatten(1), squares.square().flatten(1) / 3, squares.prod(-1)], 1)

    assert_mean(draw, 1.0, draws=400_000, resolution=0.05, generator=generator)


@pytest.mark.parametrize("wrong", ["|z|", "one z a row", "scale of the matrix"])
def test_a_wrong_random_second_moment_is_rejected(wrong: str, generator: torch.Generator) -> None:
    def draw(size: int, g: torch.Generator) -> Tensor:
        z = torch.randn(size, 2, 2, generator=g, dtype=torch.float64)
        made = {"|z|": z.abs(), "one z a row": z[..., :1].square().expand(size, 2, 2), "scale of the matrix": z.square() * 1.125 / 2}[wrong]
        return torch.cat([made.flatten(1), made.square().flatten(1) / 3, made.prod(-1)], 1)

    with pytest.raises(AssertionError, match="z ="):
        assert_mean(draw, 1.0, draws=400_000, resolution=0.15, generator=generator)  # z⁴ of the mutants spreads more


def test_the_first_batch_fills_every_second_moment(generator: torch.Generator) -> None:
    B = torch.randn(M_, R_, generator=generator, dtype=torch.float64)
    full = state(generator) | {"max_exp_avg_sq": torch.ones(M_, R_, dtype=torch.float64)}
    M = full["exp_avg"].clone()
    fill(full, B)
    assert (
        torch.equal(full["exp_avg_sq"], B.square()) and torch.equal(full["max_exp_avg_sq"], B.square()) and torch.equal(full["exp_avg"], M)
    )


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_second_moment_is_named(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"carry\(second='forget'\): unknown policy, known are zero, keep"):
        carry("keep", {}, *bases(generator), second="forget")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"unknown second_moment 'forget', known are zero, keep"):
        convert(nn.Sequential(nn.Linear(8, 8)), rank=2, second_moment="forget")  # pyright: ignore[reportArgumentType]


# With real optimizers


def adamw_8bit(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(parameters, lr=0.01)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.02),
    "AdamW8bit": adamw_8bit,
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, eps=(None, 1.0)),  # its step is relative to the size of B, which is zero
}


def run(
    name: str, policy: Policy, law: str, steps: int = 18, second: Second | None = None
) -> tuple[list[float], torch.optim.Optimizer, Any]:
    """Losses of a linear regression with a 256×64 weight at rank 16 (B: 4096 numbers, from where 8-bit states are 8-bit)."""
    g = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 256, bias=False))
    with torch.no_grad():
        model.get_parameter("0.weight").zero_()
    X, target = torch.randn(128, 64, generator=g), torch.randn(64, 256, generator=g) / 8
    handle = convert(model, law=law, rank=16, refresh_every=3, state=policy, second_moment=second)
    optimizer = OPTIMIZERS[name](handle.subspace_parameters())
    handle.attach(optimizer)
    losses = []
    for _ in range(steps):
        loss = (model(X) - X @ target).square().sum(1).mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        handle.step(optimizer)
        optimizer.zero_grad()
    return losses, optimizer, handle


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """torchao compiles its step; the same step runs uncompiled here, to save the seconds."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_runs_under_every_policy_it_supports(name: str, policy: Policy) -> None:
    law = "spectral"  # its first subspace is Haar–Stiefel
    if name == "Adafactor" and policy not in ("reset", "keep"):
        with pytest.raises(ValueError, match=r"do not know what the optimizer state 'row_var' means, use 'reset' or 'keep'"):
            run(name, policy, law)
        return
    losses, optimizer, handle = run(name, policy, law)
    assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] < 0.9 * losses[0], losses
    B = handle.layers["0"].B
    if name == "AdamW8bit":
        assert not handle.steps % 3 and (policy == "reset") == (B not in optimizer.state or not optimizer.state[B])
        if policy != "reset":
            assert type(optimizer.state[B]["exp_avg"]).__name__ == "OptimState8bit"  # stays 8-bit when it is carried


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("policy", ["reproject_first", "reproject_both", "row_scale"])
def test_eight_bit_states_are_carried_as_float_states_are(policy: Policy) -> None:
    _, optimizer, handle = run("AdamW8bit", "keep", "haar_stiefel")
    V, new = HaarStiefel(n=64, rank=16).sample(2, generator=torch.Generator().manual_seed(1))
    coarse = optimizer.state[handle.layers["0"].B]
    exact = {key: coarse[key].dequantize(torch.float32).clone() for key in ("exp_avg", "exp_avg_sq")}
    carry(policy, coarse, V, new)
    carry(policy, exact, V, new)
    for key, value in exact.items():
        error = float((coarse[key].dequantize(torch.float32) - value).abs().max())
        assert error <= 0.02 * float(value.abs().max())  # the spacing of the 8-bit code


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("second", SECONDS)
@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "SGD momentum"])
def test_every_second_moment_trains(name: str, second: Second) -> None:
    policy = "reset" if second in ("zero", "first_batch") else "reproject_first"
    losses, optimizer, handle = run(name, policy, "haar_stiefel", second=second)
    assert all(torch.isfinite(torch.tensor(losses))) and losses[-1] < 0.9 * losses[0], losses
    if name == "SGD momentum":  # which has none
        assert losses == run(name, policy, "haar_stiefel")[0]
    if name == "AdamW8bit" and second != "zero":
        assert type(optimizer.state[handle.layers["0"].B]["exp_avg_sq"]).__name__ == "OptimState8bit"


@pytest.mark.parametrize("policy", ["reset", "reproject_first"])
def test_data_driven_is_the_squared_gradient_of_the_first_batch(policy: Policy) -> None:
    """In the step after a redraw N = B² exactly before Adam's step and up to rounding after it, with the gradient as it was clipped."""
    g = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 16, bias=False))
    handle = convert(model, rank=4, refresh_every=3, state=policy, second_moment="first_batch")
    B = handle.layers["0"].B
    optimizer = torch.optim.AdamW([B], lr=0.01, betas=(0.9, 0.95))
    handle.attach(optimizer)
    seen: dict[int, Tensor] = {}
    for step in range(1, 8):
        model(torch.randn(8, 12, generator=g)).square().mean().backward()
        nn.utils.clip_grad_norm_([B], 0.1)
        assert B.grad is not None
        square = B.grad.square()
        before = {key: value.clone() for key, value in optimizer.state[B].items()}
        optimizer.step()
        seen[step] = (optimizer.state[B]["exp_avg_sq"] / square - 1).abs().max()
        if step in (4, 7):
            assert not bool(before["exp_avg_sq"].any()) and before["step"] == step - 1
        handle.step(optimizer)
        optimizer.zero_grad()
    assert [step for step, error in seen.items() if float(error) < 1e-6] == [4, 7]


@pytest.mark.parametrize("second", ["zero", "first_batch"])
@pytest.mark.parametrize("policy", ["reset", "keep"])
def test_the_step_after_a_redraw(policy: Policy, second: Second, generator: torch.Generator) -> None:
    """Of Adam, t steps made: with M forgotten its entries are bounded, with M carried they are about M/|B|, without a bound."""
    beta1, beta2, eta, t = 0.9, 0.95, 0.01, 7
    V, new = bases(generator)
    B = nn.Parameter(torch.zeros(M_, R_, dtype=torch.float64))
    optimizer = torch.optim.AdamW([B], lr=eta, betas=(beta1, beta2), eps=0.0, weight_decay=0.0)
    optimizer.state[B] = state(generator)
    M = optimizer.state[B]["exp_avg"].clone()
    carry(policy, optimizer.state[B], V, new, second)
    B.grad = torch.randn(M_, R_, generator=generator, dtype=torch.float64)
    if second == "first_batch":
        fill(optimizer.state[B], B.grad)
    optimizer.step()
    share = 1.0 if second == "first_batch" else 1 - beta2
    size = eta / (1 - beta1 ** (t + 1)) * (1 - beta2 ** (t + 1)) ** 0.5 / share**0.5
    if policy == "keep":
        expected = -size * (beta1 * M + (1 - beta1) * B.grad) / B.grad.abs()
    else:
        expected = -(eta if second == "zero" else size * (1 - beta1)) * B.grad.sign()
    close(B.detach(), expected)
    assert (float(B.detach().abs().max()) > 3 * eta) == (policy == "keep")


def test_without_an_optimizer_that_was_shown_the_first_batch_is_refused() -> None:
    model = nn.Sequential(nn.Linear(12, 16))
    handle = convert(model, rank=4, refresh_every=1, second_moment="first_batch")
    optimizer = torch.optim.AdamW(handle.parameters())
    model(torch.ones(2, 12)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"call attach\(optimizer\) once, before the first step"):
        handle.step(optimizer)


def test_a_redraw_without_the_optimizer_needs_a_state_that_is_kept() -> None:
    for second, fine in (("keep", True), (None, True), ("zero", False)):
        handle = convert(nn.Sequential(nn.Linear(12, 16)), rank=4, refresh_every=1, state="keep", second_moment=second)  # pyright: ignore
        if fine:
            handle.step()
        else:
            with pytest.raises(ValueError, match="needs the optimizer"):
                handle.step()
