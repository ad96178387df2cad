"""Stochastic rounding: exact neighbours, exact probabilities, and the wrong roundings that the Monte Carlo check must reject."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from estimators import convert
from estimators.rounding import SIXTEEN_BIT, stochastic_round
from tests.monte_carlo import assert_mean

Rounding = Callable[[Tensor, torch.dtype, torch.Generator], Tensor]
TINY = {torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}  # smallest subnormal


def values(dtype: torch.dtype) -> Tensor:
    """Between neighbours: near zero, subnormal, at both sides of a power of two, of either sign, near the largest."""
    tiny, eps = TINY[dtype], torch.finfo(dtype).eps
    positive = [0.3 * tiny, 0.5 * tiny, 5.25 * tiny, 1 + 0.3 * eps, 1 - 0.1 * eps, 1 + 0.5 * eps, 2 - 0.01 * eps, 3.14159, 1000.1, 1e-3]
    x = torch.tensor(positive, dtype=torch.float64)
    return torch.cat([x, -x, 0.999 * torch.tensor([torch.finfo(dtype).max], dtype=torch.float64)])


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The largest value of the format below x and the smallest above, from the list of all its finite values."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).double()
    every = every[torch.isfinite(every)].unique()
    above = torch.searchsorted(every, x.contiguous())
    return every[above - 1], every[above]


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("source", [torch.float32, torch.float64])
def test_only_the_two_neighbours_come_out_and_both_do(dtype: torch.dtype, source: torch.dtype, generator: torch.Generator) -> None:
    x = values(dtype).to(source)
    lower, upper = neighbours(x.double(), dtype)
    out = stochastic_round(x.expand(4000, -1), dtype, generator)
    assert out.dtype == dtype and out.shape == (4000, len(x))
    assert bool(((out.double() == lower) | (out.double() == upper)).all())
    common = torch.minimum(x.double() - lower, upper - x.double()) > 0.05 * (upper - lower)
    assert int(common.sum()) > 10
    assert bool(((out.double() == lower).any(0) & (out.double() == upper).any(0))[common].all())


class Uniforms:
    """In the place of ``torch.rand``: the midpoints of N equal cells of [0, 1), so that a mean over them is an integral."""

    def __init__(self, cells: int) -> None:
        self.cells = cells

    def __call__(self, shape: torch.Size, *, dtype: torch.dtype, **_: object) -> Tensor:
        assert shape[0] == self.cells
        u = (torch.arange(self.cells, dtype=dtype) + 0.5) / self.cells
        return u.reshape(-1, *(1 for _ in shape[1:])).expand(shape)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_the_probability_of_the_upper_neighbour_is_exact(
    dtype: torch.dtype, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P(upper) = (x − lower)/(upper − lower): counted over 4096 equal cells of the uniform, to one cell; so E[round(x)] = x."""
    cells, x = 4096, values(dtype)
    lower, upper = neighbours(x, dtype)
    monkeypatch.setattr(torch, "rand", Uniforms(cells))
    out = stochastic_round(x.expand(cells, -1), dtype, generator).double()
    share = (out == upper).double().mean(0)
    torch.testing.assert_close(share, (x - lower) / (upper - lower), rtol=0, atol=1 / cells)
    assert float(((out.mean(0) - x) / (upper - lower)).abs().max()) <= 1 / cells


