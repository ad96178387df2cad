"""Steps inside the backward pass: each parameter is updated as soon as its gradient is complete, and the gradient is freed.

The most gradient memory held at once is then one parameter's instead of the model's (LOMO, GaLore's per-layer mode). A parameter that is used
twice has its one gradient, the sum, when all of its uses have been passed. A step is made at the end of an accumulation only: the published per-layer
GaLore steps on every micro-batch, so that its "accumulated" update is one Adam step for each (GaLore issues 78, 79). While gradients accumulate they
are held for all layers, which is why LOMO and AdaLomo refuse it.

Each gradient can be clipped by its own norm (``clip``). The norm of all of them is not known before the last, so that clipping by it takes two
backward passes over one graph (``clip_total``): the first adds up norms and frees gradients, the second steps, with every gradient times
min(1, clip_total/(norm + 10⁻⁶)). DistributedDataParallel averages after the hooks have run, and is refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from estimators import processes
from optimizers.buckets import members, refuse_unusable
from optimizers.subspace import Subspace


class PerLayer:
    """The handle: ``remove()`` ends it. ``accumulate``: backward passes a step; ``clip``: largest norm of each gradient, ``clip_total``: of all
    together, None for no clipping, as torch.nn.utils.clip_grad_norm_ does it in the gradients' own precision.

    Keep ``optimizer.step()`` in the loop, at the end of each accumulation: it steps those parameters that not every micro-batch used, whose
    gradients are still there, and begins the next accumulation. Learning-rate schedules act on the optimizer as always. With ``clip_total`` call
    ``backward(loss)`` of the handle in the place of ``loss.backward()``.

    A gradient that is not finite raises ``ValueError`` out of the backward pass: its parameter, and those whose turn had not come, are as they were,
    those before it have made their steps, gradients are dropped, and the next backward pass begins a new accumulation. With ``clip_total`` nothing at
    all has changed, as the first pass finds it.

    Raises ``ValueError`` when several processes train, for an accumulation below 1, or above 1 with ``clip_total`` or an optimizer that is
    ``fused``, which also refuses a second backward pass before ``optimizer.step()``; and for both kinds of clipping, or by nothing.
    """

    def __init__(self, optimizer: Subspace, *, accumulate: int = 1, clip: float | None = None, clip_total: float | None = None) -> None:
        self.kind = type(optimizer).__name__
        if accumulate < 1:
            raise ValueError(f"per_layer(accumulate={accumulate}): must be at least 1")
        if accumulate > 1 and (optimizer.fused or clip_total is not None):
            given = "" if clip_total is None else f", clip_total={clip_total}"
            raise ValueError(
                f"per_layer({self.kind}, accumulate={accumulate}{given}): while gradients accumulate they are held for all layers; use"
                " larger batches, or optimizer.step() after the last backward pass"
            )
        for name, value in (("clip", clip), ("clip_total", clip_total)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"per_layer({name}={value}): must be positive and finite")
        if clip is not None and clip_total is not None:
            raise ValueError(f"per_layer(clip={clip}, clip_total={clip_total}): one of the two")
        if processes.size() > 1:
            raise ValueError("per_layer: gradients are averaged over processes after these steps; use one process or optimizer.step()")
        self.optimizer, self.accumulate, self.clip, self.clip_total = optimizer, accumulate, clip, clip_total
        self.passes: dict[Tensor, int] = {}
        self.norms: list[Tensor] | None = None  # of the first of two passes, while it runs
        self.factor: float | None = None  # of all gradients, in the second
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.handles: list[Any] = [self._hooked(p) for p in parameters]
        self.handles += [optimizer.register_step_pre_hook(self._late), optimizer.register_step_post_hook(self._ended)]

    def backward(self, loss: Tensor) -> float | None:
        """The backward pass of ``loss`` and all steps. With ``clip_total`` two of them, for which the graph is kept, and the norm of all gradients as
        it was is returned."""
        if self.clip_total is None:
            loss.backward()
            return None
        self.norms = []
        try:
            loss.backward(retain_graph=True)
            norm = math.hypot(*map(float, self.norms))
        finally:
            self.norms = None
        self.factor = min(1.0, self.clip_total / (norm + 1e-6))
        try:
            loss.backward()
        finally:
            self.factor = None
        return norm

    def _hooked(self, p: Tensor) -> Any:
        """Also where gradients are off for now, as in a layer that has no turn."""
        needed = p.requires_grad
        p.requires_grad_()
        handle = p.register_post_accumulate_grad_hook(self._arrived)
        p.requires_grad_(needed)
        return handle

    @torch.no_grad()
    def _arrived(self, p: Tensor) -> None:
        try:
            (self._stepped if self.norms is None else self._measured)(p)
        except Exception:
            p.grad = None
            self._ended()
            raise

    def _stepped(self, p: Tensor) -> None:
        if self.clip_total is not None and self.factor is None:
            raise ValueError(
                f"per_layer(clip_total={self.clip_total}): one backward pass cannot know the norm; call backward(loss) of the handle"
            )
        self.passes[p] = self.passes.get(p, 0) + 1
        if self.optimizer.fused and self.passes[p] > 1:
            raise ValueError(
                f"per_layer({self.kind}): a second backward pass before optimizer.step(); gradients do not accumulate here, and those of the first"
                " pass are used up; this parameter was not changed again"
            )
        if self.passes[p] == self.accumulate:
            self._clipped(p)
            self.optimizer.step_of(p)
            p.grad = None

    def _measured(self, p: Tensor) -> None:
        found = [member for member in members(self.optimizer, self.optimizer.group_of(p)) if member.p is p]
        refuse_unusable(self.kind, found, "nothing was changed")
        assert self.norms is not None
        self.norms += [member.norm for member in found if member.norm is not None]
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
        if self.factor is not None and self.factor < 1 and p.grad is not None:
            p.grad.mul_(self.factor)

    def restart(self) -> None:
        """Forget an accumulation that was not ended by ``optimizer.step()``, and its gradients."""
        self._ended()

    def remove(self) -> None:
        """Gradients stay until ``optimizer.step()`` again."""
        for handle in self.handles:
            handle.remove()


def per_layer(optimizer: Subspace, *, accumulate: int = 1, clip: float | None = None, clip_total: float | None = None) -> PerLayer:
    """Have ``optimizer`` step inside the backward pass from now on; the options are ``PerLayer``'s."""
    return PerLayer(optimizer, accumulate=accumulate, clip=clip, clip_total=clip_total)
