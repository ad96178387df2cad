"""WTA-CRS: exact mean and variance by enumeration in every branch, recorded draws of the published code, its mistakes, and mutants."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from estimators import WTACRS, Key, measure_estimates
from estimators.wta_crs import FLOOR, Criterion, sample, split
from tests.monte_carlo import assert_mean
from theory import wta_crs

RECORDED = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "two"  # beside the repository
CPU = torch.device("cpu")
Weights = Callable[[Tensor, int, int, tuple[int, ...]], Tensor]  # p by falling size, k, |C|, what is drawn → weight of each token


def probabilities(*values: float) -> Tensor:
    p = torch.tensor(values, dtype=torch.float64)
    return p / p.sum()


P: dict[str, tuple[Tensor, int, int]] = {  # p, k, |C| of the published rule
    "no winners": (probabilities(1, 1, 1, 1, 1), 3, 0),
    "a winner": (probabilities(1, 9, 2, 2, 1), 3, 1),
    "two winners": (probabilities(1, 20, 2, 15, 1), 3, 2),
    "nearly all mass in winners": (probabilities(1e-7, 1, 2e-7, 1, 1e-7), 3, 2),
    "zeros": (probabilities(0, 4, 0, 2, 1), 2, 1),
    "more slots than tokens that count": (probabilities(0, 3, 0, 2, 0), 4, 2),
    "all": (probabilities(1, 5, 2, 3), 4, 3),
    "one": (probabilities(2, 2, 1), 1, 0),
    "one token": (probabilities(1), 1, 0),
}


def draws(p: Tensor, k: int, criterion: Criterion = "paper") -> Iterator[tuple[float, Tensor]]:
    """(probability, chances) of every outcome: each chance is the middle of the interval of its token, of all sequences of tokens beside C."""
    order, winners = split(p, k, criterion)
    ordered = p[order]
    rest = [i for i in range(int(winners), len(p)) if ordered[i] > 0]
    mass = float(sum(ordered[i] for i in rest))
    below = {i: float(sum(ordered[j] for j in rest if j < i)) for i in rest}
    if not rest:
        yield 1.0, torch.zeros(k, dtype=torch.float64)
        return
    for taken in itertools.product(rest, repeat=k - int(winners)):
        chances = torch.tensor([0.0] * int(winners) + [(below[i] + float(ordered[i]) / 2) / mass for i in taken], dtype=torch.float64)
        yield math.prod(float(ordered[i]) / mass for i in taken), chances


def total(J: Tensor, w: Tensor, size: int) -> Tensor:
    """The weight of each token."""
    return torch.zeros(size, dtype=torch.float64).index_add_(0, J, w)


@pytest.mark.parametrize("criterion", ["paper", "variance"])
@pytest.mark.parametrize("name", P)
def test_every_token_weighs_one_in_the_mean_and_the_variance_is_that_of_theory(name: str, criterion: Criterion) -> None:
    p, k, winners = P[name]
    T = len(p)
    C = int(split(p, k, criterion)[1])
    if criterion == "paper":
        assert winners == C
    assert wta_crs.optimal_winners(p.numpy(), k, 1 if criterion == "paper" else 2) == C
    generator = torch.Generator().manual_seed(0)
    X, D = (torch.randn(T, size, generator=generator, dtype=torch.float64) for size in (3, 2))
    X[p == 0] = 0
    G = D.mT @ X
    chance, mean, variance = 0.0, torch.zeros(T, dtype=torch.float64), 0.0
    for probability, chances in draws(p, k, criterion):
        w = total(*sample(p, k, chances, criterion), T)
        chance += probability
        mean += probability * w
        variance += probability * float(((D * w[:, None]).mT @ X - G).square().sum())
    assert chance == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(mean[p > 0], torch.ones(int((p > 0).sum()), dtype=torch.float64), rtol=0, atol=1e-12)
    assert variance == pytest.approx(wta_crs.variance(D.numpy(), X.numpy(), p.numpy(), k, C), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", P)
def test_chances_fall_on_tokens_by_their_probability(name: str) -> None:
    """What enumeration takes for granted: the set of chances of a token is an interval of length p_j/(1 − p_C)."""
    p, k, _ = P[name]
    order, winners = split(p, k)
    ordered = torch.where(torch.arange(len(p)) >= winners, p[order], 0.0)
    upper = ordered.cumsum(0) / ordered.sum()
    for place in range(int(winners), len(p)):
        if ordered[place] > 0:
            low, high = float(upper[place] - ordered[place] / ordered.sum()), float(upper[place])
            ends = [torch.full((k,), low + share * (high - low), dtype=torch.float64) for share in (1e-9, 1 - 1e-9)]
            assert all(bool((sample(p, k, chances)[0][int(winners) :] == order[place]).all()) for chances in ends)


def test_as_many_slots_as_tokens_are_exact() -> None:
    """Also where they are equal, and any number of winners is as good by the criterion."""
    for p in (P["all"][0], torch.full((5,), 0.2, dtype=torch.float64)):
        k = len(p)
        for chances in (torch.zeros(k), torch.full((k,), 0.999)):
            torch.testing.assert_close(total(*sample(p, k, chances.double()), k), torch.ones(k, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_published_number_of_winners_is_not_that_of_least_variance() -> None:
    """Tokens of orthogonal x_j and ‖a_j‖ ∝ p_j ∝ 1/j: (1−p_C)²/(k−|C|) takes more of them for certain than (1−p_C)/(k−|C|), and rightly."""
    p = probabilities(*(1 / j for j in range(1, 41)))
    delta, inputs = p.numpy()[:, None], np.eye(40)
    by = [wta_crs.variance(delta, inputs, p.numpy(), 8, c) for c in range(8)]
    published, better = wta_crs.optimal_winners(p.numpy(), 8, 1), wta_crs.optimal_winners(p.numpy(), 8)
    assert published <= better and by[better] < by[published] < by[0] * 1.0001
    assert [int(split(p, 8, criterion)[1]) for criterion in ("paper", "variance")] == [published, better]


# what the published code does


def reference_code(p: Tensor, k: int, winners: int, drawn: tuple[int, ...], *, known: bool = True, replacement: bool = True) -> Tensor:
    """Weight of each token: without known ‖δ‖ no 1/p, beyond p_C = 0.999 nothing of what is drawn, without replacement no weights at all."""
    w = torch.zeros_like(p)
    order = p.argsort(descending=True)
    if not replacement:
        w[list(drawn)] = 1
        return w
    w[order[:winners]] = 1
    rest = 1 - p[order[:winners]].sum()
    for j in drawn:
        w[j] += 0 if rest < 1e-3 else rest / (p[j] * (k - winners)) if known else rest
    return w


RUNS = [
    "adaptive_r0.3",
    "adaptive_r0.3_flat",
    "crs_deter0_r0.3",
    "zero_gradnorm_r0.3",
    "none_gradnorm_r0.3",
    "no_replacement_r0.3",
    "minimal_k_all",
]


@cache
def recorded(variant: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Index entry and arrays (real ones in float64, rows flat); skips where they are not at hand."""
    if not RECORDED.exists():
        pytest.skip("recorded runs are not at hand")
    file = f"WTACRS__{variant}.npz"
    (entry,) = (run for run in json.loads((RECORDED / "index.json").read_text())["runs"] if run["file"] == file)
    with np.load(RECORDED / file, allow_pickle=False) as found:
        values = {name: torch.from_numpy(found[name]) for name in found.files}
    values = {name: value.double() if value.is_floating_point() else value for name, value in values.items()}
    return entry, values | {name: values[name].flatten(0, 1) for name in ("X", "dz")}


