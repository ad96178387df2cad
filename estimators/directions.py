"""What a layer knows about its gradient's second moment S without any n×n matrix: k directions Q, their eigenvalues σ, and a mean tail.

At a refresh ``of_gradient`` reduces one micro-batch gradient Ĝ (m×n) to its leading right singular directions (σᵢ = sᵢ², tail the mean of
the rest), in O(mnk) operations and (m + n)(k + 8) numbers beside Ĝ. Between refreshes ``refine`` learns from the sketches ĜV alone: V's
columns are orthogonal, so (ĜV)ᵀ(ĜV) is S seen inside span(V), and its eigenvectors replace what was believed there; O(mr² + nr²).
Neither can bias the spectral law, which is unbiased for any Q and σ (estimators/spectral.py); a poor memory costs variance.
Reference: randomized range finder with power iterations, arXiv 0909.4061.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

OVERSAMPLE = 8  # extra directions of the range finder
ENOUGH = 0.99  # share of ‖G‖² at which orthogonal iteration stops
POWER = 2  # power iterations; each multiplies the decay of the spectrum by itself


class Directions(NamedTuple):
    """Q (n, k) orthonormal, sigma (k) largest first, tail: mean eigenvalue of the other n − k directions (a 0-dim tensor)."""

    Q: Tensor
    sigma: Tensor
    tail: Tensor


@torch.no_grad()
def of_gradient(G: Float[Tensor, "m n"], k: int, generator: torch.Generator) -> Directions:
    """The k leading right singular directions of G, 1 ≤ k ≤ min(m, n), and what is left of ‖G‖² a direction. float32 or better."""
    m, n = G.shape
    if not 1 <= k <= min(m, n):
        raise ValueError(f"of_gradient(G={m}x{n}, k={k}): k must be between 1 and min(m, n)")
    G = G.to(torch.promote_types(G.dtype, torch.float32))
    if k + OVERSAMPLE >= min(m, n):
        s, Q = right_singular(G)
    else:
        Z = torch.randn(m, k + OVERSAMPLE, generator=generator, device=G.device, dtype=G.dtype)
        Q = torch.linalg.qr(G.mT @ Z)[0]
        for _ in range(POWER):
            Q = torch.linalg.qr(G.mT @ torch.linalg.qr(G @ Q)[0])[0]
        s, W = right_singular(G @ Q)
        Q = Q @ W
    sigma = s[:k].square()
    return Directions(Q[:, :k].contiguous(), sigma, _tail(G.square().sum() - sigma.sum(), n - k))


def right_singular(G: Float[Tensor, "m n"]) -> tuple[Float[Tensor, " p"], Float[Tensor, "n p"]]:
    """Singular values, largest first, and right singular vectors of G; p = min(m, n). Through the Gram matrix where G is on a GPU."""
    if G.is_cuda:
        return gram_svd(G)
    return svd(G)[1:]


def svd(
    G: Float[Tensor, "*batch m n"],
) -> tuple[Float[Tensor, "*batch m p"], Float[Tensor, "*batch p"], Float[Tensor, "*batch n p"]]:
    """(U, s, V) with G = U diag(s) Vᵀ, s largest first, p = min(m, n).

    Where the iteration of LAPACK does not converge, in float64 from the Gram matrix.
    """
    try:
        U, s, Vh = torch.linalg.svd(G, full_matrices=False)
        return U, s, Vh.mT
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        s, V = gram_svd(G)
        Y = G.double() @ V.double()
        U = torch.linalg.qr(Y)[0]
        U = U * torch.where((U * Y).sum(-2, keepdim=True) < 0, -1.0, 1.0)  # QR may have turned a column round
        return U.to(G.dtype), s, V


def gram_svd(G: Float[Tensor, "*batch m n"]) -> tuple[Float[Tensor, "*batch p"], Float[Tensor, "*batch n p"]]:
    """Singular values and right vectors, from the eigenvectors of the smaller of GᵀG and GGᵀ in float64: GPUs run Jacobi's SVD much more slowly.

    Singular values below 1e-8 of the largest are lost in rounding; their vectors are orthonormal all the same.
    """
    m, n = G.shape[-2:]
    exact = G.double()
    energy, U = torch.linalg.eigh(exact.mT @ exact if m >= n else exact @ exact.mT)
    energy, U = energy.flip(-1).clamp_min(0), U.flip(-1)
    Q = (
        U if m >= n else torch.linalg.qr(exact.mT @ U)[0]
    )  # orthogonal columns already; QR gives them length one, and fills in for those of none
    return energy.sqrt().to(G.dtype), Q.to(G.dtype)


def power(G: Float[Tensor, "*batch m n"], start: Float[Tensor, "*batch n r"], steps: int = 1) -> Float[Tensor, "*batch n r"]:
    """Orthogonal iteration towards the leading right singular vectors of G: Q ← orth(GᵀG·Q), ``steps`` times from ``start``, or fewer
    where Q holds ENOUGH of all energy of G, and so of that of the exact vectors.

    What two steps hold of the energy of the exact ones, from directions that were right some training steps before, is measured by
    ``lowrank bench optimizers``.
    """
    Q = torch.linalg.qr(G.mT @ (G @ start))[0]
    for _ in range(steps - 1):
        Y = G @ Q
        if bool((Y.square().sum((-2, -1)) >= ENOUGH * torch.linalg.vector_norm(G, dim=(-2, -1)).square()).all()):
            break
        Q = torch.linalg.qr(G.mT @ Y)[0]
    return Q


@torch.no_grad()
def refine(known: Directions, V: Float[Tensor, "n r"], seen: Float[Tensor, "r r"], share: float) -> Directions:
    """``known`` after a mean of (ĜV)ᵀ(ĜV) was seen, which counts with weight ``share`` in (0, 1] inside span(V).

    V's columns must be orthogonal, each either a direction of Q or orthogonal to all of them, as the spectral law draws them.
    """
    Q, sigma, tail = known
    n, k = Q.shape
    length = V.norm(dim=0)
    F = V / length
    inside = (Q.mT @ F).square()  # (k, r): 1 where a column is a known direction, else 0
    old = inside.mT @ sigma + (1 - inside.sum(0)) * tail
    energy, U = torch.linalg.eigh((1 - share) * torch.diag(old) + share * seen / torch.outer(length, length))
    drawn = inside.sum(1) > 0.5
    candidates = torch.cat([Q[:, ~drawn], F @ U], dim=1)
    values = torch.cat([sigma[~drawn], energy.clamp_min(0)])
    unseen = n - candidates.shape[1]
    order = values.argsort(descending=True)
    kept, dropped = order[:k], order[k:]
    return Directions(candidates[:, kept], values[kept], _tail(values[dropped].sum() + unseen * tail, n - k))


def _tail(rest: Tensor, count: int) -> Tensor:
    return rest.clamp_min(0) / max(count, 1)