def always_nearest(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    del generator
    return x.to(dtype)


def reversed_probability(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    lower, upper = neighbours(x, dtype)
    u = torch.rand(x.shape, generator=generator, dtype=x.dtype)
    return torch.where(u * (upper - lower) < upper - x, upper, lower).to(dtype)


def fair_coin(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    lower, upper = neighbours(x, dtype)
    return torch.where(torch.rand(x.shape, generator=generator) < 0.5, upper, lower).to(dtype)


MUTANTS: list[Rounding] = [always_nearest, reversed_probability, fair_coin]


def check(rounding: Rounding, dtype: torch.dtype, generator: torch.Generator) -> None:
    """The mean in units of the spacing is (x − lower)/(upper − lower)."""
    x = values(dtype)
    lower, upper = neighbours(x, dtype)

    def draw(size: int, generator: torch.Generator) -> Tensor:
        return (rounding(x.expand(size, -1), dtype, generator).double() - lower) / (upper - lower)

    assert_mean(draw, (x - lower) / (upper - lower), draws=40_000, resolution=0.021, generator=generator)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_it_is_unbiased(dtype: torch.dtype, generator: torch.Generator) -> None:
    check(stochastic_round, dtype, generator)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_rounding_is_rejected(mutant: Rounding, dtype: torch.dtype, generator: torch.Generator) -> None:
    with pytest.raises(AssertionError, match="z = "):
        check(mutant, dtype, generator)


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("source", [torch.float32, torch.float64])
def test_what_the_format_holds_stays_as_it_is(dtype: torch.dtype, source: torch.dtype, generator: torch.Generator) -> None:
    """Every one of the 2¹⁶ patterns: zeros of both signs, subnormals, infinities; NaN stays NaN."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    out = stochastic_round(every.to(source), dtype, generator)
    number = ~torch.isnan(every)
    assert torch.equal(out[number].view(torch.int16), every[number].view(torch.int16))
    assert bool(torch.isnan(out[~number]).all())


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_beyond_the_format_it_is_a_cast(dtype: torch.dtype, generator: torch.Generator) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([torch.inf, -torch.inf, 1e300, -1e300, largest * (1 + torch.finfo(dtype).eps / 8)], dtype=torch.float64)
    out = stochastic_round(x.expand(200, -1), dtype, generator)
    assert torch.equal(out, x.to(dtype).expand(200, -1))
    assert float(out[0, -1]) == largest  # rounds to the largest finite number, and never past it
    assert stochastic_round(torch.zeros(0), dtype, generator).shape == (0,)


def test_the_draw_depends_on_its_generator_only() -> None:
    x, state = torch.linspace(0, 1, 999), torch.random.get_rng_state()
    a, b, other = (stochastic_round(x, torch.bfloat16, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, other)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int16])
def test_another_format_is_refused(dtype: torch.dtype, generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"only bfloat16 and float16 are rounded stochastically"):
        stochastic_round(torch.ones(3), dtype, generator)


# Lifts into 16-bit weights


def lifted(lift: Any, updates: int, *, size: float, decay: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, Any]:
    """(weight after equal small updates of B and decays, what float64 arithmetic gives, the handle); the weight starts at bfloat16 values."""
    g = torch.Generator().manual_seed(1)
    W = (1 + torch.rand(32, 16, generator=g)).bfloat16()  # spacing 2⁻⁷ = 0.0078
    model = nn.Sequential(nn.Linear(16, 32, bias=False, dtype=torch.bfloat16))
    model.get_parameter("0.weight").data.copy_(W)
    handle = convert(model, rank=4, lift=lift, refresh_every=10**6, seed=seed)
    layer = handle.layers["0"]
    exact = W.double()
    for _ in range(updates):
        with torch.no_grad():
            layer.B.fill_(size)
        exact = exact * decay + layer.B.detach().double() @ layer.basis().double().mT
        handle.step(decay=decay)
    return layer.weight.detach().double(), exact, handle


@pytest.mark.parametrize("decay", [1.0, 1 - 1e-5])
def test_a_master_takes_every_lift_exactly_and_nearest_loses_small_ones(decay: float) -> None:
    updates, size = 200, 3e-4 if decay == 1.0 else 0.0
    moved, exact, handle = lifted("master", updates, size=size, decay=decay)
    start = lifted("master", 0, size=0.0)[0]
    assert float((exact - start).abs().max()) > 0.0025
    torch.testing.assert_close(handle.state_dict()["masters"]["0"].double(), exact, rtol=0, atol=updates * 2.0**-23)  # float32 sums
    assert torch.equal(moved, handle.state_dict()["masters"]["0"].bfloat16().double())
    assert torch.equal(lifted("nearest", updates, size=size, decay=decay)[0], start)  # as if nothing had been learned, nothing decayed


def test_a_master_is_the_float32_run_itself() -> None:
    model = nn.Sequential(nn.Linear(16, 32, bias=False, dtype=torch.bfloat16))
    twin = copy.deepcopy(model).float()
    handles = [convert(m, rank=4, refresh_every=3, lift_every=2, state="keep") for m in (model, twin)]
    for step in range(8):
        for handle in handles:
            with torch.no_grad():
                handle.layers["0"].B.add_(torch.randn(32, 4, generator=torch.Generator().manual_seed(step)))
            handle.step(decay=0.99)
    masters = handles[0].state_dict()["masters"]["0"]
    assert torch.equal(masters, handles[1].layers["0"].weight.detach())
    final = handles[0].finalize()
    assert final.get_parameter("0.weight").dtype == torch.bfloat16


@pytest.mark.parametrize(("size", "decay"), [(3e-4, 1.0), (0.0, 1 - 1e-4), (3e-4, 1 - 1e-4)])
def test_stochastic_lifts_and_decays_are_unbiased(size: float, decay: float, generator: torch.Generator) -> None:
    """20 updates far below the spacing: the mean change, along the change that float64 makes."""
    start = lifted("stochastic", 0, size=0.0)[0]
    change = lifted("stochastic", 20, size=size, decay=decay)[1] - start
    assert 0 < float(change.abs().mean()) < 0.0078

    def draw(number: int, _: torch.Generator) -> Tensor:
        shares = []
        for seed in range(number):
            moved, its, _ = lifted("stochastic", 20, size=size, decay=decay, seed=seed)
            shares.append(((moved - start) * (its - start)).sum() / (its - start).square().sum())
        return torch.stack(shares)

    assert_mean(draw, 1.0, draws=60, resolution=0.25, generator=generator)


def test_masters_survive_an_interruption() -> None:
    ends = []
    for stop in (None, 3):
        model = nn.Sequential(nn.Linear(16, 32, bias=False, dtype=torch.bfloat16))
        model.get_parameter("0.weight").data.fill_(1)
        handle = convert(model, rank=3, state="keep")
        for step in range(6):
            if step == stop:
                saved = copy.deepcopy([model.state_dict(), handle.state_dict()])
                model = nn.Sequential(nn.Linear(16, 32, bias=False, dtype=torch.bfloat16))
                handle = convert(model, rank=3, state="keep")
                model.load_state_dict(saved[0])
                handle.load_state_dict(saved[1])
            with torch.no_grad():
                handle.layers["0"].B.add_(1e-4 * (step + 1))
            handle.step()
        ends.append((handle.state_dict()["masters"]["0"], model.get_parameter("0.weight")))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
