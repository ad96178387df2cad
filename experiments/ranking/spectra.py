"""Spectra of weights and gradients at one moment of a training, and the overlap of gradient subspaces of two moments.

Mini-batch i shows the r leading right singular vectors Q_i of its gradient. The overlap of two moments t, t' is the mean of ‖Q_{t,i}ᵀQ_{t',j}‖²/r
over mini-batches i ≠ j, so that no two subspaces have the noise of a batch in common. At t = t' it is what noise alone leaves of 1, the noise floor.
Subspaces that have nothing to do with each other share r/n by chance (theory/angles.py), and

    (overlap(t, t') − r/n) / √((overlap(t, t) − r/n)(overlap(t', t') − r/n))

is 0 for them, 1 where nothing but noise lies between the two moments, and no number where a noise floor is at chance: then a mini-batch shows no
direction of the gradient. Standard errors leave out one mini-batch at a time (jackknife).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from estimators.measure import spread_of_left_out
from experiments.advising import errors
from experiments.training.models import loss_of
from experiments.validation.gradients import populations
from theory import angles, optimal

POINTS = 48  # of a spectrum that are kept


@dataclass(frozen=True)
class Moment:
    """One moment. ``weights``, ``gradients``: layer → singular values (float64, largest first), of gradients √ of the eigenvalues of E[ĜᵀĜ];
    ``frames``: layer → leading right singular vectors of every mini-batch, (N, n, r); ``layers``: what errors of laws are computed from."""

    step: int
    shapes: Mapping[str, tuple[int, int]]
    weights: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    frames: dict[str, Tensor]
    layers: list[errors.Layer]


def moment(
    step: int,
    model: nn.Module,
    names: list[str],
    batch: Callable[[int], Tensor],
    count: int,
    directions: int,
    *,
    loss: Callable[[nn.Module, Tensor], Tensor] = loss_of,
    seed: int = 0,
) -> Moment:
    """From ``count`` mini-batches, ``batch(i)`` and ``loss`` as ``populations`` takes them; ``directions``: columns of the frames at most."""
    weights, gradients, frames, layers = {}, {}, {}, []
    for name, G in populations(model, batch, count, names=names, loss=loss):
        weights[name] = singular_values(model.get_parameter(f"{name}.weight"))
        S = (G.double().mT @ G.double()).mean(0)
        gradients[name] = torch.linalg.eigvalsh(S).flip(0).clamp(min=0).sqrt().cpu().numpy()
        frames[name] = torch.linalg.svd(G.double(), full_matrices=False)[2][:, :directions].mT.cpu()
        layers += errors.layers(iter([(name, G)]), seed)  # of every rank
    return Moment(step, {layer.name: (layer.m, layer.n) for layer in layers}, weights, gradients, frames, layers)


@torch.no_grad()
def singular_values(W: Tensor) -> np.ndarray:
    """Largest first, float64."""
    return torch.linalg.svdvals(W.detach().double()).cpu().numpy()


def spectrum_rows(now: Moment) -> list[dict[str, Any]]:
    """``spectrum``: a layer's weights or gradient; ranks of Roy & Vetterli and ‖·‖²/s₁², both of squared singular values, and the curve sᵢ/s₁."""
    rows = []
    for of, found in (("weights", now.weights), ("gradient", now.gradients)):
        for name, s in found.items():
            at = np.unique(np.geomspace(1, s.size, POINTS).round().astype(int))
            m, n = now.shapes[name]
            ranks = {"effective_rank": optimal.effective_rank(s**2), "stable_rank": optimal.stable_rank(s**2)}
            curve = {"index": at.tolist(), "values": (s[at - 1] / s[0]).tolist()}
            rows.append({"kind": "spectrum", "step": now.step, "of": of, "layer": name, "m": m, "n": n, **ranks, **curve})
    return rows


def overlaps(some: Tensor, others: Tensor) -> np.ndarray:
    """‖Q_iᵀQ'_j‖²/r of all pairs, (N, N), of frames (N, n, r)."""
    return (torch.einsum("ina,jnb->ijab", some, others).square().sum((-1, -2)) / some.shape[-1]).numpy()


def off_diagonal(table: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean over i ≠ j, of all and without each i in turn."""
    count = len(table)
    total, own = table.sum() - np.trace(table), np.diag(table)
    without = total - (table.sum(0) + table.sum(1) - 2 * own)
    return float(total / (count * (count - 1))), without / ((count - 1) * (count - 2))


def relative(overlap: Any, floor: Any, other: Any, chance: float) -> Any:
    """(overlap − chance)/√((floor − chance)(other − chance)) of numbers or arrays; NaN where a floor is not above chance."""
    above = [np.where(np.asarray(one) > chance, one - chance, np.nan) for one in (floor, other)]
    return (overlap - chance) / np.sqrt(above[0] * above[1])


def angle_rows(earlier: Moment, later: Moment, directions: int) -> list[dict[str, Any]]:
    """``angle``: overlap of two moments (or of one with itself) for every layer and for ``all``, the mean over layers, with standard errors; median
    principal angle in degrees."""
    tables: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    both = (earlier, later)
    for a, b in ((0, 1), (0, 0), (1, 1)):
        tables[a, b] = {
            name: overlaps(both[a].frames[name][..., :directions], both[b].frames[name][..., :directions]) for name in earlier.frames
        }
    turned = {name: _principal_angles(both, name, directions) for name in earlier.frames}
    rows = []
    for name in (*earlier.frames, "all"):
        layers = list(earlier.frames) if name == "all" else [name]
        mine = {pair: np.mean([found[layer] for layer in layers], 0) for pair, found in tables.items()}
        chance = float(np.mean([angles.chance(earlier.shapes[layer][1], directions) for layer in layers]))
        (value, without), (floor, floor_without), (other, other_without) = (off_diagonal(mine[pair]) for pair in ((0, 1), (0, 0), (1, 1)))
        rows.append(
            {"kind": "angle", "step": earlier.step, "other": later.step, "layer": name, "directions": directions, "overlap": value}
            | {"overlap_se": spread_of_left_out(torch.from_numpy(without)), "relative": float(relative(value, floor, other, chance))}
            | {"relative_se": spread_of_left_out(torch.from_numpy(relative(without, floor_without, other_without, chance)))}
            | {"chance": chance, "median_degrees": float(np.degrees(np.median([turned[layer] for layer in layers])))}
        )
    return rows


def _principal_angles(both: tuple[Moment, Moment], name: str, directions: int) -> np.ndarray:
    """Between mini-batches i and i + 1, so that no pair has its batch in common, (N, r), radians."""
    frames = [moment.frames[name][..., :directions].numpy() for moment in both]
    count = len(frames[0])
    return np.array([angles.principal_angles(frames[0][i], frames[1][(i + 1) % count]) for i in range(count)])
