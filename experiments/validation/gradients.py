"""Stochastic gradients of the linear layers of a model: a finite population, one matrix per mini-batch and layer.

Everything said about "the" gradient of a layer (g, Σ_ξ, S) is about this population, N equally likely mini-batches, and is exact for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from experiments.training.models import loss_of
from theory import mse, optimal

BUDGET_BYTES = 6 * 2**30


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every ``nn.Linear`` whose weight belongs to it alone; one tied to an embedding has that gradient too and is left out."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and owners[id(module.weight)] == 1}


def populations(
    model: nn.Module,
    batch: Callable[[int], Tensor],
    count: int,
    *,
    names: list[str] | None = None,
    budget_bytes: int = BUDGET_BYTES,
    tick: Callable[[int], None] = lambda _: None,
    loss: Callable[[nn.Module, Tensor], Tensor] = loss_of,
) -> Iterator[tuple[str, Tensor]]:
    """(layer name, gradients (N, m, n) float32 on the model's device) for the layers ``names`` (default: all), N = ``count``.

    ``batch(i)`` gives the token ids of mini-batch i, ``loss(model, ids)`` its loss. Layers are taken in groups that fit ``budget_bytes``; every group
    runs all N backward passes again, so memory is bounded for any model. ``tick`` hears of every backward pass.
    """
    layers = {name: layer for name, layer in linear_layers(model).items() if names is None or name in names}
    wanted = {id(p): p.requires_grad for p in model.parameters()}
    try:
        for group in groups(layers, count, budget_bytes):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            for name in group:
                layers[name].weight.requires_grad_(True)
            stacks = {name: layers[name].weight.new_empty(count, *layers[name].weight.shape) for name in group}
            for i in range(count):
                gradients = torch.autograd.grad(loss(model, batch(i)), [layers[name].weight for name in group])
                for name, gradient in zip(group, gradients, strict=True):
                    stacks[name][i] = gradient
                tick(1)
            for name in group:
                yield name, stacks.pop(name)
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(wanted[id(parameter)])


def groups(layers: dict[str, nn.Linear], count: int, budget_bytes: int) -> list[list[str]]:
    """Consecutive layers whose ``count`` gradients fit ``budget_bytes`` together; a layer too large alone is a group of its own."""
    result: list[list[str]] = []
    room = 0
    for name, layer in layers.items():
        size = count * layer.weight.numel() * layer.weight.element_size()
        if not result or size > room:
            result.append([])
            room = budget_bytes
        result[-1].append(name)
        room -= size
    return result


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Exact moments of a population of gradients: noise Σ_ξ, signal Σ_Θ (n, n), float64, and what they say about the layer."""

    noise: np.ndarray
    signal: np.ndarray
    spectrum: np.ndarray  # eigenvalues of S, largest first
    basis: np.ndarray  # eigenvectors of S
    count: int

    @property
    def second(self) -> np.ndarray:
        """S = Σ_ξ + Σ_Θ."""
        return self.noise + self.signal

    @property
    def signal_share(self) -> float:
        """‖g‖²/tr S in this population."""
        return float(np.trace(self.signal) / np.trace(self.second))

    @property
    def signal_share_beyond(self) -> float:
        """The same for the distribution that the mini-batches come from: ‖ḡ‖² holds tr Σ_ξ/N of noise, which is taken out.

        Unbiased numerator and denominator; slightly negative when there is no signal to see.
        """
        noise = float(np.trace(self.noise)) * self.count / (self.count - 1)
        return (float(np.trace(self.signal)) - noise / self.count) / float(np.trace(self.second))

    def summary(self) -> dict[str, float | list[float]]:
        """Ranks, shares and a spectrum of at most 64 points (relative to its sum), as plain numbers."""
        points = np.unique(np.geomspace(1, self.spectrum.size, 64).astype(int)) - 1
        return {
            "signal_norm2": float(np.trace(self.signal)),
            "trace_second": float(np.trace(self.second)),
            "signal_share": self.signal_share,
            "signal_share_beyond": self.signal_share_beyond,
            "effective_rank": optimal.effective_rank(self.spectrum),
            "stable_rank": optimal.stable_rank(self.spectrum),
            "spectrum_index": [int(i) + 1 for i in points],
            "spectrum": [float(v) for v in self.spectrum[points] / self.spectrum.sum()],
        }


def statistics(population: Tensor) -> Statistics:
    """Moments and spectrum of gradients (N, m, n)."""
    _, noise, signal = mse.gradient_moments(population.double().cpu().numpy())
    sigma, Q = np.linalg.eigh(noise + signal)
    return Statistics(noise=noise, signal=signal, spectrum=np.maximum(sigma[::-1], 0), basis=Q[:, ::-1].copy(), count=len(population))
