"""Steps inside the backward pass: each parameter is updated as soon as its gradient is complete, and the gradient is freed.

The most gradient memory held at once is then one parameter's instead of the model's (LOMO, GaLore's per-layer mode). A step is made at the end of
an accumulation only: the published per-layer GaLore steps on every micro-batch, so that its "accumulated" update is one Adam step for
each (GaLore issues 78, 79). While gradients accumulate they are held for all layers.
Nothing that needs all gradients at once is possible: clipping by the global norm finds no gradients, and DistributedDataParallel averages
after the hooks have run. Clip each matrix by its own norm with ``clip``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from estimators import processes
from optimizers.subspace import Subspace


class PerLayer:
    """The handle: ``remove()`` ends it. ``accumulate``: backward passes a step; ``clip``: largest norm of each gradient, None for no clipping.

    Keep ``optimizer.step()`` in the loop, at the end of each accumulation: it steps those parameters that not every micro-batch used, whose
    gradients are still there, and begins the next accumulation. Learning-rate schedules act on the optimizer as always. Raises
    ``ValueError`` when several processes train, or for an accumulation below 1.
    """

    def __init__(self, optimizer: Subspace, *, accumulate: int = 1, clip: float | None = None) -> None:
        if accumulate < 1:
            raise ValueError(f"per_layer(accumulate={accumulate}): must be at least 1")
        if processes.size() > 1:
            raise ValueError("per_layer: gradients are averaged over processes after these steps; use one process or optimizer.step()")
        self.optimizer, self.accumulate, self.clip = optimizer, accumulate, clip
        self.passes: dict[Tensor, int] = {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.handles: list[Any] = [self._hooked(p) for p in parameters]
        self.handles += [optimizer.register_step_pre_hook(self._late), optimizer.register_step_post_hook(self._ended)]

    def _hooked(self, p: Tensor) -> Any:
        """Also where gradients are off for now, as in a layer that has no turn."""
        needed = p.requires_grad
        p.requires_grad_()
        handle = p.register_post_accumulate_grad_hook(self._arrived)
        p.requires_grad_(needed)
        return handle

    @torch.no_grad()
    def _arrived(self, p: Tensor) -> None:
        self.passes[p] = self.passes.get(p, 0) + 1
        if self.passes[p] == self.accumulate:
            self._clipped(p)
            self.optimizer.step_of(p)
            p.grad = None

    def _late(self, *_: Any) -> None:
        for p in self.passes:
            if p.grad is not None:
                self._clipped(p)

    def _ended(self, *_: Any) -> None:
        for p in self.passes:
            p.grad = None
        self.passes.clear()

    def _clipped(self, p: Tensor) -> None:
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_([p], self.clip)

    def remove(self) -> None:
        """Gradients stay until ``optimizer.step()`` again."""
        for handle in self.handles:
            handle.remove()


def per_layer(optimizer: Subspace, *, accumulate: int = 1, clip: float | None = None) -> PerLayer:
    """Have ``optimizer`` step inside the backward pass from now on."""
    return PerLayer(optimizer, accumulate=accumulate, clip=clip)
