"""The one loop behind every zeroth-order method here: loss differences along random directions, by forward passes alone.

    for each of q queries i:   D_i = lift(Z_i) for every parameter, Z_i standard normal, from keys
                               ℓ_i = F(W + εD_i), and by ``form`` F(W − εD_i), F(W), or nothing more
    δ ← slopes of the ℓ (estimators/lr.py);   B ← (1/q)Σ δ_i Z_i;   M ← βM + (1−β)B with momentum, else B
    W ← (1 − ηλ)W − η·lift(M)

A method says how directions are drawn (``Directions``) and nothing else. W is never perturbed in place (optimizers/shifted.py) and nothing of D is
stored: its keys give it again. E[lift(B)] = c·∇F up to what the difference leaves of the loss's curvature. Variance: theory/mse.py ``lr``.
"""

from __future__ import annotations

import abc
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from estimators import keyed, processes
from estimators.law import Law
from estimators.lr import Form, check, slopes
from estimators.rounding import SIXTEEN_BIT, stochastic_round
from estimators.selection import rank_of
from optimizers.groups import Named, load_exactly
from optimizers.shifted import shifted

Frame = tuple[Tensor | None, Tensor | None]  # U (m×r) and V (n×r); None is the identity


@dataclass(frozen=True)
class Key:
    """What a draw depends on: the seed, the parameter's name, steps made before, and which query."""

    seed: int
    name: str
    step: int
    query: int = 0

    def generator(self, what: str, index: int, device: torch.device) -> torch.Generator:
        """Of this parameter's draw ``index`` of ``what``."""
        return keyed.generator(self.seed, f"{self.name}.{what}", index, device)


@dataclass(frozen=True, kw_only=True)
class Directions:
    """D = UZVᵀ of an m×n parameter, U and V from laws of rank r (called with ``n`` and ``rank``), held for ``every`` steps; None on a side: nothing
    is projected there. Without both D = Z, for parameters of any shape. The loss is asked at W ± εD, the estimate is δ·D, over r with
    ``over_rank``: its mean is c·∇F, c the product of the laws' constants, or that over r."""

    left: Callable[..., Law] | None = None
    right: Callable[..., Law] | None = None
    rank: int | float | None = None
    every: int = 1
    over_rank: bool = False

    def laws(self, shape: torch.Size) -> tuple[Law | None, Law | None]:
        """Of U and V for one shape; r is at most what the shape has."""
        if self.left is None and self.right is None:
            return None, None
        make = lambda law, n: None if law is None else law(n=n, rank=self.rank_for(shape))  # noqa: E731
        return make(self.left, shape[0]), make(self.right, shape[1])

    def rank_for(self, shape: torch.Size) -> int:
        """r of one shape."""
        assert self.rank is not None
        return min(rank_of(min(shape), self.rank), *shape)

    def frame(self, key: Key, p: Tensor) -> Frame:
        """U and V of the period that ``key.step`` is in."""
        exact, period = torch.promote_types(p.dtype, torch.float32), key.step // self.every
        draw = lambda law, what: None if law is None else law.sample(generator=key.generator(what, period, p.device), dtype=exact)  # noqa: E731
        U, V = self.laws(p.shape)
        return draw(U, "U"), draw(V, "V")

    def coordinates(self, key: Key, p: Tensor, frame: Frame) -> Tensor:
        """Z of one query: standard normal, r numbers in the place of every projected dimension."""
        generator = key.generator(f"Z{key.query}", key.step, p.device)
        exact = torch.promote_types(p.dtype, torch.float32)
        return torch.randn(self.sizes(p.shape, frame), generator=generator, device=p.device, dtype=exact)

    def updating(self, key: Key, p: Tensor, frame: Frame) -> Tensor:
        """Z of one query as the update sees it: the same."""
        return self.coordinates(key, p, frame)

    @staticmethod
    def sizes(shape: torch.Size, frame: Frame) -> list[int]:
        """Of Z."""
        if len(shape) != 2:
            return list(shape)
        return [size if F is None else F.shape[-1] for size, F in zip(shape, frame, strict=True)]

    def weight(self, shape: torch.Size) -> float:
        """What multiplies δ·D."""
        return 1 / self.rank_for(shape) if self.over_rank else 1.0

    def add(self, W: Tensor, frame: Frame, Z: Tensor, alpha: float) -> None:
        """W ← W + alpha·UZVᵀ in place."""
        U, V = frame
        left = Z if U is None else U @ Z
        if V is None:
            W.add_(left, alpha=alpha)
        else:
            W.addmm_(left, V.mT, alpha=alpha)

    def carry(self, M: Tensor, p: Tensor, old: Frame, new: Frame) -> Tensor:
        """Momentum when U and V change: lifted in the old ones and sketched in the new, over what VᵀV is on average, cn/r."""
        for side, law in enumerate(self.laws(p.shape)):
            before, after = old[side], new[side]
            if law is not None and before is not None and after is not None:
                R = before.mT @ after / (law.c * law.n / law.rank)
                M = M @ R if side else R.mT @ M
        return M


