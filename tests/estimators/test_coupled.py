"""The coupled step of a bilinear pair: its formula, the identity behind it, where it is the plain step, and a model that stalls without it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from estimators import Coupling, convert
from estimators.coupled import coupled
from theory import coupled as exact

M_, N_, R_ = 6, 9, 5
ALPHA = 0.25


def factors(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """X whose first two columns have vanished beside A, and a step of it."""
    X, A, step = (torch.randn(size, R_, generator=generator, dtype=torch.float64) for size in (M_, N_, M_))
    X[:, :2] *= 1e-2
    step *= 1e-3
    step[:, 0] = -0.1 * X[:, 0]  # shrinks
    step[:, 1] = 0.1 * X[:, 1]  # grows
    return X, A, step


def test_it_is_its_formula_where_a_vanished_column_shrinks_and_the_plain_step_elsewhere(generator: torch.Generator) -> None:
    X, A, step = factors(generator)
    step[:, 0] += 1e-3 * torch.randn(M_, generator=generator, dtype=torch.float64)
    new = X + step
    beta = -(X[:, 0] @ step[:, 0]) / (X[:, 0] @ X[:, 0])
    found = coupled(X, new, A, ALPHA)
    assert float(beta) > 0
    torch.testing.assert_close(found[:, 0], new[:, 0] + beta * X[:, 0], rtol=0, atol=1e-15)
    assert abs(float(X[:, 0] @ (found[:, 0] - X[:, 0]))) < 1e-16  # it turns, and is not made smaller
    assert torch.equal(found[:, 1:], new[:, 1:])


def test_beta_is_the_coupled_gradient(generator: torch.Generator) -> None:
    """Of gradient descent on any L(XAᵀ): ⟨xⱼ, ∂L/∂xⱼ⟩ = ⟨aⱼ, ∂L/∂aⱼ⟩."""
    X, A, _ = factors(generator)
    X, A = X.requires_grad_(), A.requires_grad_()
    target = torch.randn(M_, N_, generator=generator, dtype=torch.float64)
    dX, dA = torch.autograd.grad((X @ A.mT - target).square().sum().exp().log1p(), (X, A))
    torch.testing.assert_close((X * dX).sum(0), (A * dA).sum(0), rtol=1e-10, atol=1e-12)
    x, eta = X.detach(), 1e-3
    found = coupled(x, x - eta * dX, A.detach(), 1e9)
    beta = eta * (A.detach() * dA).sum(0).clamp_min(0) / x.square().sum(0)
    torch.testing.assert_close(found, x - eta * dX + beta * x, rtol=0, atol=1e-12)
    assert bool((beta > 0).any()), "the case the name promises"


def test_where_nothing_is_coupled_it_is_the_plain_step(generator: torch.Generator) -> None:
    X, A, step = factors(generator)
    for partner in (torch.zeros_like(A), 1e-3 * A):  # nothing has vanished beside it
        assert torch.equal(coupled(X, X + step, partner, ALPHA), X + step)
    zero = torch.zeros_like(X)
    assert torch.equal(coupled(zero, zero + step, A, ALPHA), step)  # B = 0 before every step
    small = 1e-30 * X.float()
    assert torch.equal(coupled(small, 0.5 * small, A.float(), ALPHA), 0.5 * small)  # its square is zero in float32


def test_sixteen_bits_are_computed_in_thirty_two(generator: torch.Generator) -> None:
    X, A, step = (t.to(torch.bfloat16) for t in factors(generator))
    new = X + step
    wide = coupled(X.float(), new.float(), A.float(), ALPHA).to(torch.bfloat16)
    found = coupled(X, new, A, ALPHA)
    assert found.dtype == torch.bfloat16 and torch.equal(found, wide) and not torch.equal(found, new)


def descend(x: float, a: float, steps: int, threshold: float, sigma: float = 1.0) -> list[tuple[float, float]]:
    """Proximal descent on ½(σ − xa)² + λ|x| as an optimizer, with ``Coupling`` from threshold > 0 on."""
    _, penalty, eta = SPARSE
    X, A = (nn.Parameter(torch.tensor([[value]], dtype=torch.float64)) for value in (x, a))

    def shrink(*_: object) -> None:
        with torch.no_grad():
            X.sub_(eta * penalty).clamp_(min=0)

    optimizer = torch.optim.SGD([X, A], lr=eta)
    optimizer.register_step_post_hook(shrink)  # hooks run in their order: the proximal step is the optimizer's own
    if threshold:
        Coupling(optimizer, lambda: [(X, A)], threshold)
    path = [(x, a)]
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * (sigma - X @ A.mT).square().sum()).backward()
        optimizer.step()
        path.append((float(X.detach()), float(A.detach())))
    return path


SPARSE = (1.0, 0.6, 0.05)  # σ, λ, η
START = (0.05, 0.4)


def test_a_vanished_factor_is_revived_where_plain_descent_stalls() -> None:
    """Within the numbers of steps that theory gives; in float64, without randomness."""
    plain = descend(*START, 200, 0.0)
    assert exact.stalls(*SPARSE[:2], *START)
    vanished = exact.steps_to_vanish(*SPARSE, *START)
    assert all(x == 0 for x, _ in plain[vanished:]) and len({a for _, a in plain[vanished:]}) == 1
    assert float(exact.loss(*SPARSE[:2], *plain[-1])) == 0.5 * SPARSE[0] ** 2
    assert plain[1] == pytest.approx(exact.descent(*SPARSE, *START), rel=1e-14)

    revived = exact.steps_to_revive(*SPARSE, *START)
    path = descend(*START, 2000, ALPHA)
    codes = [x for x, _ in path]
    grew = next(t for t, x in enumerate(codes) if x > START[0] * (1 + 1e-9))
    assert grew <= revived + 1 and codes[: grew - 1] == pytest.approx([START[0]] * (grew - 1), rel=1e-12)
    assert float(exact.loss(*SPARSE[:2], *path[-1])) < 0.25  # half of where plain descent stays


def test_a_component_that_ought_to_vanish_cannot() -> None:
    """What it costs: with nothing to learn, descent ends at x = 0, the coupled step where it began."""
    assert descend(*START, 50, 0.0, sigma=0.0)[-1][0] == 0
    assert descend(*START, 50, ALPHA, sigma=0.0)[-1][0] == pytest.approx(START[0], rel=1e-12)


def lora(threshold: float) -> tuple[Tensor, Tensor, list[Tensor]]:
    """B (m×r) and A (r×n) after some steps of Adam with decay, and the paths of ‖b₀‖; b₀ has vanished."""
    g = torch.Generator().manual_seed(5)
    B, A = (nn.Parameter(torch.randn(shape, generator=g, dtype=torch.float64)) for shape in ((M_, R_), (R_, N_)))
    with torch.no_grad():
        B[:, 0] *= 1e-3
        A[1] *= 1e-3
    optimizer = torch.optim.AdamW([B, A], lr=1e-5, weight_decay=1e3)  # the step is shrinking
    if threshold:
        Coupling(optimizer, lambda: [(B, A.mT)], threshold)
    sizes = []
    for _ in range(5):
        optimizer.zero_grad()
        (B @ A).square().sum().backward()
        optimizer.step()
        sizes.append(torch.stack([B.detach()[:, 0].norm(), A.detach()[1].norm(), B.detach()[:, 2].norm()]))
    return B.detach(), A.detach(), sizes


def test_both_sides_of_a_pair_and_views() -> None:
    """A is given as a view of the parameter; of either factor only the vanished component is kept."""
    plain_B, plain_A, plain = lora(0.0)
    B, A, sizes = lora(ALPHA)
    for i in (0, 1):
        assert float(plain[-1][i]) < 0.97 * float(plain[0][i]) and float(sizes[-1][i]) >= float(sizes[0][i])
    assert float(sizes[-1][2]) < 0.97 * float(sizes[0][2])
    assert not torch.equal(B, plain_B) and not torch.equal(A, plain_A)


@pytest.mark.parametrize("lift_every", [1, 4])
def test_a_converted_layer(lift_every: int) -> None:
    """With a lift at every step the coupled run is the plain one to the last bit; with rarer ones V stays what it is, and B does not shrink."""
    found = []
    for threshold in (0.0, 10.0):
        g = torch.Generator().manual_seed(2)
        model = nn.Sequential(nn.Linear(12, 10, bias=False))
        with torch.no_grad():
            model.get_parameter("0.weight").copy_(torch.randn(10, 12, generator=g))
        handle = convert(model, rank=3, lift_every=lift_every, refresh_every=4)
        layer = handle.layers["0"]
        optimizer = torch.optim.SGD(handle.subspace_parameters(), lr=2.0)  # overshoots
        if threshold:
            Coupling(optimizer, lambda layer=layer: [(layer.B, layer.basis())], threshold)
        X = torch.randn(16, 12, generator=g)
        for step in range(8):
            V, B = layer.basis().clone(), layer.B.detach().clone()
            model(X).square().mean().backward()
            optimizer.step()
            assert torch.equal(layer.basis(), V)
            if threshold and step % lift_every:
                assert bool((layer.B.detach().norm(dim=0) >= (1 - 1e-6) * B.norm(dim=0)).all())
            handle.step(optimizer)
            optimizer.zero_grad()
        found.append(handle.finalize().get_parameter("0.weight").detach().clone())
    assert torch.equal(*found) == (lift_every == 1)


def test_a_threshold_that_is_none_is_refused() -> None:
    for threshold in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match=r"Coupling\(threshold=.*\): must be positive and finite"):
            Coupling(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), list, threshold)


STEPS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "honest": lambda old, new, partner: coupled(old, new, partner, ALPHA),
    "corrected everywhere": lambda old, new, partner: coupled(old, new, partner, 1e9),
    "never corrected": lambda _, new, __: new,
    "no step where it has vanished": lambda old, new, partner: torch.where(old.norm(dim=0) < ALPHA * partner.norm(dim=0), old, new),
    "squares compared with the threshold": lambda old, new, partner: coupled(old, new, partner, ALPHA**0.5),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_wrong_correction_is_rejected(name: str, generator: torch.Generator) -> None:
    """Every mutant differs from the definition on one of three columns: vanished and shrinking, vanished and growing, not vanished."""
    X, A, step = factors(generator)
    step[:, 2] = -0.1 * X[:, 2]
    A[:, 2] *= X[:, 2].norm() / A[:, 2].norm() / 0.4  # between α and √α
    found = STEPS[name](X, X + step, A)
    right = torch.stack([X[:, 0], X[:, 1] + step[:, 1], X[:, 2] + step[:, 2]], 1)
    assert torch.allclose(found[:, :3], right, rtol=1e-12, atol=0) == (name == "honest")
