"""(a) Layers by turns: which are open, how often, and that the others stand still to the last bit."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from estimators import keyed
from optimizers import LISA, BAdam, GaLore, OwLore, buckets, outlier_shares
from optimizers.frames import Dense
from optimizers.sampling import LayerSampling, units
from optimizers.selections import in_turn
from tests.monte_carlo import assert_mean
from tests.optimizers.test_identities import SHAPES, gradients, matrices, run

METHODS: list[Any] = [
    pytest.param(LISA, {}, id="lisa", marks=pytest.mark.check("a", "lisa")),
    pytest.param(BAdam, {}, id="badam", marks=pytest.mark.check("a", "badam")),
    pytest.param(OwLore, {"rank": 2, "weights": (5.0, 3.0, 1.0, 1.0, 2.0)}, id="owlore", marks=pytest.mark.check("a", "owlore")),
]
LAYERS, EVERY = 5, 3


def named() -> dict[str, nn.Parameter]:
    """Two matrices a layer."""
    names = [f"layers.{i}.{local}.weight" for i in range(LAYERS) for local in ("up", "down")]
    return dict(zip(names, matrices([(6, 4), (4, 6)] * LAYERS), strict=True))


def opened(optimizer: LayerSampling) -> list[int]:
    """The layers that are open, in order; a layer is open with all of its matrices or none."""
    (group,) = optimizer.param_groups
    both = list(zip(group["open"][::2], group["open"][1::2], strict=True))
    assert all(a == b for a, b in both)
    return [i for i, (a, _) in enumerate(both) if a]


def backward(parameters: dict[str, nn.Parameter], t: int) -> None:
    """Gradients for those that require one."""
    generator = torch.Generator().manual_seed(t)
    terms = [(p * torch.randn(p.shape, generator=generator, dtype=p.dtype)).sum() for p in parameters.values()]
    torch.stack(terms).sum().backward()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method, options", METHODS)
def test_one_layer_is_adamw_to_the_last_bit_and_begins_anew(
    method: Any, options: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """For OwLore in the identity basis."""
    mine, theirs = matrices([shape], dtype), matrices([shape], dtype)
    rank = {"rank": min(shape), "scale": 1.0} if "rank" in options else {}
    shared: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.9, 0.98)}
    optimizer = method(mine, every=10, layers=1, **rank, **shared)
    if rank:
        optimizer.inject = lambda *_: Dense(torch.eye(min(shape), dtype=dtype))
    peer = torch.optim.AdamW(theirs, **shared, foreach=False)
    for t, G in enumerate(gradients(shape, 25, dtype)):
        if t % 10 == 0:
            peer.state.clear()
        mine[0].grad = theirs[0].grad = G
        optimizer.step()
        peer.step()
        assert torch.equal(mine[0], theirs[0])


@pytest.mark.check("a", "owlore")
@pytest.mark.parametrize("shape", SHAPES)
def test_owlore_is_galore_for_a_period(shape: tuple[int, int]) -> None:
    (p,), (q,) = matrices([shape]), matrices([shape])
    shared: dict[str, Any] = {"lr": 0.01, "rank": 4, "every": 8, "scale": 0.7, "weight_decay": 0.1}
    assert torch.equal(run(OwLore([p], layers=1, **shared), [p], 8)[0], run(GaLore([q], **shared), [q], 8)[0])


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("size", [1, 2, 5, 9, 0.4])
@pytest.mark.parametrize("method, options", METHODS)
def test_closed_layers_stand_still(method: Any, options: dict[str, Any], size: int | float, freeze: bool) -> None:
    """As many are open as asked for; the others keep their weights through decay, hold no state, and with ``freeze`` need no gradient."""
    parameters = named()
    optimizer = method(list(parameters.items()), lr=0.01, layers=size, every=EVERY, weight_decay=0.1, freeze=freeze, **options)
    count = min(LAYERS, size if isinstance(size, int) else round(size * LAYERS))
    turns = []
    for t in range(4 * EVERY):
        turns.append(opened(optimizer))
        assert len(turns[-1]) == count and (t % EVERY == 0 or turns[-1] == turns[-2])
        before = {name: p.detach().clone() for name, p in parameters.items()}
        if freeze:  # gradients of the last turn do not outlive it
            assert all(p.grad is None for i, p in enumerate(parameters.values()) if i // 2 not in turns[-1])
        optimizer.zero_grad()
        backward(parameters, t)
        for i, (name, p) in enumerate(parameters.items()):
            assert p.requires_grad == (p.grad is not None) == (not freeze or i // 2 in turns[-1]), name
        optimizer.step()
        for i, (name, p) in enumerate(parameters.items()):
            assert torch.equal(p, before[name]) == (i // 2 not in turns[-1]), name
            period_ends = t % EVERY == EVERY - 1
            assert bool(optimizer.state.get(p)) == (i // 2 in turns[-1] and not period_ends), name
    if count < LAYERS:
        assert len(set(map(tuple, turns))) > 1


@pytest.mark.check("a", "badam")
@pytest.mark.parametrize("order, size, expected", [
    ("descending", 1, [[4], [3], [2], [1], [0], [4]]),
    ("ascending", 1, [[0], [1], [2], [3], [4], [0]]),
    ("descending", 2, [[3, 4], [1, 2], [0, 4], [2, 3], [0, 1], [3, 4]]),
])  # fmt: skip
def test_blocks_come_in_order(order: str, size: int, expected: list[list[int]]) -> None:
    """Round and round: every layer has had ``size`` turns after as many periods as there are layers."""
    parameters, turns = named(), []
    optimizer = BAdam(list(parameters.items()), layers=size, every=2, order=order)
    for t in range(12):
        if t % 2 == 0:
            turns.append(opened(optimizer))
        optimizer.step()
    assert turns == expected
    assert sorted(itertools.chain(*turns[:5])) == sorted(list(range(5)) * size)


@pytest.mark.parametrize("method, options", METHODS)
def test_the_open_layers_are_those_of_the_turn(method: Any, options: dict[str, Any]) -> None:
    """Of the seed and the period alone, with OwLore's weights and without any for LISA; never those of gradients that are there."""
    optimizer = method(list(named().items()), layers=2, every=2, seed=7, **options, **method.takes(order="random"))
    for t in range(20):
        assert set(opened(optimizer)) == in_turn(LAYERS, 2, "random", 7, t // 2, options.get("weights"))
        optimizer.step()


def subsets(size: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(LAYERS), size))


