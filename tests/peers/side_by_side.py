"""One matrix under a published optimizer and one under ours, with equal gradients in float32.

Where the peer draws its projector, or the sign of one matters (moments outlive a refresh), ours is given the peer's, at the refreshes of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.frames import Dense, Frame, TwoSided

SHAPES = [(24, 40), (40, 24), (32, 32)]
STEPS, EVERY, RANK = 25, 10, 4
ROUNDING = 1e-5  # of the distance that the weights move: 25 steps in float32, whose numbers are 6e-8 apart


def gradients(shape: tuple[int, ...]) -> Tensor:
    """A signal of rank 6 that drifts, and noise: (steps, *shape)."""
    generator = torch.Generator().manual_seed(5)
    sizes = ((shape[0], 6), (6, shape[1]), (STEPS, 6, 1), (STEPS, *shape))
    U, V, drift, noise = (torch.randn(*size, generator=generator) for size in sizes)
    return U @ (V / 4 * (1 + drift.cumsum(0) / 5)) + 0.3 * noise


def pair(shape: tuple[int, int]) -> tuple[nn.Parameter, nn.Parameter]:
    """Two equal matrices."""
    W = 0.03 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return nn.Parameter(W.clone()), nn.Parameter(W.clone())


def apart(ours: torch.optim.Optimizer, p: nn.Parameter, peer: torch.optim.Optimizer, q: nn.Parameter) -> float:
    """Largest difference of two weights after any step, in units of the largest distance that a weight has moved at the end."""
    start, worst = q.detach().clone(), 0.0
    for G in gradients(tuple(p.shape)):
        q.grad, p.grad = G.clone(), G.clone()
        peer.step()  # first: ours asks for its projector
        ours.step()
        worst = max(worst, float((p - q).detach().abs().max()))
    moved = float((q.detach() - start).abs().max())
    assert moved > 0.01
    return worst / moved


def frame(projector: Any) -> Frame:
    """A peer's matrix, or pair of them, in our layout: (n, r), acting on the projected dimension."""
    if isinstance(projector, list | tuple):
        return TwoSided(projector[0], projector[1].mT)
    return Dense(projector.mT if projector.shape[0] < projector.shape[1] else projector)


def projector_of(peer: torch.optim.Optimizer, q: nn.Parameter) -> Callable[[str, int], Frame]:
    """What ``inject`` is set to: the projector that ``peer`` has for ``q`` at that time."""
    return lambda *_: frame(peer.state[q]["projector"].ortho_matrix)


def group(q: nn.Parameter, **options: Any) -> list[dict[str, Any]]:
    """The parameter group that galore-torch, fira and apollo-torch project."""
    return [{"params": [q], "rank": RANK, "update_proj_gap": EVERY, "proj_type": "std"} | options]
