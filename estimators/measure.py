"""Measurement of an estimator: bias, variance, mean squared error and alignment, each with its standard error, streamed over draws.

No theory here: numbers come from draws alone. ``measure`` works on sketches, so nothing n×n, and nothing m×n per draw, is ever formed:
with B = ĜV, ⟨ĜP, g⟩ = ⟨B, gV⟩ and ‖ĜP‖² = ⟨BᵀB, VᵀV⟩. ``measure_estimates`` takes full m×n estimates of anything; it is the plain version
and the oracle of the first. Memory is bounded by ``budget_bytes`` whatever the number of draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from estimators.law import Law, check_finite

GROUPS = 16  # independent groups of draws behind the squared bias and its jackknife
BUDGET_BYTES = 2**28


@dataclass(frozen=True)
class Estimate:
    """A measured mean and its standard error, in the units of the quantity."""

    value: float
    standard_error: float


class Running:
    """Streaming mean and covariance-free second moment of k statistics (Chan, Golub & LeVeque), float64, any number of values."""

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor = torch.zeros(0, dtype=torch.float64)
        self._squares: Tensor = torch.zeros(0, dtype=torch.float64)

    def update(self, values: Float[Tensor, "draws k"]) -> None:
        """Add ``values`` (draws, k), one row a draw."""
        values = values.double().cpu()
        size = len(values)
        mean = values.mean(0)
        squares = (values - mean).square().sum(0)
        if self.count == 0:
            self.count, self._mean, self._squares = size, mean, squares
            return
        total = self.count + size
        delta = mean - self._mean
        self._mean = self._mean + delta * (size / total)
        self._squares = self._squares + squares + delta.square() * (self.count * size / total)
        self.count = total

    @property
    def estimates(self) -> list[Estimate]:
        """One ``Estimate`` a statistic; the standard error is infinite below two draws."""
        if self.count < 2:
            return [Estimate(float(value), math.inf) for value in self._mean]
        error = (self._squares / (self.count - 1) / self.count).sqrt()
        return [Estimate(float(value), float(se)) for value, se in zip(self._mean, error, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured over ``draws`` draws; gradients in squared units unless said otherwise."""

    draws: int
    mse: Estimate  # E‖estimate − g‖²
    square: Estimate  # E‖estimate‖²
    alignment: Estimate  # ⟨E[estimate], g⟩/‖g‖², a pure number; NaN when g = 0
    bias: Estimate | None  # ‖E[estimate] − g‖², unbiased, so it may come out slightly negative
    variance: Estimate | None  # E‖estimate − E[estimate]‖²
    mean: Float[Tensor, "m n"] | None  # mean estimate over all draws
    group_means: Float[Tensor, "groups m n"] | None = (
        None  # of independent groups of draws: for ``jackknife`` of what else the mean decides
    )
    group_mse: Float[Tensor, " groups"] | None = None  # E‖D − g‖² of each group


class Population:
    """N equally likely gradients and what every measurement on them needs: their mean g and the chances to draw each with.

    ``gradients``: (m, n) for one matrix, or (N, m, n). Raises ``ValueError`` for another shape or non-finite entries.
    """

    def __init__(self, gradients: Float[Tensor, "*population m n"]) -> None:
        if gradients.ndim not in (2, 3) or gradients.numel() == 0:
            raise ValueError(f"Population: gradients must be (m, n) or (N, m, n), got {tuple(gradients.shape)}")
        check_finite("Population", "gradients", gradients)
        if gradients.dtype not in (torch.float32, torch.float64):  # squares of half-precision gradients underflow
            gradients = gradients.float()
        self.gradients = gradients if gradients.ndim == 3 else gradients.unsqueeze(0)
        self.mean = self.gradients.mean(0)
        # three quarters in proportion to ‖Ĝ_i‖², one quarter uniform, so that no weight exceeds 4
        size = torch.stack([G.double().square().sum() for G in self.gradients])
        uniform = torch.full_like(size, 1 / len(size))
        self.chance = 0.75 * size / size.sum() + 0.25 * uniform if bool(size.sum() > 0) else uniform


