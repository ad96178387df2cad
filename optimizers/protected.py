"""Directions that later training must leave alone: gradients, and steps, are taken off a basis P that grows from task to task.

    G ← G − (GP)Pᵀ                        P (n×k) with orthonormal columns, on the side of a layer's inputs
    after a task: P ← [P, V_j], V_j the fewest leading right singular vectors of M(I − PPᵀ) for which P holds the share ε of ‖M‖²

Exact because a linear layer says Wx: if x lies in the span of P and a step D has DP = 0, then (W + D)x = Wx, however many steps there are. The
gradient ΔᵀX has the inputs as its rows, so what P grows by are inputs that mattered; M is what an optimizer remembers of gradients.

What keeps a step off P where its gradient is: every rule that is linear in gradients (SGD, momentum), and Adam in a frame V with PᵀV = 0, whose
divisions happen in coordinates: the lift DVᵀ stays in span(V). Adam on the entries divides each by a number of its own, which turns a row off P into
one that is not; ``Outside`` takes the step itself off P. Weight decay moves Wx too, and has no place beside P.

``Protecting`` is what optimizers with a P share, GORP among them; ``ProtectedAdamW`` is what protection does alone, without frame or adapter:

    G ← G(I − PPᵀ);  M, S ← Adam's moments of G;  W ← W − η·(M/√S)(I − PPᵀ)

Biased once P has columns, AdamW before. State: 2mn + nk elements.
Reference: gradient projection memory (2103.09762), which takes P from inputs; first moments in their place: GORP (2507.02503).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from estimators import directions
from optimizers.bases import Identity
from optimizers.inner import State
from optimizers.outputs import Complement, Context, Lift
from optimizers.subspace import Params, Rule, Subspace

BASIS = "P"  # its name in the state of a parameter


def off(G: Float[Tensor, "*batch m n"], P: Float[Tensor, "n k"] | None) -> Float[Tensor, "*batch m n"]:
    """G(I − PPᵀ); G itself where nothing is protected."""
    return G if P is None else G - (G @ P) @ P.mT


def grown(P: Float[Tensor, "n k"] | None, M: Float[Tensor, "m n"], energy: float, most: float) -> Float[Tensor, "n l"]:
    """P and as many leading right singular vectors of M off P as it takes to hold the share ``energy`` of ‖M‖², P's own part of it counted.

    Never more than ``most``·n columns, a share below 1, so that something is left to learn in. Orthonormal to rounding; an M of zeros adds nothing.
    Raises ``ValueError`` for shares that are none.
    """
    m, n = M.shape
    if not (0 < energy <= 1 and 0 < most < 1):
        raise ValueError(f"grown(M={m}x{n}, energy={energy:g}, most={most:g}): energy must be in (0, 1], most in (0, 1)")
    P = M.new_zeros(n, 0) if P is None else P
    rest = off(M, P)
    _, s, V = directions.svd(rest)
    total, held = M.double().square().sum(), M.double().square().sum() - rest.double().square().sum()
    reached = held + s.double().square().cumsum(0)
    rounding = torch.finfo(M.dtype).eps * max(m, n)
    wanted = 0 if held >= energy * total else int((reached < energy * total).sum()) + 1
    real = int((s > rounding * total.sqrt()).sum())  # directions that are more than rounding
    count = max(0, min(wanted, real, int(most * n) - P.shape[1]))
    fresh = off(V[:, :count].mT, P).mT  # once more: what is left of P in them is rounding of M, and may be much of a small rest
    return torch.cat([P, torch.linalg.qr(fresh)[0]], dim=1)


@dataclass(frozen=True)
class Protect(Complement):
    """The frame sees the gradient off P."""

    def enter(self, G: Tensor, W: list[Tensor], state: State, flipped: bool) -> Tensor:  # noqa: ARG002
        return off(G, state.get(BASIS))


@dataclass(frozen=True)
class Outside(Lift):
    """W ← W + α·D(I − PPᵀ), for a step D in all entries."""

    def low(self, context: Context) -> tuple[Tensor, float] | None:
        low = super().low(context)
        return None if low is None else (off(low[0], context.state.get(BASIS)), low[1])


class Protecting(Subspace, abc.ABC):
    """Base of optimizers whose steps keep off a P of each weight. ``energy``: ε; ``most``: the largest share of n that P takes. Call ``end_task``
    after each task. Raises ``ValueError`` for weight decay where something is protected."""

    def __init__(self, params: Params, lr: float, own: dict[str, Any], *, energy: float, most: float, seed: int, **options: Any) -> None:
        if not (0 < energy <= 1 and 0 < most < 1):
            raise ValueError(f"{type(self).__name__}(energy={energy}, most={most}): energy must be in (0, 1], most in (0, 1)")
        self.energy, self.most = energy, most
        # one matrix at a time: bases of equal matrices have other sizes
        super().__init__(params, lr, own, seed=seed, foreach=False, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in the base, and no decay of what is protected."""
        decay = param_group.get("weight_decay", self.defaults["weight_decay"])
        if decay and self.protects(param_group):
            raise ValueError(f"{type(self).__name__}(weight_decay={decay}): decay moves what is protected; it must be 0")
        super().add_param_group(param_group)

    @abc.abstractmethod
    def protects(self, group: dict[str, Any]) -> bool:
        """Whether a group, perhaps without defaults as yet, holds what later tasks must leave alone."""

    @abc.abstractmethod
    def protected(self) -> list[Tensor]:
        """The weights W (m×n) that have a P."""

    @abc.abstractmethod
    def remembered(self, W: Tensor) -> Tensor:
        """Moments (l×n) of this task in whose rows a weight's P grows."""

    def basis_of(self, W: Tensor) -> Tensor | None:
        """P (n×k) of a weight, None before the first task ended."""
        return self.state[W].get(BASIS) if W in self.state else None

    @torch.no_grad()
    def protect(self, W: Tensor, P: Tensor) -> None:
        """Give a weight its P, with orthonormal columns; its moments are forgotten. The layer says what it said."""
        self._forget(W)
        self.state[W][BASIS] = P.contiguous()

    @torch.no_grad()
    def end_task(self) -> None:
        """P of every protected weight grows by this task's first moments, and all moments are forgotten."""
        bases = {W: grown(self.basis_of(W), self.remembered(W), self.energy, self.most) for W in self.protected()}
        for p in list(self.state):
            self._forget(p)
        for W, P in bases.items():
            self.protect(W, P)

    def _forget(self, p: Tensor) -> None:
        self.state[p] = {"draws": self.state[p].get("draws", 0)}

    def _moment(self, p: Tensor, frame: str | None = None) -> Tensor:
        """The first moment of p, lifted from its frame; zeros where it had no step."""
        state = self.state.get(p, {})
        M = self.storage(self.group_of(p)).read(state, "exp_avg")
        if M is None:
            return torch.zeros_like(p)
        return M if frame is None else M @ state[frame].mT


class ProtectedAdamW(Protecting):
    """AdamW off P. ``rank`` says which groups are matrices with a P; others are AdamW's."""

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        rank: int | float | None = 1,
        energy: float = 0.9,
        most: float = 0.5,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, {"rank": rank}, energy=energy, most=most, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(basis=Identity(), inner=self.adam(group), side="right", complement=Protect(), output=Outside())

    def protects(self, group: dict[str, Any]) -> bool:
        return group.get("rank", self.defaults["rank"]) is not None

    def protected(self) -> list[Tensor]:
        return [W for group in self.param_groups if self.protects(group) for W in group["params"]]

    def remembered(self, W: Tensor) -> Tensor:
        return self._moment(W)