WHOLE = Directions()


class ZerothOrder(Named, torch.optim.Optimizer, abc.ABC):
    """Base of all zeroth-order methods: an optimizer of the parameters of ``model`` that require a gradient, which they never get.

    ``epsilon``: ε, how far along D the loss is asked; ``queries``: q; ``form``: "antithetic", "one_sided", or "leave_one_out" (q ≥ 2);
    ``momentum``: β; ``weight_decay``: λ, decoupled; ``rounding`` of 16-bit weights: "nearest" or "stochastic"; ``seed`` of all draws.
    Matrices get the method's directions, all other parameters whole ones.

    ``step(loss)``: ``loss`` makes one forward pass of the model on a fixed batch and returns the loss; the mean over processes is taken here, nothing
    else has to be sent. Returns the mean of the losses that were asked, NaN if none was of use. A query whose loss is not finite is left out and
    counted (``skipped``); with too few left the step changes nothing. Dropout would differ between the two losses of a query: call ``model.eval()``
    first.
    Raises ``ValueError`` for impossible values.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float,
        own: dict[str, Any] | None = None,
        *,
        epsilon: float = 1e-3,
        queries: int = 1,
        form: Form = "antithetic",
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        call = f"{type(self).__name__}(epsilon={epsilon}, form={form!r}, queries={queries})"
        check(call, epsilon, form, queries)
        if not (0 <= momentum < 1 and 0 <= lr < math.inf and 0 <= weight_decay < math.inf):
            raise ValueError(f"{call}: lr={lr} and weight_decay={weight_decay} must not be negative, momentum={momentum} in [0, 1)")
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"{call}: unknown rounding {rounding!r}, known are nearest, stochastic")
        self.model = model
        self.epsilon, self.queries, self.form, self.seed = epsilon, queries, form, seed
        self._untold = True
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [(name, p) for name, p in named if p.ndim == 2], "matrices": True, **(own or {})},
            {"params": [(name, p) for name, p in named if p.ndim != 2], "matrices": False},
        ]
        common = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rounding": rounding, "clock": 0, "skipped": 0}
        super().__init__([group for group in groups if group["params"]], common)
        for group in self.param_groups:
            directions = self.directions_of(group)
            for p in group["params"]:
                directions.laws(p.shape) if p.ndim == 2 else None  # each refuses its own impossible values

    @abc.abstractmethod
    def directions(self, group: dict[str, Any]) -> Directions:
        """How the directions of a group of matrices are drawn."""

    def directions_of(self, group: dict[str, Any]) -> Directions:
        """``directions``, or whole ones for parameters that are no matrices."""
        return self.directions(group) if group["matrices"] else WHOLE

    @property
    def clock(self) -> int:
        """Steps made."""
        return self.param_groups[0]["clock"]

    @property
    def skipped(self) -> int:
        """Queries left out because a loss was not finite."""
        return self.param_groups[0]["skipped"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; ``closure`` is the loss (class docstring)."""
        if closure is None:
            raise ValueError(f"{type(self).__name__}.step(): needs the loss as a function")
        read: set[str] = set()
        there = torch.stack([self._loss(closure, +self.epsilon, query, read) for query in range(self.queries)])
        other = None
        if self.form == "antithetic":
            other = torch.stack([self._loss(closure, -self.epsilon, query, read) for query in range(self.queries)])
        elif self.form == "one_sided":
            other = processes.mean(closure().detach().double())
        good = there.isfinite() if other is None else there.isfinite() & other.isfinite()
        chosen = good.nonzero().flatten().tolist()
        if len(chosen) > (self.form == "leave_one_out"):
            some = other if other is None or not other.ndim else other[good]
            delta = slopes(self.form, there[good], some, self.epsilon).tolist()
            self._update(dict(zip(chosen, delta, strict=True)), read)
        for group in self.param_groups:
            group["clock"] += 1
            group["skipped"] += self.queries - len(chosen)
        asked = there[good] if self.form != "antithetic" or other is None else torch.cat([there[good], other[good]])
        return asked.mean() if chosen else torch.full_like(there.mean(), math.nan)

    def _loss(self, closure: Callable[[], Any], epsilon: float, query: int, read: set[str]) -> Tensor:
        """F at W + epsilon·D of one query, the mean over processes."""
        names = {p: name for group in self.param_groups for name, p in zip(group["param_names"], group["params"], strict=True)}
        kinds = {p: self.directions_of(group) for group in self.param_groups for p in group["params"]}

        def move(name: str, p: nn.Parameter) -> Tensor:
            kind, key = kinds[p], Key(self.seed, name, self.clock, query)
            frame = kind.frame(key, p)
            moved = p.to(torch.promote_types(p.dtype, torch.float32), copy=True)
            kind.add(moved, frame, kind.coordinates(key, p, frame), epsilon)
            return moved.to(p.dtype)

        with shifted(self.model, names, move) as seen:
            value = closure().detach().double()
        read |= seen
        return processes.mean(value)

    def _update(self, delta: dict[int, float], read: set[str]) -> None:
        unread = []
        for group in self.param_groups:
            kind = self.directions_of(group)
            for name, p in zip(group["param_names"], group["params"], strict=True):
                if name not in read:
                    unread.append(name)
                    continue
                self._move(group, kind, name, p, delta)
        if unread and self._untold:
            self._untold = False
            warnings.warn(
                f"{type(self).__name__}: no module reads {', '.join(unread[:3])}{' …' if unread[3:] else ''} in its own forward pass;"
                " they are not trained",
                stacklevel=4,
            )

    def _move(self, group: dict[str, Any], kind: Directions, name: str, p: Tensor, delta: dict[int, float]) -> None:
        key = Key(self.seed, name, self.clock)
        frame, state, beta, weight = kind.frame(key, p), self.state[p], group["momentum"], kind.weight(p.shape)
        B = torch.zeros(kind.sizes(p.shape, frame), device=p.device, dtype=torch.promote_types(p.dtype, torch.float32))
        for query, slope in delta.items():
            Z = kind.updating(Key(self.seed, name, self.clock, query), p, frame)
            B.add_(Z, alpha=weight * slope / len(delta))
        if beta:
            M = state.get("momentum")
            if M is not None and self.clock and self.clock % kind.every == 0:
                M = kind.carry(M, p, kind.frame(Key(self.seed, name, self.clock - 1), p), frame)
            B = B * (1 - beta) if M is None else M * beta + B * (1 - beta)
            state["momentum"] = B
        lr = float(group["lr"])
        exact = p if p.dtype not in SIXTEEN_BIT else p.float()
        if group["weight_decay"]:
            exact.mul_(1 - lr * group["weight_decay"])
        kind.add(exact, frame, B, -lr)
        if exact is not p:
            draw = keyed.generator(self.seed, f"{name}.rounding", self.clock, p.device)
            p.copy_(exact if group["rounding"] == "nearest" else stochastic_round(exact, p.dtype, draw))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps the precision it was saved in."""
        super().load_state_dict(state_dict)
        load_exactly(self, state_dict)