def indicator(size: int, weights: tuple[float, ...] | None) -> Any:
    """Which subset has its turn, one column each, for as many turns as asked for."""

    def draw(turns: int, _: torch.Generator) -> Tensor:
        places = {subset: i for i, subset in enumerate(subsets(size))}
        drawn = [places[tuple(sorted(in_turn(LAYERS, size, "random", 0, turn, weights)))] for turn in range(turns)]
        return nn.functional.one_hot(torch.tensor(drawn), len(places)).double()

    return draw


@pytest.mark.check("a", "lisa")
@pytest.mark.parametrize("size", [1, 2])
def test_every_subset_of_layers_is_as_likely_as_another(size: int, generator: torch.Generator) -> None:
    """So that a layer's chance is γ/L."""
    count = len(subsets(size))
    assert_mean(indicator(size, None), torch.full((count,), 1 / count), draws=10_000, resolution=0.035, generator=generator)


@pytest.mark.check("a", "owlore")
@pytest.mark.parametrize("size", [1, 2])
def test_layers_are_drawn_one_after_the_other_by_their_weights(size: int, generator: torch.Generator) -> None:
    """The first with its share of the weights, the second with its share of what is left: the sum over both orders."""
    weights = (5.0, 3.0, 1.0, 1.0, 2.0)
    p = [weight / sum(weights) for weight in weights]
    expected = [p[J[0]] if size == 1 else p[J[0]] * p[J[1]] * sum(1 / (1 - p[j]) for j in J) for J in subsets(size)]
    assert sum(expected) == pytest.approx(1)
    assert_mean(indicator(size, weights), torch.tensor(expected), draws=10_000, resolution=0.045, generator=generator)
    with pytest.raises(ValueError, match="there are 10 of them"):
        OwLore(list(matrices([(4, 6)] * 10)), rank=2, weights=weights)


@pytest.mark.parametrize("method, options", METHODS)
def test_the_same_layers_are_open_after_a_load(method: Any, options: dict[str, Any]) -> None:
    """In the middle of a period, into an optimizer that had opened others; both go on alike."""
    parameters = named()
    usual = {"lr": 0.01, "layers": 2, "every": EVERY, "weight_decay": 0.1, **options}
    first = method(list(parameters.items()), seed=1, **usual)
    for t in range(4):
        backward(parameters, t)
        first.step()
        first.zero_grad()
    twins = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    second = method(list(twins.items()), seed=2, **usual)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for t in range(4, 12):
        assert opened(first) == opened(second)
        assert [p.requires_grad for p in parameters.values()] == [q.requires_grad for q in twins.values()]
        for optimizer, those in ((first, parameters), (second, twins)):
            backward(those, t)
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(p, twins[name]) for name, p in parameters.items())


@pytest.mark.parametrize("method, options", METHODS)
def test_a_group_that_is_added_later_has_turns_of_its_own(method: Any, options: dict[str, Any]) -> None:
    parameters = named()
    pairs = list(parameters.items())
    usual = {key: value for key, value in options.items() if key != "weights"}
    optimizer = method(pairs[:4], lr=0.01, layers=1, every=EVERY, **usual)
    if method is OwLore:
        with pytest.raises(ValueError, match="there are 3 of them"):
            optimizer.add_param_group({"params": pairs[4:], "weights": (1.0, 2.0)})
        assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": pairs[4:]})
    for t in range(5):
        assert [sum(group["open"]) for group in optimizer.param_groups] == [2, 2]
        assert sum(p.requires_grad for p in parameters.values()) == 4
        backward(parameters, t)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.check("a", "lisa")
