"""The scaling law of losses with one efficiency factor a method, its fit, its bootstrap and its inversion.

    L_m(N, D) = E + A/(ρ_N N)^α + B/(ρ_D D)^β,     ρ_N = ρ_D = 1 for the reference method, E, A, B, α, β the same for all m

N weights, D training tokens, L in nats. A method m trains a model as if it had ρ_N times its weights and had seen ρ_D times its tokens. Exponents of
each method's own are badly determined by the few runs there are; shared ones leave one number or two a method to compare (arXiv 2602.07712). With
ρ_N = 1 the tokens that the reference needs for m's loss, over m's tokens, are ρ_D at every N and D.

The fit is that of arXiv 2203.15556 (Chinchilla), D.2: Huber loss of ln L̂ − ln L, δ = 1e-3, from several starts. Differs from it: where runs
scatter by more than that, δ grows with them (far below the noise it is the absolute residual that is minimised, by a law that passes through
several of the points, whose residuals then tell the bootstrap nothing); trust-region steps with an exact Jacobian in the place of L-BFGS; N and D
about their geometric means; and starts whose A and B solve the linear problem at given E, α, β.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares, nnls
from scipy.special import expit, logit

from theory.arguments import Array, finite

DELTA = 1e-3  # smallest of Huber's, in ln L
HUBER, MEDIAN = 1.345, 1.4826  # δ over the spread at which 95 % efficiency is left; spread over the median of |r|, both for normal noise
STEEPEST = 4.0  # exponents lie between 0 and this, so that no set of losses drives one to infinity; those of trainings are below 1
STARTS = ((0.2, 0.6), (0.1, 0.3, 0.7), (0.2, 0.5))  # E as a share of the smallest loss, α, β
ROUGH, EXACT = 1e-6, 1e-15  # relative changes at which a descent ends: of a start and of a resample, and of the fit
LEAST = 0.05  # of 1 − leverage: where the law follows runs wherever they go, a residual has nothing to be scaled up from
ALONE = 1e-7  # smallest singular value of the Jacobian, its columns of unit length, below which a combination of parameters is free


@dataclass(frozen=True)
class ScalingLaw:
    """E, A, B, α, β and the factors of every method but the reference, whose are 1. A or B = 0: no such term, E holds what it was."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    rho_N: dict[str, float] = field(default_factory=dict)
    rho_D: dict[str, float] = field(default_factory=dict)

    def floor(self, N: ArrayLike, method: str = "") -> Array:
        """E + A/(ρ_N N)^α, what no number of tokens goes below; shape of N. ``method``: the reference if it has no factors."""
        N = np.asarray(N, dtype=np.float64)
        return self.E + (self.A * (self.rho_N.get(method, 1.0) * N) ** -self.alpha if self.A else np.zeros_like(N))

    def loss(self, N: ArrayLike, D: ArrayLike, method: str = "") -> Array:
        """L in nats, shape of N and D broadcast."""
        rest = self.B * (self.rho_D.get(method, 1.0) * np.asarray(D, dtype=np.float64)) ** -self.beta if self.B else 0.0
        return self.floor(N, method) + rest

    def tokens(self, loss: ArrayLike, N: ArrayLike, method: str = "") -> Array:
        """D at which L = ``loss`` on N weights; infinite where that is not above the floor. Raises ``ValueError`` for a law without B."""
        if not self.B:
            raise ValueError("scaling.tokens: the law has no term in D, every run it was fitted to had as many tokens")
        rest = np.asarray(loss, dtype=np.float64) - self.floor(N, method)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(rest > 0, (self.B / rest) ** (1 / self.beta) / self.rho_D.get(method, 1.0), np.inf)

    def saved(self, N: ArrayLike, D: ArrayLike, method: str) -> Array:
        """Tokens that the reference needs for the loss of ``method`` at (N, D), over D; above 1 the method saves tokens."""
        return self.tokens(self.loss(N, D, method), N) / np.asarray(D, dtype=np.float64)