@pytest.mark.parametrize("variant", RUNS)
def test_recorded_draws_give_the_recorded_numbers(variant: str) -> None:
    """The rule as published on the six that draw; ours on the three whose |C| is the adaptive one and which are unbiased (in ``crs_deter0`` |C| = 0
    was forced). Float32 of the record against float64, the index's 5e-6."""
    entry, at = recorded(variant)
    X, D, p, k = at["X"], at["dz"], at["prob"], int(at["k"])
    norms = X.norm(dim=1)
    if "grad_norm" in at and bool(at["grad_norm"].any()):
        norms = norms * at["grad_norm"].flatten()
    torch.testing.assert_close((norms + 1e-8) / (norms.sum() + 1e-8), p, rtol=5e-6, atol=0)
    ratio, minimal = entry["hyper"]["sample_ratio"], entry["hyper"]["minimal_k"]
    assert WTACRS(ratio, minimal).kept_tokens(len(X)) in (k, k + (int(ratio * len(X)) < ratio * len(X)))  # we round, they cut off
    drawn = tuple(at["draws_raw"].tolist()) if "draws_raw" in at else ()
    winners = int(at.get("deter_k", torch.tensor(0)))
    deterministic = entry["hyper"]["deter_adaptive"] and entry["hyper"]["sample_replacement"]
    rules = []
    if k < len(X):
        known = "gradnorm" not in variant
        rules.append(reference_code(p, k, winners, drawn, known=known, replacement=entry["hyper"]["sample_replacement"]))
    if variant in ("adaptive_r0.3", "adaptive_r0.3_flat", "minimal_k_all"):
        order, ours = split(p, k)
        assert k == len(X) or (int(ours) == winners and deterministic)
        ordered = torch.where(torch.arange(len(p)) >= ours, p[order], 0.0)
        place = {int(token): i for i, token in enumerate(order)}
        middle = (ordered.cumsum(0) - ordered / 2) / ordered.sum()
        chances = [0.0] * int(ours) + ([float(middle[place[j]]) for j in drawn] or [0.5] * (k - int(ours)))
        rules.append(total(*sample(p, k, torch.tensor(chances, dtype=torch.float64)), len(p)))
    assert rules
    for w in rules:
        torch.testing.assert_close(w, at["total_weight_per_token"], rtol=5e-6, atol=5e-6)
        estimate, largest = (D * w[:, None]).mT @ X, float(at["grad_weight_est"].abs().max())
        torch.testing.assert_close(estimate, at["grad_weight_est"], rtol=0, atol=5e-6 * largest)