@pytest.mark.check("a", "badam")
@pytest.mark.check("a", "owlore")
def test_what_belongs_to_a_layer() -> None:
    """All before and at the first number, in the order of appearance; what has no number is its own, as are parameters without names."""
    names = ("h.0.q", "h.0.mlp.1.up", "head.weight", "h.1.q", "h.0.v", "h.10.q", "h.1.mlp.0.up", "proj.weight", "blocks.h.0.q")
    assert units(names) == [0, 0, 1, 2, 0, 3, 2, 4, 5]
    assert units(("0.0", "0.1", "0.2")) == [0, 1, 2]
    assert units(("0.weight", "2.weight", "0.bias")) == [0, 1, 0]


@pytest.mark.check("a", "owlore")
def test_shares_of_outliers() -> None:
    """Two of 100 entries and one of 50 are far above the mean; a layer without any has a tenth of the least other share."""
    many, one, none = torch.ones(10, 10), torch.ones(5, 10), torch.ones(10, 10)
    many[0, :2], one[1, 1] = -500.0, 500.0
    pairs = [("h.0.a", many), ("h.1.a", one), ("h.0.b", none), ("h.2.a", none)]
    assert outlier_shares(pairs) == pytest.approx((0.01, 0.02, 0.001))
    assert outlier_shares(pairs, multiple=1e4) == (1.0, 1.0, 1.0)
    assert outlier_shares([("h.1.a", one)], multiple=0.5) == pytest.approx((1 / 50,))
    inputs = {
        "h.0.a": torch.ones(10),
        "h.0.b": torch.ones(10),
        "h.1.a": torch.ones(10),
        "h.2.a": torch.ones(10).index_fill(0, torch.tensor([3]), 1e3),
    }
    assert outlier_shares(pairs, inputs=inputs, multiple=9.0) == pytest.approx((0.01, 0.02, 0.1))
    with pytest.raises(ValueError, match="no matrices"):
        outlier_shares([])


@pytest.mark.parametrize("weights", [(0.0, 0.0, 1.0), (1.0, -1.0, 1.0), (1.0, float("nan"), 1.0)])
def test_weights_that_cannot_be_are_refused(weights: tuple[float, ...]) -> None:
    named = [(f"layers.{i}.weight", nn.Parameter(torch.zeros(4, 6))) for i in range(3)]
    with pytest.raises(ValueError, match="must be finite and not negative, and 2 of them positive"):
        OwLore(named, layers=2, weights=weights)


@pytest.mark.parametrize("kind", [LISA, OwLore, BAdam])
def test_a_number_of_layers_is_an_integer(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"layers=2.0\): must be an integer, or a share"):
        kind([nn.Parameter(torch.zeros(4, 6))], layers=2.0)


@pytest.mark.parametrize("kind", [LISA, OwLore, BAdam])
def test_several_processes_must_not_freeze(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimizers.sampling.processes.size", lambda: 2)
    with pytest.raises(ValueError, match=r"cannot be averaged over processes; use freeze=False"):
        kind([nn.Parameter(torch.zeros(4, 6))])
    assert kind([nn.Parameter(torch.zeros(4, 6))], freeze=False).param_groups


def test_owlore_knows_one_word() -> None:
    with pytest.raises(ValueError, match="weights='outlier'"):
        OwLore(list(named().items()), rank=2, weights="outlier")  # pyright: ignore[reportArgumentType]


@pytest.mark.check("a", "badam")
@pytest.mark.check("a", "lisa")
@pytest.mark.check("a", "owlore")
@pytest.mark.parametrize("kind", [BAdam, LISA, OwLore])
def test_rounding_is_drawn_anew_in_every_turn(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """States begin anew with a turn and draws must not: no key comes twice for one weight, and a drift below the spacing of bfloat16 arrives."""
    seen: list[tuple[Any, ...]] = []

    def generator(*key: Any) -> torch.Generator:
        seen.append(key[:3])
        return keyed.generator(*key)

    monkeypatch.setattr(buckets, "keyed", SimpleNamespace(generator=generator))
    p = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))
    options: dict[str, Any] = {"lr": 1e-4, "rank": 8, "every": 2, "layers": 1, "rounding": "stochastic", "freeze": False}
    optimizer = kind([("layers.0.weight", p)], **options)
    for _ in range(40):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert len(set(seen)) == len(seen) == 40
    moved = 1 - p.detach().double()
    if kind is not OwLore:  # there only what its frame passes on moves
        error = (40 * 1e-4 * 2**-8) ** 0.5 / 8  # a step of s in a grid of h has the variance hs at most; 40 steps, 64 weights
        assert abs(float(moved.mean()) - 40 * 1e-4) < 5 * error


def test_outlying_layers_are_likelier_by_default() -> None:
    """From the weights as they are when the optimizer is made."""
    generator = torch.Generator().manual_seed(0)
    named = [(f"layers.{i}.weight", nn.Parameter(torch.randn(30, 40, generator=generator))) for i in range(3)]
    with torch.no_grad():
        named[1][1][:4, 0] = 40.0
    weights = OwLore(named, rank=4, layers=1).param_groups[0]["weights"]
    assert weights == outlier_shares(named) and weights[1] > 5 * weights[0] == 5 * weights[2]