@dataclass(frozen=True)
class Runs:
    """Final losses L in nats of runs by ``method`` on N weights and D tokens; vectors of one length."""

    N: Array
    D: Array
    L: Array
    method: tuple[str, ...]
    reference: str

    @classmethod
    def of(cls, N: ArrayLike, D: ArrayLike, L: ArrayLike, method: Sequence[str], reference: str) -> Runs:
        """Raises ``ValueError`` for values that are not positive and finite, other lengths, and when nobody is the reference."""
        arrays = [finite("scaling.fit", name, value) for name, value in (("N", N), ("D", D), ("L", L))]
        if any(array.shape != (len(method),) for array in arrays):
            raise ValueError(f"scaling.fit: N, D, L of shapes {[array.shape for array in arrays]} for {len(method)} names of methods")
        if any((array <= 0).any() for array in arrays):
            raise ValueError("scaling.fit: N, D and L must be positive")
        if reference not in method:
            raise ValueError(f"scaling.fit: no run of the reference {reference!r}, there are {', '.join(dict.fromkeys(method))}")
        return cls(N=arrays[0], D=arrays[1], L=arrays[2], method=tuple(method), reference=reference)

    @cached_property
    def others(self) -> list[str]:
        """Methods with factors of their own, in the order of their first run."""
        return [name for name in dict.fromkeys(self.method) if name != self.reference]


@dataclass(frozen=True)
class Fit:
    """``law`` and how it lies in the runs: ``residuals`` ln L − ln L̂, ``delta`` Huber's, ``doubts`` what the runs cannot tell, one line each."""

    law: ScalingLaw
    runs: Runs
    theta: Array
    model: _Model
    residuals: Array
    cost: float
    delta: float
    doubts: tuple[str, ...]

    @property
    def spread(self) -> float:
        """Standard deviation of ln L about the law, degrees of freedom taken off; NaN if none are left."""
        free = len(self.residuals) - len(self.theta)
        return float(np.sqrt(np.sum(self.residuals**2) / free)) if free else float("nan")

    @property
    def explained(self) -> float:
        """Share of the variance of ln L that the law explains."""
        logs = np.log(self.runs.L)
        return float(1 - np.sum(self.residuals**2) / np.sum((logs - logs.mean()) ** 2))


def fit(
    N: ArrayLike,
    D: ArrayLike,
    L: ArrayLike,
    method: Sequence[str],
    reference: str,
    *,
    size_factors: bool = True,
    delta: float | None = None,
) -> Fit:
    """The law of these runs, by Huber loss with ``delta`` in ln L. ``size_factors``: ρ_N a parameter of every method, otherwise 1.
    ``delta``: if none, 1.345 times the spread about a first fit with the smallest.

    If all runs have one N, there is no term in N, if one D none in D, and ``doubts`` says so. Raises ``ValueError`` for fewer points than
    parameters, and when all runs have one N and one D.
    """
    runs = Runs.of(N, D, L, method, reference)
    if len(np.unique(runs.N)) == len(np.unique(runs.D)) == 1:
        raise ValueError(
            f"scaling.fit: all {len(runs.L)} runs have N = {runs.N[0]:g} and D = {runs.D[0]:g}; a law needs other sizes or token counts"
        )
    return _fitted(runs, _Model(runs, size_factors), delta)


