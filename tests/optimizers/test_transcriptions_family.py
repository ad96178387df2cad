"""(b) 50 steps of the rest of the family against their naive float64 transcriptions, for wide, square and tall matrices, to 1e-9."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optimizers import (
    COAP,
    FOAM,
    GUM,
    LISA,
    LOMO,
    RSO,
    AdaLomo,
    BAdam,
    DCTAdamW,
    Dion,
    GradNormLoRP,
    Grass,
    GrassSampled,
    MoFaSGD,
    Muon,
    OnlineSubspaceDescent,
    OwLore,
    QGaLore,
    Trion,
)
from optimizers.dion import Iterate
from optimizers.frames import ScaledColumns
from optimizers.gum import Coin
from optimizers.inner import Adafactor, Momentum
from optimizers.learned import sketched_directions
from optimizers.outputs import Lift
from tests.optimizers import transcriptions_family as naive
from tests.optimizers.test_transcriptions import EVERY, OURS, RANK, SHAPES, STEPS, compare, frames, ours, problem

RULE: dict[str, Any] = {"lr": 0.02, "wd": 0.1}
GIVEN: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "rank": RANK}


def adam() -> naive.Adam:
    return naive.Adam(0.9, 0.97, 1e-6)


@pytest.mark.check("b", "q_galore")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.01])
def test_q_galore(shape: tuple[int, int], threshold: float) -> None:
    refreshes: list[int] = []

    def rule(W: np.ndarray, Gs: list[np.ndarray]) -> list[np.ndarray]:
        out, at = naive.q_galore(W, Gs, RANK, 3, alpha=0.7, kept=2, threshold=threshold, adam=adam(), **RULE)
        refreshes.extend(at)
        return out

    made: list[QGaLore] = []

    def optimizer(ps: list[nn.Parameter]) -> QGaLore:
        made.append(QGaLore(ps, scale=0.7, kept=2, threshold=threshold, rounding="nearest", **{**OURS, **GIVEN, "every": 3}))
        return made[0]

    compare(shape, optimizer, rule, None)
    (state,) = made[0].state.values()
    assert state["draws"] == len(refreshes)
    assert (len(refreshes) < STEPS // 3) == (threshold < 1)


@pytest.mark.check("b", "coap")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("carry", [False, True])
def test_coap(shape: tuple[int, int], carry: bool) -> None:
    m = min(shape)
    omega = np.random.default_rng(8).standard_normal((m, RANK))
    W, Gs = problem(shape)
    G = torch.tensor(Gs[0] if shape[0] >= shape[1] else Gs[0].T)
    V = sketched_directions(G, torch.tensor(omega)).numpy()

    def optimizer(ps: list[nn.Parameter]) -> COAP:
        return COAP(ps, scale=0.7, recalibrate=3, basis_lr=0.3, carry=carry, **(OURS | GIVEN))

    def first(t: int) -> Any:
        return V if t == 0 else None

    expected = lambda W, Gs: naive.coap(W, Gs, omega, EVERY, 3, alpha=0.7, eta=0.3, carry=carry, adam=adam(), **RULE)  # noqa: E731
    del W
    compare_first(shape, optimizer, expected, first)


def compare_first(shape: tuple[int, int], optimizer: Any, rule: Any, first: Any) -> None:
    """As ``compare`` with a frame for the first step only."""
    from optimizers.frames import Dense

    def made(ps: list[nn.Parameter]) -> Any:
        held = optimizer(ps)
        held.inject = lambda _, t: None if first(t) is None else Dense(torch.tensor(first(t)))
        return held

    compare(shape, made, rule, None)


@pytest.mark.check("b", "online_subspace")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("basis", ["adam", "sgd"])
def test_online_subspace(shape: tuple[int, int], basis: Any) -> None:
    own = {key: value for key, value in OURS.items() if key not in ("rank", "every")}
    compare(
        shape,
        lambda ps: OnlineSubspaceDescent(ps, scale=0.7, basis=basis, basis_lr=2.0, penalty=0.3, **(own | GIVEN)),
        lambda W, Gs: naive.online_subspace(W, Gs, RANK, alpha=0.7, eta=0.04, penalty=0.3, sgd=basis == "sgd", adam=adam(), **RULE),
        None,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "kind, repeated",
    [
        pytest.param(Grass, False, marks=pytest.mark.check("b", "grass")),
        pytest.param(GrassSampled, True, marks=pytest.mark.check("b", "grass_sampled")),
    ],
)
def test_grass(shape: tuple[int, int], kind: type[Grass], repeated: bool) -> None:
    m = min(shape)
    rng = np.random.default_rng(4)
    drawn = [rng.choice(m, RANK, replace=repeated) for _ in range(STEPS)]
    scales = rng.uniform(0.5, 2, (STEPS, RANK))

    def made(ps: list[nn.Parameter]) -> Grass:
        held = kind(ps, scale=0.7, **(OURS | GIVEN))
        held.inject = lambda _, t: ScaledColumns(torch.tensor(drawn[t // EVERY]), torch.tensor(scales[t // EVERY]))
        return held

    compare(
        shape,
        made,
        lambda W, Gs: naive.grass(W, Gs, lambda t: drawn[t // EVERY], lambda t: scales[t // EVERY], EVERY, alpha=0.7, adam=adam(), **RULE),
        None,
    )


@pytest.mark.check("b", "rso")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pull", [0.0, 0.5])
def test_rso(shape: tuple[int, int], pull: float) -> None:
    P = frames(shape, gaussian=True)
    compare(
        shape,
        lambda ps: RSO(ps, scale=0.7, pull=pull, **(OURS | GIVEN)),
        lambda W, Gs: naive.rso(W, Gs, P, EVERY, alpha=0.7, pull=pull, adam=adam(), **RULE),
        P,
    )


def plain(shape: tuple[int, int], optimizer: Any, rule: Any, P: Any = None) -> None:
    """As ``compare`` for rules that know rows from columns."""
    W, Gs = problem(shape)
    mine, expected = ours(optimizer, W, Gs, P), rule(W, Gs)
    for t, (a, b) in enumerate(zip(mine, expected, strict=True)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9, err_msg=f"step {t}")
    assert np.abs(mine[-1] - W).max() > 0.05


@pytest.mark.check("b", "grad_norm_lorp")
@pytest.mark.parametrize("shape", SHAPES)
def test_grad_norm_lorp(shape: tuple[int, int]) -> None:
    P = frames(shape)
    plain(
        shape,
        lambda ps: GradNormLoRP(ps, scale=0.7, **(OURS | GIVEN)),
        lambda W, Gs: naive.grad_norm_lorp(W, Gs, P, alpha=0.7, adam=adam(), lengths=adam(), **RULE),
        P,
    )


@pytest.mark.check("b", "foam")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("level", [1, 3])
def test_foam(shape: tuple[int, int], level: int) -> None:
    plain(
        shape,
        lambda ps: FOAM(ps, lr=0.02, weight_decay=0.1, level=level, scale=0.7, betas=(0.9, 0.97), eps=1e-6),
        lambda W, Gs: naive.foam(W, Gs, level, alpha=0.7, b1=0.9, b2=0.97, eps=1e-6, **RULE),
    )


@pytest.mark.check("b", "dct_adamw")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("norm, rotate, feedback", [("l1", True, True), ("l2", False, True), ("l2", True, False)])
@pytest.mark.parametrize("every", [1, EVERY])
def test_dct_adamw(shape: tuple[int, int], norm: Any, rotate: bool, feedback: bool, every: int) -> None:
    compare(
        shape,
        lambda ps: DCTAdamW(ps, norm=norm, rotate=rotate, feedback=feedback, **{**OURS, **GIVEN, "every": every}),
        lambda W, Gs: naive.dct_adamw(W, Gs, RANK, every, l2=norm == "l2", rotate=rotate, feedback=feedback, adam=adam(), **RULE),
        None,
    )


@pytest.mark.check("b", "muon")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon(shape: tuple[int, int], nesterov: bool) -> None:
    compare(
        shape,
        lambda ps: Muon(ps, lr=0.02, weight_decay=0.1, momentum=0.8, nesterov=nesterov, adjust="none", precision="full"),
        lambda W, Gs: naive.muon(W, Gs, beta=0.8, nesterov=nesterov, **RULE),
        None,
    )


@pytest.mark.check("b", "trion")
@pytest.mark.parametrize("shape", SHAPES)
def test_trion(shape: tuple[int, int]) -> None:
    compare(
        shape,
        lambda ps: Trion(ps, mu=0.8, adjust="none", precision="full", **GIVEN),
        lambda W, Gs: naive.trion(W, Gs, RANK, mu=0.8, **RULE),
        None,
    )


@pytest.mark.check("b", "dion")
@pytest.mark.parametrize("shape", SHAPES)
def test_dion(shape: tuple[int, int]) -> None:
    Q = np.random.default_rng(2).standard_normal((min(shape), RANK))
    _, Gs = problem(shape)
    G = torch.tensor(Gs[0] if shape[0] < shape[1] else Gs[0].T)  # its larger side is the one that is projected
    first = Iterate(torch.linalg.qr(G.mT @ torch.tensor(Q))[0], torch.tensor(Q))

    def made(ps: list[nn.Parameter]) -> Dion:
        held = Dion(ps, mu=0.8, adjust="none", eps=0.0, **GIVEN)
        held.inject = lambda _, t: first if t == 0 else None
        return held

    compare(shape, made, lambda W, Gs: naive.dion(W, Gs, Q, mu=0.8, **RULE), None)


@pytest.mark.check("b", "mofasgd")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum, rest", [("ones", None), ("reciprocal", 0.3)])
def test_mofasgd(shape: tuple[int, int], spectrum: str, rest: float | None) -> None:
    """The block form of 2r×2r matrices is the dense recursion."""
    largest = 0.2 if spectrum == "reciprocal" else None
    compare(
        shape,
        lambda ps: MoFaSGD(ps, beta=0.8, spectrum=spectrum, largest=0.2, rest_scale=rest, **GIVEN),
        lambda W, Gs: naive.mofasgd(W, Gs, RANK, beta=0.8, rest=rest or 0.0, largest=largest, **RULE),
        None,
    )


@pytest.mark.check("b", "gum")
@pytest.mark.parametrize("shape", SHAPES)
def test_gum(shape: tuple[int, int]) -> None:
    P, q = frames(shape), 0.3
    coins = np.random.default_rng(1).uniform(size=STEPS) < 0.5

    def made(ps: list[nn.Parameter]) -> GUM:
        held = GUM(ps, every=EVERY, share=q, momentum=0.8, adjust="none", precision="full", **GIVEN)
        held.inject = lambda _, t: Coin(torch.tensor(P(t)), int(coins[t // EVERY]), 1 / q if coins[t // EVERY] else 1 / (1 - q))
        return held

    compare(shape, made, lambda W, Gs: naive.gum(W, Gs, P, lambda t: bool(coins[t // EVERY]), EVERY, q=q, beta=0.8, **RULE), None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(LISA, marks=pytest.mark.check("b", "lisa")),
        pytest.param(BAdam, marks=pytest.mark.check("b", "badam")),
        pytest.param(OwLore, marks=pytest.mark.check("b", "owlore")),
    ],
)
def test_by_turns(shape: tuple[int, int], method: Any) -> None:
    """Two layers, one of them open at a time; the one that is looked at moves in its own periods alone."""
    seen: list[list[bool]] = []

    def made(ps: list[nn.Parameter]) -> Any:
        other = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        named = [("layers.0.weight", ps[0]), ("layers.1.weight", other)]
        return method(named, layers=1, every=EVERY, freeze=False, betas=(0.9, 0.97), eps=1e-6, **GIVEN, **method.takes(scale=0.7))

    W, Gs = problem(shape)
    p = nn.Parameter(torch.tensor(W))
    optimizer, mine = made([p]), []
    for G in Gs:
        seen.append(list(optimizer.param_groups[0]["open"]))
        p.grad = torch.tensor(G)
        optimizer.step()
        mine.append(p.detach().numpy().copy())
    assert all(sum(one) == 1 for one in seen) and 0 < sum(one[0] for one in seen) < STEPS
    if method is BAdam:
        assert [one[0] for one in seen] == [t // EVERY % 2 == 1 for t in range(STEPS)]  # the last layer first
    wide = shape[0] < shape[1]
    rank, alpha = (RANK, 0.7) if method is OwLore else (None, 1.0)
    active = lambda t: seen[t][0]  # noqa: E731
    Ws = naive.by_turns(W if wide else W.T, [G if wide else G.T for G in Gs], active, EVERY, adam=adam(), r=rank, alpha=alpha, **RULE)
    for t, (a, b) in enumerate(zip(mine, Ws, strict=True)):
        np.testing.assert_allclose(a, b if wide else b.T, rtol=0, atol=1e-9, err_msg=f"step {t}")


# LOMO and AdaLomo

FUSED = [
    pytest.param(LOMO, naive.lomo, id="lomo", marks=pytest.mark.check("b", "lomo")),
    pytest.param(AdaLomo, naive.adalomo, id="adalomo", marks=pytest.mark.check("b", "adalomo")),
]


def fused(kind: type[LOMO] | type[AdaLomo], rule: Any, W: np.ndarray, Gs: list[np.ndarray]) -> None:
    """A gradient of thirty times the size among them, for a step that is clipped."""
    Gs = [(30 if t == 20 else 1) * G for t, G in enumerate(Gs)]
    for t, (a, b) in enumerate(zip(ours(lambda ps: kind(ps, lr=0.02, weight_decay=0.1), W, Gs, None), rule(W, Gs, **RULE), strict=True)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-9, err_msg=f"step {t}")
        assert np.abs(a - W).max() > 1e-6


def of_both_sizes(kind: Any, rule: Any, shape: tuple[int, int]) -> None:
    """Small weights begin below the least RMS."""
    W, Gs = problem(shape)
    for size in (1.0, 1e-4):
        fused(kind, rule, size * W, Gs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind, rule", FUSED)
def test_fused(kind: Any, rule: Any, shape: tuple[int, int]) -> None:
    of_both_sizes(kind, rule, shape)


@pytest.mark.parametrize("kind, rule", FUSED)
def test_fused_of_a_vector(kind: Any, rule: Any) -> None:
    W, Gs = problem((12, 20))
    fused(kind, rule, W[0], [G[0] for G in Gs])


MUTANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "decay after the step": (LOMO, {"decay_last": True}),
    "a step 0.1 % short": (LOMO, {"output": Lift(0.999)}),
    "a momentum": (LOMO, {"inner": Momentum(beta=0.01)}),
    "β₂ = 1 − t^−0.79": (AdaLomo, {"inner": Adafactor(decay=-0.79)}),
    "no clipping": (AdaLomo, {"inner": Adafactor(clip=1e9)}),
    "a first moment": (AdaLomo, {"inner": Adafactor(beta1=0.01)}),
    "ε that is seen": (AdaLomo, {"inner": Adafactor(eps=1e-6)}),
    "weights not measured": (AdaLomo, {"relative": None}),
    "another least size of weights": (AdaLomo, {"relative": 1e-2}),
    "decay of the new weights": (AdaLomo, {"decay_last": True}),
    "the plain gradient": (AdaLomo, {"inner": Momentum(beta=0.0)}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_another_rule_is_seen(name: str) -> None:
    """By the comparison above, of one of its two problems at least."""
    kind, wrong = MUTANTS[name]

    class Mutant(kind):
        def rule(self, group: dict[str, Any]) -> Any:
            return replace(super().rule(group), **wrong)

    with pytest.raises(AssertionError, match="step"):
        of_both_sizes(Mutant, naive.lomo if kind is LOMO else naive.adalomo, (12, 20))
