"""Inner rules: from the coordinates B of a gradient to the step in those coordinates. B is (*batch, M, r); state is tensors by name.

``Adam``       M ← β₁M + (1−β₁)B, N ← β₂N + (1−β₂)B², step −η·M̂/(√N̂ + ε), with M̂ = M/(1−β₁ᵗ), N̂ = N/(1−β₂ᵗ) (1412.6980).
``Plain``      nothing is kept, step −ηB.
``Momentum``   M ← βM + (1−dampening)B, step −ηM.
``Adafactor``  N as an outer product of its row and column means, β₂ = 1 − t^decay, update clipped to RMS 1 (1804.04235).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from optimizers.storage import FLOAT, Storage

State = dict[str, Any]
Rate = float | Tensor  # a learning rate; a tensor (*batch, 1, 1) where it depends on the weight


class Move(NamedTuple):
    """A step −factor·numerator/denominator, and the unit u for which the direction is u·numerator/denominator, step = −size·direction."""

    numerator: Tensor
    denominator: Tensor | None
    factor: Rate
    size: Rate
    unit: float = 1.0

    def step(self) -> Tensor:
        """−factor·numerator/denominator, multiplied before it is divided, as torch.optim.AdamW rounds. Written over the denominator: asked last."""
        if self.denominator is None or isinstance(self.factor, Tensor):
            scaled = self.numerator * (-self.factor)
            return scaled if self.denominator is None else scaled.div_(self.denominator)
        zero = self.numerator.new_zeros(())
        return torch.addcdiv(zero, self.numerator, self.denominator, value=-self.factor, out=self.denominator)

    def direction(self) -> Tensor:
        """What the step is before its size; the same at learning rate 0."""
        scaled = self.numerator * self.unit if self.unit != 1.0 else self.numerator
        return scaled if self.denominator is None else scaled / self.denominator


@dataclass(frozen=True, kw_only=True)
class Inner(abc.ABC):
    """Base. ``storage``: how moments are kept; ``first``, ``second``: state names of the moments that can be re-projected."""

    storage: Storage = FLOAT

    first: ClassVar[str | None] = None
    second: ClassVar[str | None] = None
    names: ClassVar[tuple[str, ...]] = ()  # every state tensor of the rule

    @abc.abstractmethod
    def move(self, state: State, B: Tensor, lr: Rate) -> Move:
        """Advance ``state`` by B and return the step. ``state["step"]`` is t, this step included."""

    def read(self, state: State, name: str) -> Tensor | None:
        """A moment in float32 or better, None before its first use."""
        return self.storage.read(state, name)

    def moment(self, state: State, name: str | None) -> Tensor:
        """The same where it must exist. Raises ``ValueError`` where the rule has none."""
        value = None if name is None else self.read(state, name)
        if value is None:
            raise ValueError(f"{type(self).__name__} has no moment {name!r} to re-project; use KEEP or Reset")
        return value

    def write(self, state: State, name: str, value: Tensor) -> None:
        """The inverse."""
        self.storage.write(state, name, value)

    def corrections(self, t: int) -> tuple[float, float]:  # noqa: ARG002
        """What first and second moments of t steps must be divided by."""
        return 1.0, 1.0

    def clear(self, state: State) -> None:
        """Forget everything, the step count of the bias correction included."""
        for name in self.names:
            self.storage.drop(state, name)
        state["step"] = 0

    def _begun(self, state: State, name: str, B: Tensor) -> Tensor:
        """A moment, zeros before its first use."""
        value = self.read(state, name)
        return torch.zeros_like(B, memory_format=torch.contiguous_format) if value is None else value


@dataclass(frozen=True, kw_only=True)
class Adam(Inner):
    """``eps_inside``: ε is added to √N before the bias correction, and the correction multiplies the step (GaLore's and Fira's code)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    correct_bias: bool = True
    eps_inside: bool = False

    first: ClassVar[str | None] = "exp_avg"
    second: ClassVar[str | None] = "exp_avg_sq"
    names: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def move(self, state: State, B: Tensor, lr: Rate) -> Move:
        beta1, beta2 = self.betas
        M = self._begun(state, "exp_avg", B).lerp_(B, 1 - beta1)
        N = self._begun(state, "exp_avg_sq", B).mul_(beta2).addcmul_(B, B, value=1 - beta2)
        self.write(state, "exp_avg", M)
        self.write(state, "exp_avg_sq", N)
        first, second = self.corrections(state["step"])
        root = second**0.5
        if self.eps_inside:
            size = lr * (root / first)
            return Move(M, N.sqrt().add_(self.eps), size, size)
        return Move(M, N.sqrt().div_(root).add_(self.eps), lr / first, lr, 1 / first)

    def corrections(self, t: int) -> tuple[float, float]:
        """(1 − β₁ᵗ, 1 − β₂ᵗ); ones without bias correction."""
        if not self.correct_bias:
            return 1.0, 1.0
        return 1 - self.betas[0] ** t, 1 - self.betas[1] ** t


@dataclass(frozen=True, kw_only=True)
class Plain(Inner):
    """Gradient descent."""

    def move(self, state: State, B: Tensor, lr: Rate) -> Move:  # noqa: ARG002
        return Move(B, None, lr, lr)


@dataclass(frozen=True, kw_only=True)
class Momentum(Inner):
    """``copy_first``: the first M is B itself (torch.optim.SGD); otherwise M starts at zero."""

    beta: float = 0.9
    dampening: float = 0.0
    copy_first: bool = True

    first: ClassVar[str | None] = "momentum_buffer"
    names: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def move(self, state: State, B: Tensor, lr: Rate) -> Move:
        M = self._begun(state, "momentum_buffer", B).mul_(self.beta)
        M.add_(B, alpha=1.0 if self.copy_first and state["step"] == 1 else 1 - self.dampening)
        self.write(state, "momentum_buffer", M)
        return Move(M, None, lr, lr)


@dataclass(frozen=True, kw_only=True)
class Adafactor(Inner):
    """``beta1``: momentum of the steps, learning rate included; ``clip``: largest RMS of an update before the learning rate."""

    beta1: float | None = None
    decay: float = -0.8
    eps: float = 1e-30
    clip: float = 1.0

    first: ClassVar[str | None] = "exp_avg"
    names: ClassVar[tuple[str, ...]] = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg")

    def move(self, state: State, B: Tensor, lr: Rate) -> Move:
        U = rms_clip(self.precondition(state, B), self.clip) * lr
        if self.beta1 is not None:
            U = self._begun(state, "exp_avg", B).mul_(self.beta1).add_(U, alpha=1 - self.beta1)
            self.write(state, "exp_avg", U)
        return Move(U, None, 1.0, lr)

    def precondition(self, state: State, B: Tensor) -> Tensor:
        """B/√N with N = row⊗col/mean(row), both of them running means of B² + ε. Advances the state."""
        beta2 = 1 - state["step"] ** self.decay
        square = B.square().add_(self.eps)
        means = {"exp_avg_sq_row": square.mean(-1), "exp_avg_sq_col": square.mean(-2)}
        for name, mean in means.items():
            state[name] = mean if name not in state else state[name].lerp_(mean, 1 - beta2)
        row, col = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        return B * (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * col.rsqrt().unsqueeze(-2)


def rms(X: Tensor) -> Tensor:
    """√mean(X²) of every matrix, (*batch, 1, 1)."""
    return X.square().mean((-2, -1), keepdim=True).sqrt()


def rms_clip(X: Tensor, limit: float) -> Tensor:
    """X, scaled down where its RMS is above ``limit``."""
    return X / (rms(X) / limit).clamp_min(1.0)