def bootstrap(found: Fit, block: Sequence[object], resamples: int, seed: int) -> list[ScalingLaw]:
    """Laws fitted to ``resamples`` new sets of losses: L̂ with the residuals of every block of runs kept or mirrored, by a fair coin.

    A wild bootstrap: ln L* = ln L̂ ± (I − H)⁻¹r within a block, H = J(JᵀJ)⁺Jᵀ: to first order the residual about the law that is fitted
    without the block. Runs of one ``block`` (one label a run) share their coin, so what they have in common (an order of data, an initialisation)
    stays in common; blocks may have spreads of their own; and what the law does not explain counts as noise. Seeds resampled within a cell
    instead would, with two of them, show half of the variance. Deterministic in ``seed``. Raises ``ValueError`` when the fit has no freedom left.
    """
    n, p = len(found.residuals), len(found.theta)
    if n <= p:
        raise ValueError(f"scaling.bootstrap: {n} points for {p} parameters leave no residuals to draw from")
    names = {label: i for i, label in enumerate(dict.fromkeys(block))}
    index = np.array([names[label] for label in block])
    coins = np.random.default_rng(seed).choice((-1.0, 1.0), size=(resamples, len(names)))
    model = found.model
    fitted, jacobian = model(found.theta)
    U = np.linalg.svd(jacobian, full_matrices=False)[0]
    drawn = np.empty(n)
    for i in range(len(names)):
        mine = index == i
        values, vectors = np.linalg.eigh(np.eye(int(mine.sum())) - U[mine] @ U[mine].T)
        drawn[mine] = vectors @ ((vectors.T @ found.residuals[mine]) / np.maximum(values, LEAST))
    return [model.law(_descend(model, fitted + coin[index] * drawn, found.theta, found.delta, ROUGH).x) for coin in coins]


