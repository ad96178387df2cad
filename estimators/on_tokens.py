"""A law on the token axis: of X (T×n) the layer keeps VᵀX (r×n), the gradient ΔᵀX is estimated by (VᵀΔ)ᵀ(VᵀX).

Unbiased because V is drawn after X and without Δ, from E[VVᵀ | X] = I: E[ΔᵀVVᵀX | X, Δ] = ΔᵀX. Laws that do not look at the data draw V again
from its key in the backward pass and save VᵀX alone. The spectral law takes its directions and σ from X = UΣHᵀ: V = UV′ with E[V′V′ᵀ] = I
gives E[VVᵀ | X] = UUᵀ, not I, and UUᵀX = X; that U belongs to this very X costs nothing, since Δ is a fixed function of the batch
that does not know V. There V (T×r) is saved too, so r must be far below n to save anything, and the estimate is that of the same directions on
the features, ΔᵀX·HV′V′ᵀHᵀ; r ≥ n is exact.
Biased: ``top_svd`` (the best rank-r approximation of X) and ``fixed_basis`` (the first r tokens).
Variance: theory/mse.py ``tokens``; column-row sampling is the coordinate laws, of which rows of X are kept and no V is formed.
Reference: Drineas, Kannan & Mahoney (2006); sampling of activations in RAD, arXiv 2007.10412.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from estimators import directions, selection
from estimators.compressed import Keeper, Key
from estimators.coordinate import Coordinate
from estimators.haar_stiefel import HaarStiefel
from estimators.law import Law


class LawKeeper(Keeper):
    """``law``: a name of ``LAWS`` or a law class, ``options``: its other fields; ``rank``: r, at most the size of the axis, or a fraction of it in
    (0, 1]. Raises ``ValueError`` for another law or rank."""

    def __init__(self, law: str | type[Law], rank: int | float, **options: Any) -> None:
        from estimators import LAWS  # the registry imports every law; it cannot be imported before them

        call = f"{type(self).__name__}(law={law!r}, rank={rank!r})"
        if options.get("c", 1.0) != 1.0:
            raise ValueError(f"{call}: c={options['c']}; the estimate stands for the gradient itself, c = 1")
        if isinstance(law, str) and law not in LAWS:
            raise ValueError(f"{call}: unknown law, known are {', '.join(LAWS)}")
        if isinstance(rank, bool) or not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
            raise ValueError(f"{call}: rank must be a positive integer, or a fraction of the axis in (0, 1]")
        self.law, self.rank, self.options = LAWS[law] if isinstance(law, str) else law, rank, options
        self.unbiased = self.law.unbiased

    def __repr__(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"{type(self).__name__}({self.law.__name__}, rank={self.rank}{options})"

    def blind(self, size: int) -> Law:
        """The law for an axis of ``size`` that does not look at the data."""
        return self.law(n=size, rank=min(size, selection.rank_of(size, self.rank)), **self.options)

    def sighted(self, X: Float[Tensor, "s o"], generator: torch.Generator) -> Float[Tensor, "s r"]:
        """V on the first axis of X, fitted to X = UΣHᵀ; Haar–Stiefel where X is zero or not finite and has no directions."""
        size = len(X)
        rank = min(size, selection.rank_of(size, self.rank))
        exact = X.to(torch.promote_types(X.dtype, torch.float32))
        norm = exact.norm()
        if not bool((norm > 0) & torch.isfinite(norm)):
            return HaarStiefel(n=size, rank=rank).sample(generator=generator, dtype=X.dtype)
        U, sigma, _ = directions.svd(exact)
        k = U.shape[-1]
        kind: Any = self.law
        law = kind.from_basis(torch.eye(k, dtype=U.dtype, device=U.device), sigma.square(), 1.0, min(rank, k), **self.options)
        return (U @ law.sample(generator=generator, dtype=U.dtype)).to(X.dtype)


class LawOnTokens(LawKeeper):
    """V (T×r) of ``law`` on the tokens, independent in every process and call."""

    def keep(self, X: Float[Tensor, "t n"], key: Key) -> tuple[Tensor, ...]:
        generator = key.generator("tokens")
        if self.law.fitted:
            V = self.sighted(X, generator)
            return V.mT @ X, V
        law = self.blind(len(X))
        if isinstance(law, Coordinate):
            return (X[law.chosen((), generator, X.device)],)
        return (law.sample(generator=generator, dtype=X.dtype).mT @ X,)

    def gradient(self, kept: tuple[Tensor, ...], D: Float[Tensor, "t m"], key: Key) -> Float[Tensor, "m n"]:
        if self.law.fitted:
            VX, V = kept
            return (V.mT @ D).mT @ VX
        law, generator = self.blind(len(D)), key.generator("tokens")
        if isinstance(law, Coordinate):
            return (D[law.chosen((), generator, D.device)] * (law.c * law.n / law.rank)).mT @ kept[0]
        return (law.sample(generator=generator, dtype=D.dtype).mT @ D).mT @ kept[0]
