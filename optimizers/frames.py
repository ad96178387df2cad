"""Where the inner optimizer's coordinates live: what it sees of a gradient (sketch) and what its step means for the weight (lift).

A frame is plain tensors; its fields are its entries in ``optimizer.state``. All act on the last dimension of an oriented gradient
G (*batch, M, N): ``Dense`` by a matrix V (N×r), ``Columns`` by r indices, ``TwoSided`` on both dimensions, ``Entries`` on the flattened matrix;
``ScaledColumns`` by as many with a scale each, ``Cosines`` by columns of the DCT matrix, a ``Formed`` V, which is made
from less than itself; ``Everything`` is the identity, ``Whole`` the identity or nothing. For all of them
⟨lift(B), G⟩ = ⟨B, sketch(G)⟩, except ``Weighted``, whose weights are paid at the lift alone.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from estimators.subsampled_transform import dct_rows


@dataclass(frozen=True)
class Frame(abc.ABC):
    """Base: the fields go to and come from the optimizer's state under their own names."""

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self | None:
        """The frame held in ``state``, None before the first refresh."""
        names = cls.__match_args__
        return cls(*(state[name] for name in names)) if all(name in state for name in names) else None

    def tensors(self) -> dict[str, Any]:
        """What belongs in the state."""
        return {name: getattr(self, name) for name in self.__match_args__}

    @abc.abstractmethod
    def sketch(self, G: Tensor) -> Tensor:
        """The coordinates of G, (*batch, M, r) unless the class says otherwise."""

    @abc.abstractmethod
    def lift(self, B: Tensor, like: Tensor) -> Tensor:
        """The matrix, shaped as ``like`` (*batch, M, N), that the coordinates B stand for."""

    def passes(self, G: Tensor) -> Tensor:
        """What of G reaches the weight where nothing else happens to it, shaped as G: lift(sketch(G)) unless the class says otherwise."""
        return self.lift(self.sketch(G), G)

    def add(self, W: Tensor, B: Tensor, alpha: float) -> None:
        """W ← W + alpha·lift(B) in place, without forming the lift where that can be helped."""
        W.add_(self.lift(B, W), alpha=alpha)

    def change(self, new: Any) -> Tensor:  # noqa: ARG002
        """R (*batch, r, r) with sketch_new(lift_old(B)) = B R, ``new`` of the same class. Raises ``ValueError`` for frames without one."""
        raise ValueError(f"{type(self).__name__}: state cannot be re-projected in this frame, use KEEP or Reset")

    def coordinates(self, new: Any) -> Tensor:
        """R (*batch, r, r) that takes the coordinates of what lies in this frame to those in ``new``: what ``change`` is where frames are
        orthonormal; without the importance weights of a ``Weighted`` frame, which belong to estimates and not to numbers."""
        return self.change(new)

    def unseen(self, new: Any, N: Tensor) -> Tensor:
        """Second moments (*batch, M, r) of what lies outside this frame in each direction of ``new``, from those inside, N (*batch, M, r):
        the row's mean N, times the share 1 − Σⱼ cos² of the direction. For orthonormal frames."""
        cosines = self.coordinates(new)
        return N.mean(-1, keepdim=True) * (1 - cosines.square().sum(-2, keepdim=True)).clamp_min(0)


@dataclass(frozen=True)
class Dense(Frame):
    """sketch GV, lift BVᵀ. V: (*batch, N, r)."""

    V: Float[Tensor, "*batch N r"]

    def sketch(self, G: Tensor) -> Tensor:
        return G @ self.V

    def lift(self, B: Tensor, like: Tensor) -> Tensor:  # noqa: ARG002
        return B @ self.V.mT

    def add(self, W: Tensor, B: Tensor, alpha: float) -> None:
        if W.ndim == 2:
            W.addmm_(B, self.V.mT, alpha=alpha)
        else:
            W.baddbmm_(B, self.V.mT, alpha=alpha)

    def change(self, new: Dense) -> Tensor:
        return self.V.mT @ new.V


