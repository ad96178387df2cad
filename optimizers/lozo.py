"""LOZO: zeroth order along UVᵀ with Gaussian factors, V held for ν steps (arXiv 2410.07698).

    every ν steps: V (n×r) standard normal;   U (m×r) standard normal at every step
    δ from F at W ± εUVᵀ;   W ← W − η·δUVᵀ/r;   with momentum N ← βN + (1−β)δU, at a new V first N ← N·VᵀV′/n, and W ← W − η·NVᵀ/r

LowRank-LR with the Gaussian law at c = 1, whose V is this one over √r, and ε√r in the place of ε: unbiased up to the ε² of the difference.
State: none; with momentum mr elements. Vectors get whole directions.

``variant="reference-code"``: without the factor 1/r; and in the first step of a period the update's U is not the one that was probed: both come
from one stream, the probe takes V from it first and the update does not, so that this one of ν updates is noise. Biased therefore:
E = r·(1 − 1/ν)·g for m ≤ n. The published code has no licence and was not read; that is what its description says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from estimators.gaussian import Gaussian
from optimizers.zeroth import Directions, Frame, Key, ZerothOrder


@dataclass(frozen=True, kw_only=True)
class OneStream(Directions):
    """V, in the first step of a period, and then U from one stream of a step; the update begins the stream anew and takes U at once."""

    def _stream(self, key: Key, p: Tensor) -> torch.Generator:
        return key.generator("stream", key.step, p.device)

    def frame(self, key: Key, p: Tensor) -> Frame:
        first = Key(key.seed, key.name, key.step // self.every * self.every)
        return None, self._normal(self._stream(first, p), p, p.shape[1])

    def coordinates(self, key: Key, p: Tensor, frame: Frame) -> Tensor:  # noqa: ARG002
        stream = self._stream(key, p)
        if key.step % self.every == 0:
            self._normal(stream, p, p.shape[1])
        return self._nth(stream, key, p)

    def updating(self, key: Key, p: Tensor, frame: Frame) -> Tensor:  # noqa: ARG002
        return self._nth(self._stream(key, p), key, p)

    def _nth(self, stream: torch.Generator, key: Key, p: Tensor) -> Tensor:
        for _ in range(key.query):
            self._normal(stream, p, p.shape[0])
        return self._normal(stream, p, p.shape[0])

    def _normal(self, stream: torch.Generator, p: Tensor, size: int) -> Tensor:
        exact = torch.promote_types(p.dtype, torch.float32)
        return torch.randn(size, self.rank_for(p.shape), generator=stream, device=p.device, dtype=exact)


def standard(n: int, rank: int) -> Gaussian:
    """V of standard normal numbers: the Gaussian law at c = r."""
    return Gaussian(n=n, rank=rank, c=float(rank))


class LOZO(ZerothOrder):
    """See the module docstring. ``rank``: r; ``every``: ν in steps."""

    def __init__(
        self, model: nn.Module, lr: float = 1e-6, *, rank: int | float = 4, every: int = 50, variant: str = "paper", **options: Any
    ) -> None:
        if variant not in ("paper", "reference-code"):
            raise ValueError(f"LOZO(variant={variant!r}): unknown, known are paper, reference-code")
        if every < 1:
            raise ValueError(f"LOZO(every={every}): must be at least 1")
        super().__init__(model, lr, {"rank": rank, "every": every, "variant": variant}, **options)

    def directions(self, group: dict[str, Any]) -> Directions:
        code = group["variant"] == "reference-code"
        return (OneStream if code else Directions)(right=standard, rank=group["rank"], every=group["every"], over_rank=not code)