MISTAKES: dict[str, tuple[str, Weights, float]] = {  # case, rule, and how far the mean weight of some token is from 1
    "no 1/p": ("a winner", lambda p, k, c, drawn: reference_code(p, k, c, drawn, known=False), 0.2),
    "nothing beyond 0.999": ("nearly all mass in winners", reference_code, 1.0),
}


def mean_weights(case: str, rule: Weights) -> Tensor:
    """The expectation of a rule's weights over all draws."""
    p, k, winners = P[case]
    mean = torch.zeros_like(p)
    for probability, chances in draws(p, k):
        mean += probability * rule(p, k, winners, tuple(sample(p, k, chances)[0][winners:].tolist()))
    return mean


@pytest.mark.parametrize("name", MISTAKES)
def test_the_published_mistakes_are_biased(name: str) -> None:
    case, rule, bias = MISTAKES[name]
    assert float((mean_weights(case, rule) - 1).abs().max()) >= bias
    torch.testing.assert_close(mean_weights("a winner", reference_code), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_without_replacement_and_without_weights_is_biased() -> None:
    """torch.multinomial without replacement has inclusion probabilities below 1, and nothing makes up for it."""
    p, k, _ = P["a winner"]
    taken = torch.multinomial(p.expand(20000, -1), k, replacement=False, generator=torch.Generator().manual_seed(0))
    w = torch.zeros(20000, len(p), dtype=torch.float64).scatter_(1, taken, 1.0)
    assert float(w.mean(0).min()) < 0.5 and float(w.sum(1).mean()) == k < len(p)


# the rule as a layer has it

T, M, N, K = 8, 3, 4, 4


def problem() -> tuple[Tensor, Tensor]:
    """Tokens of decaying size."""
    generator = torch.Generator().manual_seed(5)
    size = 1 / torch.arange(1, T + 1, dtype=torch.float64)[torch.randperm(T, generator=generator), None]
    return size * torch.randn(T, N, generator=generator, dtype=torch.float64), torch.randn(T, M, generator=generator, dtype=torch.float64)


def layer(X: Tensor, D: Tensor, visited: bool) -> tuple[WTACRS, Tensor]:
    """The rule, after a visit of the same samples if asked, and its p."""
    keeper = WTACRS(K)
    p = X.norm(dim=1)
    if visited:
        keeper.visit(torch.tensor([7, 3]))
        keeper.gradient(keeper.keep(X, Key(0, "", 0, 0, CPU)), D, Key(0, "", 0, 0, CPU))
        delta = D.float().norm(dim=1).double()
        p = p * delta.clamp_min(FLOOR * float(delta.mean()))
    return keeper, p / p.sum()


def drawing(estimate: Callable[[int], Tensor]) -> Callable[[int, torch.Generator], Tensor]:
    """Estimates of calls 0, 1, …, whatever the generator."""
    return lambda size, _: torch.stack([estimate(call) for call in range(size)])


@pytest.mark.parametrize("visited", [False, True])
def test_mean_and_variance_of_a_layer(visited: bool) -> None:
    X, D = problem()
    keeper, p = layer(X, D, visited)
    winners = wta_crs.optimal_winners(p.numpy(), K, 1)
    expected = wta_crs.variance(D.numpy(), X.numpy(), p.numpy(), K, winners)
    G = D.mT @ X
    count = [0]

    def estimate(_: int) -> Tensor:
        count[0] += 1
        at = Key(0, "layer", count[0], 0, CPU)
        return keeper.gradient(keeper.keep(X, at), D, at)

    seen = measure_estimates(drawing(estimate), G, 8000, generator=torch.Generator())
    signal = float(G.square().sum())
    for measured, theory, resolution in ((seen.alignment, 1.0, 0.05), (seen.mse, expected, 0.1 * expected)):
        assert 8 * measured.standard_error <= resolution
        assert abs(measured.value - theory) < 5 * measured.standard_error
    assert seen.bias is not None and abs(seen.bias.value) < 5 * seen.bias.standard_error < 0.01 * signal


Mutant = Callable[
    [Tensor, Tensor, Tensor], tuple[Tensor, Tensor]
]  # p, C, tokens drawn (draws, k−|C|) → tokens and weights of what is added to C
MUTANTS: dict[str, Mutant] = {
    "honest": lambda p, C, drawn: (drawn, (1 - p[C].sum()) / ((K - len(C)) * p[drawn])),
    "no 1/p": lambda p, C, drawn: (drawn, ((1 - p[C].sum()) * T / (K - len(C))).expand(drawn.shape)),
    "1 in the place of 1 − p_C": lambda p, C, drawn: (drawn, 1 / ((K - len(C)) * p[drawn])),
    "k in the place of k − |C|": lambda p, C, drawn: (drawn, (1 - p[C].sum()) / (K * p[drawn])),
    "winners weighed twice": lambda p, C, drawn: (
        torch.cat([drawn, C.expand(len(drawn), -1)], 1),
        torch.cat([(1 - p[C].sum()) / ((K - len(C)) * p[drawn]), (1 / (K * p[C])).expand(len(drawn), -1)], 1),
    ),
}


@pytest.mark.parametrize("name", [*MUTANTS, "weights of with-replacement on draws without"])
def test_wrong_weights_are_rejected(name: str) -> None:
    X, D = problem()
    p = layer(X, D, visited=True)[1]
    order, winners = split(p, K)
    c, C = int(winners), order[: int(winners)]
    assert 0 < c < K - 1
    rest = p.clone()
    rest[C] = 0
    without = name not in MUTANTS

    def statistics(size: int, generator: torch.Generator) -> Tensor:
        drawn = torch.multinomial(rest.expand(size, -1), K - c, replacement=not without, generator=generator)
        w = torch.zeros(size, T, dtype=torch.float64)
        w[:, C] = 1
        w.scatter_add_(1, *MUTANTS["honest" if without else name](p, C, drawn))
        G = D.mT @ X
        estimates = torch.einsum("st,tm,tn->smn", w, D, X)
        return torch.stack([(estimates * G).sum((1, 2)) / G.square().sum(), (estimates - G).square().sum((1, 2)) / expected], 1)

    expected = wta_crs.variance(D.numpy(), X.numpy(), p.numpy(), K, c)

    def check() -> None:
        assert_mean(statistics, torch.ones(2), draws=400_000, resolution=0.2, generator=torch.Generator().manual_seed(0))

    if name == "honest":
        check()
    else:
        with pytest.raises(AssertionError, match="z = "):
            check()


# the table


def test_the_table_belongs_to_samples_and_survives_what_is_not_finite() -> None:
    X, D = problem()
    keeper, key = WTACRS(K), Key(0, "", 0, 0, CPU)
    assert len(keeper.keep(X, key)) == 2  # no samples
    keeper.visit(torch.tensor([7, 3]))
    kept = keeper.keep(X, key)
    wrong = D.clone()
    wrong[1, 0] = torch.nan  # of sample 7
    keeper.gradient(kept, wrong, key)
    assert list(keeper.table) == [3]
    torch.testing.assert_close(keeper.table[3], D[4:].float().norm(dim=1))
    keeper.gradient(kept, D, key)
    assert set(keeper.table) == {3, 7}
    keeper.visit(torch.tensor([3, 100, 7, 101]))  # shorter this time: two tokens each, half of them of samples never seen
    known = keeper._known(8)
    assert known is not None
    delta = D.float().norm(dim=1)
    mean = delta[[4, 5, 0, 1]].mean()
    torch.testing.assert_close(known[[0, 1, 4, 5]], delta[[4, 5, 0, 1]].clamp_min(FLOOR * float(mean)))
    torch.testing.assert_close(known[[2, 3, 6, 7]], mean.expand(4))
    assert keeper._known(7) is None  # not rows of these samples
    keeper.step()
    assert keeper._known(8) is None and len(keeper.keep(X, key)) == 2
    twin = WTACRS(K)
    twin.load_state_dict(keeper.state_dict())
    assert set(twin.table) == {3, 7} and all(torch.equal(twin.table[i], keeper.table[i]) for i in (3, 7))


@pytest.mark.parametrize("zeros", [slice(0, 8), slice(2, 5)])
def test_tokens_without_an_error_last_time_can_still_be_drawn(zeros: slice) -> None:
    X, D = problem()
    before = D.clone()
    before[zeros] = 0
    keeper = layer(X, before, visited=True)[0]
    known = keeper._known(T)
    assert known is not None and bool((known > 0).all())
    assert keeper.kept_tokens(3) == 3 and WTACRS(0.3).kept_tokens(64) == 19 and WTACRS(0.3).kept_tokens(20) == 10