def interval(values: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Percentiles that hold the share ``level`` of the values; infinite ones count."""
    low, high = np.quantile(np.asarray(values, dtype=np.float64), [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return float(low), float(high)


class _Model:
    """ln L̂ and its Jacobian. θ = (e, a, u, b, v, ln ρ_N…, ln ρ_D…) with α = STEEPEST/(1 + e⁻ᵘ), β of v; a and u or b and v missing without that
    term; N and D about their means."""

    def __init__(self, runs: Runs, size_factors: bool) -> None:
        self.runs = runs
        self.terms = [len(np.unique(values)) > 1 for values in (runs.N, runs.D)]
        self.logs = [np.log(values) for values in (runs.N, runs.D)]
        self.centre = [float(values.mean()) for values in self.logs]
        self.places = [values - centre for values, centre in zip(self.logs, self.centre, strict=True)]
        self.whose = np.array([[name == other for other in runs.others] for name in runs.method], dtype=np.float64)
        self.factors = [self.terms[0] and size_factors, self.terms[1]]
        self.count = 1 + 2 * sum(self.terms) + len(runs.others) * sum(self.factors)

    def parts(self, theta: Array) -> list[tuple[float, float, Array]]:
        """(ln of the coefficient, exponent, ln ρ of the other methods) of every term."""
        head, tail, found = 1, 1 + 2 * sum(self.terms), []
        for term, factor in zip(self.terms, self.factors, strict=True):
            scale, exponent = theta[head : head + 2] if term else (-np.inf, -np.inf)
            rho = theta[tail : tail + len(self.runs.others)] if factor else np.zeros(len(self.runs.others))
            head, tail = head + 2 * term, tail + len(self.runs.others) * factor
            found.append((float(scale), float(STEEPEST * expit(exponent)), rho))
        return found

    def __call__(self, theta: Array) -> tuple[Array, Array]:
        """ln L̂ (points,) and its Jacobian (points, parameters)."""
        parts = self.parts(theta)
        moved = [place + self.whose @ rho for place, (_, _, rho) in zip(self.places, parts, strict=True)]
        logs = [np.full(len(self.whose), theta[0])]
        logs += [scale - exponent * at for (scale, exponent, _), at in zip(parts, moved, strict=True)]
        total = np.logaddexp.reduce(logs)
        shares = [np.exp(some - total) for some in logs]
        columns = [shares[0][:, None]]
        for share, at, term, (_, exponent, _) in zip(shares[1:], moved, self.terms, parts, strict=True):
            columns += [share[:, None], -(exponent * (1 - exponent / STEEPEST) * share * at)[:, None]] if term else []
        for share, (_, exponent, _), factor in zip(shares[1:], parts, self.factors, strict=True):
            columns += [-exponent * share[:, None] * self.whose] if factor else []
        return total, np.hstack(columns)

    def law(self, theta: Array) -> ScalingLaw:
        """θ in the units of N and D."""
        (a, alpha, rho_N), (b, beta, rho_D) = self.parts(theta)
        A, B = (float(np.exp(scale + exponent * at)) for (scale, exponent), at in zip(((a, alpha), (b, beta)), self.centre, strict=True))
        factors = [dict(zip(self.runs.others, np.exp(rho).tolist(), strict=True)) for rho in (rho_N, rho_D)]
        return ScalingLaw(float(np.exp(theta[0])), A, B, alpha, beta, *factors)

    def starts(self) -> list[Array]:
        """θ at every E, α, β of ``STARTS``, A and B from the linear problem, factors 1."""
        found = []
        for share, *exponents in itertools.product(*STARTS):
            E = share * self.runs.L.min()
            kept = [(place, exponent) for place, exponent, term in zip(self.places, exponents, self.terms, strict=True) if term]
            columns = [np.exp(-exponent * place) for place, exponent in kept]
            solved = nnls(np.stack(columns, 1), self.runs.L - E)[0] if columns else []
            scales = np.log(np.maximum(solved, 1e-3 * E))
            pairs = [value for scale, (_, exponent) in zip(scales, kept, strict=True) for value in (scale, logit(exponent / STEEPEST))]
            found.append(np.array([np.log(E), *pairs, *np.zeros(self.count - 1 - len(pairs))]))
        return found

    def doubts(self, theta: Array) -> tuple[str, ...]:
        """What these runs cannot tell, whatever their losses."""
        found = []
        for term, values, name, lost in zip(self.terms, (self.runs.N, self.runs.D), "ND", ("A and α", "B and β"), strict=True):
            if not term:
                found.append(f"all runs have one {name} = {values[0]:g}: {lost} are not identifiable, and E contains that term")
            elif len(np.unique(values)) == 2:
                found.append(
                    f"all runs have one of two {name}: a floor and a power need three, so E and {lost} rest on what the factors add"
                )
        jacobian = self(theta)[1]
        lengths = np.linalg.norm(jacobian, axis=0)
        if (lengths == 0).any() or np.linalg.svd(jacobian / lengths, compute_uv=False)[-1] < ALONE:
            found.append("a combination of the parameters leaves all losses as they are, so they are not identifiable from these runs")
        return tuple(found)


def _fitted(runs: Runs, model: _Model, delta: float | None) -> Fit:
    logs = np.log(runs.L)
    if len(logs) < model.count:
        raise ValueError(f"scaling.fit: {len(logs)} points for {model.count} parameters; train more sizes, token counts or seeds")
    first = DELTA if delta is None else delta
    rough = [_descend(model, logs, start, first, ROUGH, 50) for start in model.starts()]
    best = _descend(model, logs, min(rough, key=lambda result: result.cost).x, first, EXACT)
    if delta is None:
        spread = MEDIAN * np.median(np.abs(best.fun)) * np.sqrt(len(logs) / max(1, len(logs) - model.count))
        first = max(DELTA, HUBER * float(spread))
        best = _descend(model, logs, best.x, first, EXACT)
    return Fit(model.law(best.x), runs, best.x, model, -best.fun, float(best.cost), first, model.doubts(best.x))


def _descend(model: _Model, logs: Array, start: Array, delta: float, tolerance: float, most: int = 500) -> Any:
    last: list[tuple[bytes, tuple[Array, Array]]] = []  # the Jacobian is asked for where the residuals were

    def at(theta: Array) -> tuple[Array, Array]:
        key = theta.tobytes()
        if not last or last[0][0] != key:
            last[:] = [(key, model(theta))]
        return last[0][1]

    with np.errstate(divide="ignore"):  # scipy's, at a gradient of zero
        return least_squares(
            lambda theta: at(theta)[0] - logs,
            start,
            jac=lambda theta: at(theta)[1],  # pyright: ignore[reportArgumentType], the stub knows its names only
            loss="huber",
            f_scale=delta,
            ftol=tolerance,
            xtol=tolerance,
            gtol=tolerance,
            max_nfev=most,
        )