@dataclass(frozen=True)
class Weighted(Frame):
    """sketch GQ with orthonormal columns Q (*batch, N, r), lift B diag(weight) Qᵀ: importance weights 1/π that an inner rule does not see."""

    Q: Float[Tensor, "*batch N r"]
    weight: Float[Tensor, "*batch r"]

    @property
    def root(self) -> Tensor:
        """√weight, (*batch, 1, r)."""
        return self.weight.sqrt().unsqueeze(-2)

    def sketch(self, G: Tensor) -> Tensor:
        return G @ self.Q

    def lift(self, B: Tensor, like: Tensor) -> Tensor:
        return Dense(self.Q).lift(B * self.weight.unsqueeze(-2), like)

    def add(self, W: Tensor, B: Tensor, alpha: float) -> None:
        Dense(self.Q).add(W, B * self.weight.unsqueeze(-2), alpha)

    def change(self, new: Weighted) -> Tensor:
        return (self.Q * self.weight.unsqueeze(-2)).mT @ new.Q

    def coordinates(self, new: Weighted) -> Tensor:
        return self.Q.mT @ new.Q


@dataclass(frozen=True)
class Balanced(Weighted):
    """The same with half of the weight on either side, V = Q diag(√weight): sketch GV, lift BVᵀ."""

    def sketch(self, G: Tensor) -> Tensor:
        return G @ self.Q * self.root

    def lift(self, B: Tensor, like: Tensor) -> Tensor:
        return Dense(self.Q).lift(B * self.root, like)

    def add(self, W: Tensor, B: Tensor, alpha: float) -> None:
        Dense(self.Q).add(W, B * self.root, alpha)

    def change(self, new: Weighted) -> Tensor:
        return (self.Q * self.root).mT @ (new.Q * new.root)

    def coordinates(self, new: Weighted) -> Tensor:
        return (self.Q / self.root).mT @ (new.Q * new.root)

    def unseen(self, new: Weighted, N: Tensor) -> Tensor:
        plain = Weighted(self.Q, self.weight).unseen(Weighted(new.Q, new.weight), N / self.root.square())
        return plain * new.root.square()


@dataclass(frozen=True)
class TwoSided(Frame):
    """sketch UᵀGV (r×r), lift UBVᵀ. U: (*batch, M, r), V: (*batch, N, r)."""

    U: Float[Tensor, "*batch M r"]
    V: Float[Tensor, "*batch N r"]

    def sketch(self, G: Tensor) -> Tensor:
        return self.U.mT @ G @ self.V

    def lift(self, B: Tensor, like: Tensor) -> Tensor:  # noqa: ARG002
        return self.U @ B @ self.V.mT


@dataclass(frozen=True)
class Columns(Frame):
    """r columns of G by their indices J (*batch, r): V is a part of the identity, never formed."""

    J: Int[Tensor, "*batch r"]

    def _over(self, G: Tensor) -> Tensor:
        return self.J.unsqueeze(-2).expand(*G.shape[:-1], self.J.shape[-1])

    def sketch(self, G: Tensor) -> Tensor:
        return G.gather(-1, self._over(G))

    def lift(self, B: Tensor, like: Tensor) -> Tensor:
        return torch.zeros_like(like, dtype=B.dtype).scatter_(-1, self._over(like), B)

    def add(self, W: Tensor, B: Tensor, alpha: float) -> None:
        W.scatter_add_(-1, self._over(W), B * alpha)

    def change(self, new: Columns) -> Tensor:
        return (self.J.unsqueeze(-1) == new.J.unsqueeze(-2)).to(torch.get_default_dtype())