def measure(
    law: Law,
    gradients: Float[Tensor, "*population m n"] | Population,
    draws: int,
    *,
    generator: torch.Generator,
    track_mean: bool = True,
    budget_bytes: int = BUDGET_BYTES,
) -> Measurement:
    """Measure the IPA estimate ĜVVᵀ of g over ``draws`` independent pairs (Ĝ, V).

    ``gradients``: one matrix (m, n), or N equally likely ones (N, m, n) whose mean is g, or a ``Population`` of them; their dtype is that
    of the arithmetic. Each draw takes Ĝ_i with a probability that grows with ‖Ĝ_i‖² and weighs it by its inverse, which leaves every mean
    as it is and keeps a few large mini-batches from ruling the standard error. ``track_mean``: also form the mean estimate, and from it
    squared bias and variance.
    Raises ``ValueError`` for shapes that do not fit the law, non-finite gradients, or fewer than 2 draws.
    """
    population = gradients if isinstance(gradients, Population) else Population(gradients)
    stack, g, chance = population.gradients, population.mean, population.chance
    count, m, n = stack.shape
    if n != law.n:
        raise ValueError(f"measure({law}): gradients must have {law.n} columns, got (m, n) = {(m, n)}")
    collector = _Collector(g, draws, track_mean)
    numbers = 3 * n * law.rank + 2 * m * law.rank + 2 * law.rank**2
    for size in collector.chunks(max(1, budget_bytes // (numbers * stack.element_size()))):
        V = law.sample(size, generator=generator, device=stack.device, dtype=stack.dtype)
        if V.ndim != 3:
            raise ValueError(f"measure({law}): the law holds {V.shape[1]} layers; measure them one at a time")
        columns = V.transpose(0, 1).reshape(n, -1)  # (n, draws·r): one product sketches many draws
        target = B = g @ columns
        weight = torch.ones(size, device=stack.device, dtype=stack.dtype)
        if count > 1:  # draws are exchangeable, so those of one mini-batch may stand together: one product each, no copy of Ĝ
            taken = torch.multinomial(chance, size, replacement=True, generator=generator).bincount(minlength=count)
            parts = columns.split((taken * law.rank).tolist(), dim=1)
            B = torch.cat([G @ part for G, part in zip(stack, parts, strict=True) if part.shape[1]], dim=1)
            weight = (1 / (count * chance)).repeat_interleave(taken).to(stack.dtype)
        inner = (B * target).view(m, size, -1).sum((0, 2))
        B = B.view(m, size, -1).transpose(0, 1)
        square = ((B.mT @ B) * (V.mT @ V)).sum((-2, -1))
        total = torch.einsum("dmr,dnr->mn", B * weight[:, None, None], V) if track_mean else None
        collector.update(square, inner, total, weight)
    return collector.result()


def measure_estimates(
    draw: Callable[[int, torch.Generator], Float[Tensor, "draws m n"]],
    target: Float[Tensor, "m n"],
    draws: int,
    *,
    generator: torch.Generator,
    budget_bytes: int = BUDGET_BYTES,
) -> Measurement:
    """The same measurement of any estimator: ``draw(size, generator)`` returns ``size`` independent estimates (size, m, n) of ``target``."""
    check_finite("measure_estimates", "target", target)
    collector = _Collector(target, draws, track_mean=True)
    for size in collector.chunks(max(1, budget_bytes // (4 * target.numel() * target.element_size()))):
        estimates = draw(size, generator)
        if estimates.shape != (size, *target.shape):
            raise ValueError(f"measure_estimates: draw({size}) gave {tuple(estimates.shape)}, expected {(size, *target.shape)}")
        square, inner = estimates.square().sum((-2, -1)), (estimates * target).sum((-2, -1))
        collector.update(square, inner, estimates.sum(0), torch.ones_like(square))
    return collector.result()


class _Collector:
    """Per-draw statistics into ``Running``, sums of estimates into independent groups."""

    def __init__(self, target: Tensor, draws: int, track_mean: bool) -> None:
        if draws < 2:
            raise ValueError(f"measure(draws={draws}): at least 2 draws are needed for a standard error")
        self.target = target.double()
        self.signal = float(self.target.square().sum())
        self.draws = draws
        self.statistics = Running()
        groups = min(GROUPS, draws) if track_mean else 1
        self.sizes = [draws // groups + (k < draws % groups) for k in range(groups)]
        self.group = 0
        self.sums = self.target.new_zeros(groups, *target.shape) if track_mean else None
        self.group_mse = torch.zeros(groups, dtype=torch.float64)

    def chunks(self, largest: int) -> Iterator[int]:
        """Numbers of draws to make at once, never across a group."""
        for group, size in enumerate(self.sizes):
            self.group = group
            for start in range(0, size, largest):
                yield min(largest, size - start)

    def update(self, square: Tensor, inner: Tensor, total: Tensor | None, weight: Tensor) -> None:
        """Add draws: ‖estimate‖² and ⟨estimate, g⟩ (draws,), their weighted sum of estimates (m, n), their weights (draws,)."""
        square, inner = square.double() * weight, inner.double() * weight
        mse = square - 2 * inner + self.signal
        self.statistics.update(torch.stack([mse, square, inner], dim=1))
        self.group_mse[self.group] += float(mse.sum()) / self.sizes[self.group]
        if self.sums is not None and total is not None:
            self.sums[self.group] += total

    def result(self) -> Measurement:
        mse, square, inner = self.statistics.estimates
        scale = 1 / self.signal if self.signal > 0 else math.nan
        bias = variance = mean = means = None
        if self.sums is not None:
            sizes = torch.tensor(self.sizes, device=self.sums.device, dtype=torch.float64)
            mean = self.sums.sum(0) / self.draws
            means = self.sums / sizes[:, None, None]
            defects = (means - self.target).flatten(1)
            gram = (defects @ defects.T).cpu()
            bias = jackknife(lambda keep: _squared_mean(gram[keep][:, keep]), len(self.sizes))
            group_mse = self.group_mse
            variance = jackknife(lambda keep: float(group_mse[keep].mean()) - _squared_mean(gram[keep][:, keep]), len(self.sizes))
        return Measurement(
            draws=self.draws,
            mse=mse,
            square=square,
            alignment=Estimate(inner.value * scale, inner.standard_error * scale),
            bias=bias,
            variance=variance,
            mean=mean,
            group_means=means,
            group_mse=None if means is None else self.group_mse,
        )


def _squared_mean(gram: Tensor) -> float:
    """Unbiased ‖E D‖² from the Gram matrix of independent D_k: the mean of its off-diagonal entries."""
    k = len(gram)
    return float((gram.sum() - gram.diagonal().sum()) / (k * (k - 1))) if k > 1 else math.nan


def jackknife(statistic: Callable[[Tensor], float], groups: int) -> Estimate:
    """The statistic of all groups and its delete-one-group standard error (infinite below three groups)."""
    everything = torch.arange(groups)
    value = statistic(everything)
    if groups < 3:
        return Estimate(value, math.inf)
    left_out = torch.tensor([statistic(everything[everything != k]) for k in range(groups)], dtype=torch.float64)
    return Estimate(value, spread_of_left_out(left_out))


def spread_of_left_out(left_out: Tensor) -> float:
    """The jackknife's standard error of a statistic from its values without each group in turn, (groups,)."""
    groups = len(left_out)
    return float(((groups - 1) / groups * (left_out - left_out.mean()).square().sum()).sqrt())
