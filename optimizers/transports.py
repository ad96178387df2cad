"""What becomes of the inner rule's moments when the frame changes. R: coordinates in the old frame to coordinates in the new.

``KEEP``            nothing: the numbers now mean something else (GaLore).
``Reset``           forgotten, with the step count of the bias correction (FRUGAL, Grass).
``ReprojectFirst``  M ← sketch_new(lift_old(M)); N stays (Flora, GoLore).
``ReprojectBoth``   also N ← (1−β₂ᵗ)·|(N̂ − M̂²)(R∘R) + (M̂R)²|: mean and variance of rotated numbers whose errors are uncorrelated
                    (LDAdam, 2410.16103).
                    ``filled``: the part 1 − Σⱼ cos² of a direction that lies outside the old frame has the row's mean N, so that a direction
                    never seen before does not begin with N = 0, and late in training with a step of (1−β₁)/√(1−β₂) in every entry.
``Rotate``          M ← MR, N ← |NR|: exact where R moves columns and changes none (DCT-AdamW).
``Roots``           M ← MR, N ← (√N·R)² (COAP's option).
``ReprojectOnce``   M ← sketch_new(lift_old(M)) for one step, whose result is not kept: GoLore's published code.
``SecondMoment``    M as under another of these, N by a policy of its own, named as in estimators/transport.py: ``zero``, ``keep``, ``reproject``,
                    ``row_scale``, ``random``, ``first_batch`` (the squared sketch of the gradient at which the frame changes).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from estimators import keyed
from estimators.transport import Second, renewed
from optimizers.frames import Frame
from optimizers.inner import Adam, Inner, State
from optimizers.storage import FLOAT


class Transport:
    """Base, and ``KEEP``."""

    def carry(self, inner: Inner, state: State, old: Frame, new: Frame) -> Any:
        """Change ``state`` for the new frame; what is returned is given to ``settle``."""

    def settle(self, inner: Inner, state: State, memo: Any) -> None:
        """Called after the step in which the frame changed."""


KEEP = Transport()


class Reset(Transport):
    """Begin anew."""

    def carry(self, inner: Inner, state: State, old: Frame, new: Frame) -> None:  # noqa: ARG002
        inner.clear(state)


class ReprojectFirst(Transport):
    """M is lifted and sketched anew: with an unbiased law its lift stays what it was in expectation."""

    def carry(self, inner: Inner, state: State, old: Frame, new: Frame) -> Any:
        M = inner.moment(state, inner.first)
        inner.write(state, str(inner.first), M @ old.change(new).to(M.dtype))


@dataclass(frozen=True)
class ReprojectBoth(Transport):
    """Both moments; ``filled``: see the module docstring. For Adam."""

    filled: bool = False

    def carry(self, inner: Inner, state: State, old: Frame, new: Frame) -> None:
        if not isinstance(inner, Adam):
            raise ValueError(f"{type(self).__name__}: the second moment of {type(inner).__name__} cannot be re-projected")
        M, N = inner.moment(state, inner.first), inner.moment(state, inner.second)
        R = old.coordinates(new).to(M.dtype)
        first, second = inner.corrections(state["step"])
        mean = M / first
        variance = N / second - mean.square()
        squares = (variance @ R.square() + (mean @ R).square()).abs()
        if self.filled:
            squares = squares + old.unseen(new, N / second)
        inner.write(state, str(inner.first), M @ R)
        inner.write(state, str(inner.second), squares * second)


class Rotate(Transport):
    """Columns that stay keep their moments, new ones have none. For Adam."""

    def carry(self, inner: Inner, state: State, old: Frame, new: Frame) -> None:
        for name in (inner.first, inner.second):
            X = inner.moment(state, name)
            X = X @ old.change(new).to(X.dtype)
            inner.write(state, str(name), X if name == inner.first else X.abs())


class Roots(Transport):
    """Second moments as the squares of re-projected roots. For Adam."""

    def carry(self, inner: Inner, state: State, old: Frame, new: Frame) -> None:
        M, N = inner.moment(state, inner.first), inner.moment(state, inner.second)
        R = old.change(new).to(M.dtype)
        inner.write(state, str(inner.first), M @ R)
        inner.write(state, str(inner.second), (N.sqrt() @ R).square())


@dataclass(frozen=True)
class ReprojectOnce(Transport):
    """``since``: number of the first refresh at which anything is re-projected, 1 for the first after the choice at the start."""

    since: int = 1

    def carry(self, inner: Inner, state: State, old: Frame, new: Frame) -> Tensor | None:
        if state["draws"] < self.since:
            return None
        M = inner.moment(state, inner.first)
        inner.write(state, str(inner.first), M @ old.change(new).to(M.dtype))
        return M

    def settle(self, inner: Inner, state: State, memo: Tensor | None) -> None:
        if memo is not None:
            inner.write(state, str(inner.first), memo)


@dataclass(frozen=True, eq=False)
class SecondMoment(Transport):
    """For Adam. ``base``: what becomes of M; ``G``: the gradient at which the frame changes, oriented; ``names`` and ``seed``: of the random draws.

    Where ``base`` forgets everything and N is not zero, M is zero and the step count goes on.
    """

    base: Transport
    policy: Second
    names: tuple[str, ...]
    seed: int
    G: Tensor

    def carry(self, inner: Inner, state: State, old: Frame, new: Frame) -> Any:
        before = {"step": state["step"]} | {str(name): inner.moment(state, name) for name in (inner.first, inner.second)}
        M, N = (before[str(name)] for name in (inner.first, inner.second))
        memo = self.base.carry(inner, state, old, new)
        if not state["step"]:
            if self.policy == "zero":
                return memo
            state["step"] = before["step"]
            inner.write(state, str(inner.first), torch.zeros_like(M))
        inner.write(state, str(inner.second), self._renewed(inner, before, N, old, new, state["draws"]))
        return memo

    def _renewed(self, inner: Inner, before: State, N: Tensor, old: Frame, new: Frame, draw: int) -> Tensor:
        if self.policy == "reproject":
            plain = replace(inner, storage=FLOAT)  # of a copy, which is not kept in 8 bits
            ReprojectBoth().carry(plain, before, old, new)
            return before[str(inner.second)]
        if self.policy == "first_batch":
            return new.sketch(self.G).to(N.dtype).square()
        return renewed(self.policy, N, self._normal(N, draw) if self.policy == "random" else None)

    def _normal(self, N: Tensor, draw: int) -> Tensor:
        generators = [keyed.generator(self.seed, f"{name}.second_moment", draw, N.device) for name in self.names]
        z = torch.stack([torch.randn(N.shape[-2:], generator=g, dtype=N.dtype, device=N.device) for g in generators])
        return z.view(N.shape)


def renewing(base: Transport, group: dict[str, Any], names: tuple[str, ...], G: Tensor) -> Transport:
    """``base``, or with a policy of its own for N where the group has one; ``base`` goes on to ``settle``."""
    policy = group.get("second_moment")  # groups of older checkpoints have none
    return base if policy is None else SecondMoment(base, policy, names, group["seed"], G)


def refuse(call: str, policy: Second | None, inner: Inner, frame: type[Frame], preconditioned: bool) -> None:
    """Raises ``ValueError`` for a policy of N where there is no N that is Adam's of the sketched gradient, or none that the frame can re-project."""
    if policy is not None and (not isinstance(inner, Adam) or preconditioned):
        raise ValueError(f"{call}(second_moment={policy!r}): the method has no Adam whose second moment this could be")
    if policy == "reproject" and frame.change is Frame.change:
        raise ValueError(f"{call}(second_moment={policy!r}): nothing can be re-projected in its frame, {frame.__name__}")