@dataclass(frozen=True)
class ScaledColumns(Frame):
    """r columns of G by their indices J (*batch, r), an index as often as it was drawn, times ``scale`` (*batch, r) at sketch and lift."""

    J: Int[Tensor, "*batch r"]
    scale: Float[Tensor, "*batch r"]

    def sketch(self, G: Tensor) -> Tensor:
        return Columns(self.J).sketch(G) * self.scale.unsqueeze(-2)

    def lift(self, B: Tensor, like: Tensor) -> Tensor:
        lifted = torch.zeros_like(like, dtype=B.dtype)
        self.add(lifted, B, 1.0)
        return lifted

    def add(self, W: Tensor, B: Tensor, alpha: float) -> None:
        Columns(self.J).add(W, B * self.scale.unsqueeze(-2), alpha)


@dataclass(frozen=True)
class Formed(Frame):
    """Base of frames whose matrix V is not state but made from less; once for all that a step asks of it."""

    @abc.abstractmethod
    def matrix(self, N: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "*batch N r"]:
        """V."""

    @cached_property
    def _made(self) -> dict[Any, Dense]:
        return {}

    def dense(self, like: Tensor) -> Dense:
        """The same frame with V at hand, for matrices (*batch, M, N) as ``like`` and in its precision."""
        kind = like.shape[-1], like.dtype, like.device
        if kind not in self._made:
            self._made[kind] = Dense(self.matrix(*kind))
        return self._made[kind]

    def sketch(self, G: Tensor) -> Tensor:
        return self.dense(G).sketch(G)

    def lift(self, B: Tensor, like: Tensor) -> Tensor:
        return self.dense(like).lift(B, like)

    def add(self, W: Tensor, B: Tensor, alpha: float) -> None:
        self.dense(W).add(W, B, alpha)


@dataclass(frozen=True)
class Cosines(Formed):
    """r columns of the orthonormal DCT matrix C of order N by their indices J (*batch, r): only they are state.

    ``product``: G and GC of the gradient that J was chosen for, where they are at hand: its sketch is a part of them.
    """

    J: Int[Tensor, "*batch r"]
    product: tuple[Tensor, Tensor] | None = field(default=None, kw_only=True)

    def matrix(self, N: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return dct_matrix(N, dtype, device).mT[self.J].mT

    def sketch(self, G: Tensor) -> Tensor:
        if self.product is not None and self.product[0] is G:
            return Columns(self.J).sketch(self.product[1])
        return super().sketch(G)

    def change(self, new: Cosines) -> Tensor:
        return Columns(self.J).change(Columns(new.J))


@cache
def dct_matrix(n: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "n n"]:
    """C with C_ka = √(2/n)·cos(π(2a+1)k/(2n)), its row k = 0 divided by √2: orthogonal, one for all parameters of order n."""
    return dct_rows(n, torch.arange(n, device=device), dtype)


@dataclass(frozen=True)
class Entries(Frame):
    """k entries of G by their indices I (*batch, k) in the flattened matrix; sketch (*batch, 1, k)."""

    I: Int[Tensor, "*batch k"]

    def sketch(self, G: Tensor) -> Tensor:
        return G.flatten(-2).gather(-1, self.I).unsqueeze(-2)

    def lift(self, B: Tensor, like: Tensor) -> Tensor:
        flat = torch.zeros_like(like, dtype=B.dtype, memory_format=torch.contiguous_format).flatten(-2)
        return flat.scatter_(-1, self.I, B.squeeze(-2)).view(like.shape)


@dataclass(frozen=True)
class Everything(Frame):
    """The whole gradient as it is."""

    def sketch(self, G: Tensor) -> Tensor:
        return G

    def lift(self, B: Tensor, like: Tensor) -> Tensor:  # noqa: ARG002
        return B


@dataclass(frozen=True)
class Whole(Frame):
    """The whole gradient in the periods in which ``active`` is 1, nothing of it in those in which it is 0; sketch (*batch, M, N or 0)."""

    active: int

    def sketch(self, G: Tensor) -> Tensor:
        return G if self.active else G[..., :0]

    def lift(self, B: Tensor, like: Tensor) -> Tensor:
        return B if self.active else torch.zeros_like(like, dtype=B.dtype)
