"""The error of every law on the gradients of every layer, for mini-batches that the law has not seen.

    E‖ĜVVᵀ − g‖² = tr(E[P²]S) − 2tr(E[P]gᵀg) + ‖g‖²          (theory/levels.py)

is linear in S and in gᵀg. Both are estimated without bias from N mini-batches: S by their mean of ĜᵢᵀĜᵢ, gᵀg by their mean of ĜᵢᵀĜⱼ over i ≠ j, in
which no noise is squared. A fitted law learns its directions from one mini-batch more, as it does in training (estimators/fitting.py). Errors are
told over that of the mini-batch gradient itself, tr S − ‖g‖²: an unbiased estimate with the ratio e needs batches e times as large for the same
error. Standard errors leave out one mini-batch at a time (jackknife).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from estimators import LAWS, keyed
from estimators.directions import Directions, of_gradient
from estimators.law import Law
from estimators.selection import rank_of
from experiments.training.live import levels_of
from theory import levels, optimal

KEEP = 2.0  # directions known, as a multiple of r: the default of ``convert``


@dataclass(frozen=True)
class Sums:
    """Estimates of a layer's moments from all mini-batches (first entry) and from all but one (the others): tr S and ‖g‖², (N + 1,); on the k known
    directions q_iᵀSq_i and ‖gq_i‖², (N + 1, k), all float64."""

    second: np.ndarray
    signal: np.ndarray
    second_on: np.ndarray
    signal_on: np.ndarray

    @property
    def noise(self) -> np.ndarray:
        """The error of a mini-batch gradient itself, (N + 1,)."""
        return self.second - self.signal

    def error(self, law: levels.Levels) -> np.ndarray:
        """E‖estimate − g‖², (N + 1,); the law knows the leading of the known directions."""
        k = law.square.size
        return np.array(
            [
                levels.ipa(law, float(s), float(g), on[:k], through[:k])
                for s, g, on, through in zip(self.second, self.signal, self.second_on, self.signal_on, strict=True)
            ]
        )


def _estimates(of_each: np.ndarray, with_sum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean of ‖Ĝᵢ‖², mean of ⟨Ĝᵢ, Ĝⱼ⟩ over i ≠ j) of all, then of all but one. ``of_each``: ‖Ĝᵢ‖²; ``with_sum``: ⟨Ĝᵢ, Σⱼ Ĝⱼ⟩; (N, …)."""
    count = len(of_each)
    squares, total = of_each.sum(0), with_sum.sum(0)
    second = np.concatenate([(squares / count)[None], (squares - of_each) / (count - 1)])
    pairs = total - 2 * with_sum + of_each - (squares - of_each)  # of all but i
    signal = np.concatenate([((total - squares) / (count * (count - 1)))[None], pairs / ((count - 1) * (count - 2))])
    return second, signal


def sums(gradients: Tensor, Q: Tensor) -> Sums:
    """Moments of gradients (N, m, n), N ≥ 3, seen on directions Q (n, k). In float64 but for the products."""
    whole = gradients.sum(0)
    projected, projected_whole = gradients @ Q, whole @ Q
    each = gradients.double().square().sum((1, 2)).cpu().numpy()
    each_with = torch.stack([(G.double() * whole).sum() for G in gradients]).cpu().numpy()
    on = projected.double().square().sum(1).cpu().numpy()
    on_with = (projected.double() * projected_whole).sum(1).cpu().numpy()
    return Sums(*_estimates(each, each_with), *_estimates(on, on_with))


@dataclass(frozen=True)
class Layer:
    """One layer: its sums and the directions that a mini-batch outside them showed."""

    name: str
    m: int
    n: int
    sums: Sums
    known: Directions

    @property
    def smaller(self) -> int:
        """min(m, n), below which a rank must be."""
        return min(self.m, self.n)

    def law(self, name: str, rank: int) -> Law:
        """The law as training has it at this rank, c = 1."""
        kind: Any = LAWS[name]
        if not kind.fitted:
            return kind(n=self.n, rank=rank)
        k = max(rank, min(round(KEEP * rank), self.known.sigma.numel()))
        Q, sigma, tail = self.known
        rest = sigma[k:].sum() + tail * (self.n - sigma.numel())
        return kind.from_basis(Q[:, :k], sigma[:k], rest / max(self.n - k, 1), rank, 1.0)

    def error(self, name: str, rank: int) -> np.ndarray:
        """E‖ĜVVᵀ − g‖² of this law, (N + 1,)."""
        return self.sums.error(levels_of(self.law(name, rank)))

    def facts(self) -> dict[str, Any]:
        """Sizes and what the gradients look like."""
        sigma = self.known.sigma.double().cpu().numpy()
        second, signal = float(self.sums.second[0]), float(self.sums.signal[0])
        return {"layer": self.name, "m": self.m, "n": self.n, "trace_second": second, "signal_norm2": signal} | {
            "effective_rank": optimal.effective_rank(sigma)
        }


def layers(populations: Iterator[tuple[str, Tensor]], seed: int) -> Iterator[Layer]:
    """Every layer with gradients (N + 1, m, n); the first mini-batch shows the directions, the others count."""
    for name, population in populations:
        first, gradients = population[0], population[1:]
        m, n = first.shape
        generator = keyed.generator(seed, f"{name}.advise", 0, first.device)
        known = of_gradient(first, min(m, n), generator)
        yield Layer(name, m, n, sums(gradients, known.Q), known)


def fits(layer: Layer, ratio: float) -> int | None:
    """r = ratio·n where the layer can have it, as ``convert`` decides."""
    rank = rank_of(layer.n, ratio)
    return rank if rank < layer.smaller else None


def jackknife(values: np.ndarray) -> tuple[float, float]:
    """(estimate, standard error) from the value of all, then of all but one, (N + 1,)."""
    left_out, count = values[1:], len(values) - 1
    return float(values[0]), float(np.sqrt((count - 1) / count * np.square(left_out - left_out.mean()).sum()))


def over_noise(errors: Sequence[np.ndarray], noise: Sequence[np.ndarray]) -> tuple[float, float]:
    """(error over that of the mini-batch gradient, its standard error), of layers together."""
    return jackknife(np.sum(errors, axis=0) / np.sum(noise, axis=0))
