"""WTA-CRS: of X (T×n) the k rows are kept that count most, some for certain and some by lot, in the place of all T.

With p_j ∝ ‖x_j‖·‖δ_j‖ the |C| most probable tokens C are kept with weight 1; k − |C| more are drawn from the others with replacement, with
probabilities p_j/(1−p_C) and weights (1−p_C)/((k−|C|)p_j). Unbiased because the k − |C| draws are independent of Δ given p, and each has the
expectation Σ_{j∉C} (p_j/(1−p_C))·(1−p_C)/((k−|C|)p_j)·δ_jx_jᵀ; a token of p_j = 0 has x_j = 0. Any |C| < k will do; at k = T the sum is exact.
Variance: theory/wta_crs.py. Reference: arXiv 2305.15265, which takes |C| = argmin (1−p_C)/(k−|C|); the bound on the variance itself is least at
argmin (1−p_C)²/(k−|C|), which ``criterion="variance"`` takes.

‖δ_j‖ is that of the last visit of the same sample, kept in a table that grows by one number a token and is fed by ``visit``; without it p_j ∝ ‖x_j‖.
Differs from the published code, which is biased where no ‖δ_j‖ is known (it drops 1/p_j), where p_C > 0.999 (it drops what is drawn) and without
replacement (it has no weights), and which cuts the number of tokens off where this one rounds it; and here ‖δ_j‖ counts as at least ``FLOOR`` of the
mean, since a token of no error may have some at its next visit.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from estimators import selection
from estimators.compressed import Keeper, Key

FLOOR = 0.1  # of the mean ‖δ_j‖ of the batch: a token that gained an error since its last visit weighs at most as if drawn at this rate
Criterion = Literal["paper", "variance"]


def split(p: Float[Tensor, " t"], k: int, criterion: Criterion = "paper") -> tuple[Int[Tensor, " t"], Int[Tensor, ""]]:
    """(tokens by falling p, |C| in {0 … k−1}), C being the first |C| of them; 1 ≤ k ≤ T."""
    ordered, order = p.sort(descending=True)
    if k == len(p):  # all are kept, also where the criterion has ties
        return order, torch.tensor(k - 1, device=p.device)
    left = ordered.flip(0).cumsum(0).flip(0)[:k]  # 1 − p_C for |C| = 0, 1, …, summed and not subtracted
    spare = k - torch.arange(k, device=p.device)
    return order, (left ** (2 if criterion == "variance" else 1) / spare).argmin()


def sample(
    p: Float[Tensor, " t"], k: int, chances: Float[Tensor, " k"], criterion: Criterion = "paper"
) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"]]:
    """(tokens J, weights w) with E[Σ_i w_i·[J_i = j]] = 1 for every j of p_j > 0, from k independent uniforms; p need not sum to 1.

    The first |C| of J are C. Where all that is left has p_j = 0 the weights of what is drawn are 0.
    """
    order, winners = split(p, k, criterion)
    tokens, slots = torch.arange(len(p), device=p.device), torch.arange(k, device=p.device)
    residual = torch.where(tokens >= winners, p[order], 0.0)
    upper = residual.cumsum(0)
    mass = upper[-1]
    drawn = torch.searchsorted(upper, chances * mass, right=True).clamp_max(len(p) - 1)
    places = torch.where(slots < winners, slots, drawn)
    weights = torch.where(mass == 0, 0.0, mass / ((k - winners) * residual[places]))
    return order[places], torch.where(slots < winners, 1.0, weights)


class WTACRS(Keeper):
    """``rank``: k tokens, or a fraction of T in (0, 1], then at least ``minimal``; never more than T. Raises ``ValueError`` for impossible values."""

    def __init__(self, rank: int | float, minimal: int = 10, criterion: Criterion = "paper") -> None:
        call = f"WTACRS(rank={rank!r}, minimal={minimal}, criterion={criterion!r})"
        if isinstance(rank, bool) or not (rank >= 1 if isinstance(rank, int) else 0 < rank <= 1):
            raise ValueError(f"{call}: rank must be a positive integer, or a fraction of the tokens in (0, 1]")
        if minimal < 1:
            raise ValueError(f"{call}: minimal must be at least 1")
        if criterion not in get_args(Criterion):
            raise ValueError(f"{call}: unknown criterion, known are {', '.join(get_args(Criterion))}")
        self.rank, self.minimal = rank, minimal
        self.criterion: Criterion = criterion
        self.table: dict[int, Tensor] = {}  # sample → ‖δ_j‖ of its tokens at its last visit, on the CPU
        self.ids: Tensor | None = None

    def __repr__(self) -> str:
        return f"WTACRS(rank={self.rank}, minimal={self.minimal}, criterion={self.criterion!r})"

    def kept_tokens(self, tokens: int) -> int:
        """k of T tokens."""
        return min(tokens, max(selection.rank_of(tokens, self.rank), 1 if isinstance(self.rank, int) else self.minimal))

    def keep(self, X: Float[Tensor, "t n"], key: Key) -> tuple[Tensor, ...]:
        p = torch.linalg.vector_norm(X, dim=1, dtype=torch.promote_types(X.dtype, torch.float32)).double()
        known = self._known(len(X))
        if known is not None:
            p = p * known.to(p)
        k = self.kept_tokens(len(X))
        chances = torch.rand(k, generator=key.generator("wta_crs"), device=X.device, dtype=torch.float64)
        J, w = sample(p, k, chances, self.criterion)
        wide = torch.promote_types(X.dtype, torch.float32)
        rows = (X[J].to(wide) * w.to(wide).unsqueeze(1)).to(X.dtype)
        return (rows, J) if known is None or self.ids is None else (rows, J, self.ids.to(X.device))

    def gradient(self, kept: tuple[Tensor, ...], D: Float[Tensor, "t m"], key: Key) -> Float[Tensor, "m n"]:
        del key  # the draw looked at X, and J is kept
        rows, J, *ids = kept
        if ids:
            self._remember(ids[0], D)
        return D[J].mT @ rows

    # the table

    def visit(self, ids: Int[Tensor, " b"]) -> None:
        self.ids = ids

    def step(self) -> None:
        self.ids = None

    def _known(self, tokens: int) -> Tensor | None:
        """‖δ_j‖ (T,) as far as the samples were seen before, the mean in the place of others; None if the rows are of no known samples."""
        if self.ids is None or len(self.ids) == 0 or tokens % len(self.ids):
            return None
        norms = torch.full((len(self.ids), tokens // len(self.ids)), torch.nan)
        for row, number in zip(norms, self.ids.tolist(), strict=True):
            if (seen := self.table.get(number)) is not None:
                length = min(len(seen), len(row))
                row[:length] = seen[:length]
        mean = norms.nanmean()
        if not mean > 0:  # nothing is known, or all are zero
            return torch.ones(tokens)
        return norms.nan_to_num(nan=float(mean)).clamp_min(FLOOR * float(mean)).flatten()

    def _remember(self, ids: Tensor, D: Tensor) -> None:
        """One row a sample; one that is not finite leaves the table as it is."""
        norms = D.float().norm(dim=1).view(len(ids), -1).cpu()
        for number, row, finite in zip(ids.tolist(), norms, norms.isfinite().all(1).tolist(), strict=True):
            if finite:
                self.table[number] = row.clone()

    def state_dict(self) -> dict[str, Any]:
        if not self.table:
            return {}
        lengths = torch.tensor([len(row) for row in self.table.values()])
        return {"ids": torch.tensor(list(self.table)), "lengths": lengths, "norms": torch.cat(list(self.table.values()))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rows = state["norms"].cpu().split(state["lengths"].tolist()) if state else ()
        self.table = dict(zip(state["ids"].tolist() if state else (), rows, strict=True))
