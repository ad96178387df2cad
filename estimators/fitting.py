"""The law of every layer: one and the same, or fitted to what is known of that layer's gradient, learned in the backward pass.

For a fitted law (``Law.fitted``) the knowledge of a layer is its ``Directions``, from the full gradient of one micro-batch, formed, reduced and
freed inside the backward pass, and from the sketches ĜV between two of these. Before any gradient was seen the law is Haar–Stiefel.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from estimators import keyed, processes
from estimators.directions import Directions, of_gradient, refine
from estimators.haar_stiefel import HaarStiefel
from estimators.law import Constant, Law, constant
from estimators.linear import LowRankLinear


class _FromBasis(Protocol):
    def from_basis(self, Q: Tensor, sigma: Tensor, tail: Tensor, rank: int, c: float, **options: Any) -> Law: ...


class Fitting:
    """Laws of named layers. ``keep``: directions known, as k or as a multiple of a layer's rank, at least r; ``online``: weight of sketches."""

    def __init__(self, law: type[Law], c: Constant, options: dict[str, Any], keep: int | float, online: float, seed: int) -> None:
        self.c: Constant = c
        self.law, self.options, self.keep, self.online, self.seed = law, options, keep, online, seed
        self.known: dict[str, Directions] = {}  # what the draws in use were made from
        self.pending: dict[str, Directions] = {}  # learned since, for the next draws
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}  # sum of (ĜV)ᵀ(ĜV) in the subspace in use, and over how many

    def law_of(self, name: str, layer: LowRankLinear) -> Law:
        """The law for the next draw of this layer."""
        n, rank = layer.in_features, layer.rank
        c = constant(self.c, n, rank)
        if not self.law.fitted:
            return self.law(n=n, rank=rank, c=c, **self.options)
        if name not in self.known:
            return HaarStiefel(n=n, rank=rank, c=c if self.law.unbiased else c * rank / n)
        return cast(_FromBasis, self.law).from_basis(*self.known[name], rank, c, **self.options)

    def check(self, layer: LowRankLinear) -> None:
        """Raise what a draw for this layer would raise for impossible options."""
        n, k = layer.in_features, self._directions(layer)
        self.law_of("", layer)
        if self.law.fitted:
            c = constant(self.c, n, layer.rank)
            cast(_FromBasis, self.law).from_basis(torch.eye(n, k), torch.ones(k), torch.ones(()), layer.rank, c, **self.options)

    @torch.no_grad()
    def reduce(self, name: str, layer: LowRankLinear, X: Tensor, D: Tensor, draw: int) -> None:
        """Learn from the full gradient ΔᵀX of one micro-batch, which lives only here; nothing if it is zero, infinite or NaN.

        Of several processes each has a part of the micro-batch: their mean is taken, m×n numbers over the network once a redraw.
        ``draw`` keys the range finder.
        """
        G = processes.mean((D.mT @ X).to(layer.B.dtype))
        if bool(torch.isfinite(G).all()):
            generator = keyed.generator(self.seed, f"{name}.directions", draw, X.device)
            learned = of_gradient(G, self._directions(layer), generator)
            if _usable(learned):
                self.pending[name] = learned

    @torch.no_grad()
    def accumulate(self, name: str, sketch: Tensor) -> None:
        """Note (ĜV)ᵀ(ĜV) of one micro-batch, r×r; of several processes from the mean of their sketches, m×r numbers over the network."""
        sketch = processes.mean(sketch)
        gram = sketch.mT @ sketch
        usable = torch.isfinite(gram).all()  # of a skipped step it is not, and must not spoil the others
        total, count = self._seen.get(name, (torch.zeros_like(gram), torch.zeros((), dtype=torch.int64, device=gram.device)))
        self._seen[name] = (total + torch.where(usable, gram, torch.zeros_like(gram)), count + usable)

    def advance(self, name: str, V: Tensor) -> None:
        """Before V goes: know what was learned since it was drawn, from a full gradient or else from its sketches."""
        gram, count = self._seen.pop(name, (None, None))
        if name in self.pending:
            self.known[name] = self.pending.pop(name)
        elif gram is not None and count is not None and name in self.known and bool(count):
            learned = refine(self.known[name], V, gram / count, self.online)
            self.known[name] = learned if _usable(learned) else self.known[name]

    def bytes(self) -> int:
        """What the knowledge of all layers occupies."""
        held = [t for known in (*self.known.values(), *self.pending.values()) for t in known] + [gram for gram, _ in self._seen.values()]
        return sum(t.numel() * t.element_size() for t in held)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers."""
        return {
            "known": {name: list(directions) for name, directions in self.known.items()},
            "pending": {name: list(directions) for name, directions in self.pending.items()},
            "seen": {name: list(seen) for name, seen in self._seen.items()},
        }

    def load_state_dict(self, state: dict[str, Any], device: dict[str, torch.device]) -> None:
        """The inverse; ``device``: where each layer lives."""
        self.known = {name: Directions(*(t.to(device[name]) for t in known)) for name, known in state["known"].items()}
        self.pending = {name: Directions(*(t.to(device[name]) for t in known)) for name, known in state["pending"].items()}
        self._seen = {name: (gram.to(device[name]), count.to(device[name])) for name, (gram, count) in state["seen"].items()}

    def _directions(self, layer: LowRankLinear) -> int:
        wanted = self.keep if isinstance(self.keep, int) else round(self.keep * layer.rank)
        return max(layer.rank, min(wanted, layer.out_features, layer.in_features))


def _usable(known: Directions) -> bool:
    """Whether a law can be fitted: the squares of a tiny or huge gradient may be zero or infinite in float32."""
    total = known.sigma.sum() + known.tail
    return bool(torch.isfinite(total) & (total > 0))
