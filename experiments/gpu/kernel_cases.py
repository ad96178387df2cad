"""What ``experiments.gpu.kernels`` times: each kernel on the shapes it is for, the plain version, and what training does today.

T = 8192 tokens, r = n/8; the matrices of LLaMA-1B for the lift; 168 = 24 layers × 7 matrices for the factors. ``SMALL``: the same on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from estimators import Gaussian, Law, Rademacher, SparseSign, haar_stiefel, keyed
from estimators.kernels import cholesky, hadamard, rounding_lift, sketch
from estimators.kernels.launch import Cost
from estimators.rounding import stochastic_round

KEY = keyed.number(0, "kernels", 0)
LAWS: dict[str, type[Law]] = {"gaussian": Gaussian, "rademacher": Rademacher, "sparse_sign": SparseSign}
Call = Callable[[], Any]


@dataclass(frozen=True)
class Contenders:
    """Calls that give the same result, and what none can avoid. ``today``: what the package does now where that is something else."""

    kernel: Call
    plain: Call
    cost: Cost
    tolerance: float
    today: Call | None = None
    written: Tensor | None = None  # what the calls change in place
    checked: Contenders | None = None  # what agreement is checked on, where the timed operands would not show a difference

    def difference(self) -> float:
        """The largest difference of kernel and plain over the largest entry, of all results; both begin with the same ``written``."""
        if self.checked is not None:
            return self.checked.difference()
        found = []
        before = None if self.written is None else self.written.clone()
        for call in (self.kernel, self.plain):
            result = call()
            found.append([part.double() for part in (result if isinstance(result, tuple) else (result,))])  # a copy
            if self.written is not None and before is not None:
                self.written.copy_(before)
        over = [(a - b).abs().max() / b.abs().max().clamp_min(1e-30) for a, b in zip(*found, strict=True)]
        return float(torch.stack(over).max())  # NaN where any is


@dataclass(frozen=True)
class Case:
    """One row. ``shape``: its numbers by name; ``make``: the contenders on a device."""

    kernel: str
    dtype: str
    shape: dict[str, int]
    make: Callable[[Case, torch.device], Contenders]

    @property
    def name(self) -> str:
        """In words, one for each case."""
        return " ".join([self.kernel, *(f"{name}={size}" for name, size in self.shape.items()), self.dtype])

    def normal(self, device: torch.device, *shape: int) -> Tensor:
        """Standard normals in the dtype of the case, the same in every call."""
        generator = keyed.generator(0, self.name, len(shape), device)
        return torch.randn(*shape, generator=generator, device=device).to(getattr(torch, self.dtype))


def _tolerance(case: Case) -> float:
    return 1e-3 if case.dtype == "float32" else 2e-2  # of the largest entry


def sketches(case: Case, device: torch.device) -> Contenders:
    """XV; today's V is stored, its draw is not counted."""
    T, n, r = (case.shape[name] for name in ("T", "n", "r"))
    law, X = LAWS[case.kernel.split()[1]](n=n, rank=r), case.normal(device, T, n)
    V = sketch.basis(law, KEY, device).to(X.dtype)
    needs = sketch.cost(T, n, law, X.element_size())
    kernel, plain = functools.partial(sketch.sketch, X, law, KEY), functools.partial(sketch.plain, X, law, KEY)
    return Contenders(kernel, plain, needs, _tolerance(case), lambda: X @ V)


def transforms(case: Case, device: torch.device) -> Contenders:
    """XH/√n."""
    T, n = case.shape["T"], case.shape["n"]
    X = case.normal(device, T, n)
    needs = hadamard.cost(T, n, X.element_size())
    return Contenders(functools.partial(hadamard.transform, X), functools.partial(hadamard.plain, X), needs, _tolerance(case))


def lifts(case: Case, device: torch.device) -> Contenders:
    """W += BVᵀ in bfloat16; today's rounding draws from a generator. Timed is a B so small that W stays as it is over all repeats.

    Agreement is checked on integers, multiples of 8 in W: every sum is exact and most have bits below bfloat16, so that with one key both
    results are the same to the bit.
    """
    m, n, r = (case.shape[name] for name in ("m", "n", "r"))
    W, B, V = case.normal(device, m, n).bfloat16(), 1e-6 * case.normal(device, m, r), case.normal(device, n, r)
    generator = keyed.generator(0, case.name, 0, device)

    def today() -> Tensor:
        return W.copy_(stochastic_round(W.float().addmm_(B.float(), V.float().mT), W.dtype, generator))

    def integers(largest: int, *shape: int) -> Tensor:
        return torch.randint(-largest, largest + 1, shape, generator=generator, device=device).to(B.dtype)

    def contenders(W: Tensor, B: Tensor, V: Tensor, today: Call | None = None, checked: Contenders | None = None) -> Contenders:
        kernel, plain = functools.partial(rounding_lift.lift, W, B, V, KEY), functools.partial(rounding_lift.plain, W, B, V, KEY)
        return Contenders(kernel, plain, rounding_lift.cost(m, n, r, B.element_size()), 0.0, today, W, checked)

    exact = contenders(8 * integers(128, m, n).bfloat16(), integers(2, m, r), integers(2, n, r))
    return contenders(W, B, V, today, exact)


def factors(case: Case, device: torch.device) -> Contenders:
    """L and L⁻¹ of Gram matrices."""
    batch, r = case.shape["batch"], case.shape["r"]
    Z = case.normal(device, batch, 4 * r, r)
    A = Z.mT @ Z
    return Contenders(
        functools.partial(cholesky.factor, A), functools.partial(cholesky.plain, A), cholesky.cost(batch, r), _tolerance(case)
    )


def orthonormal(case: Case, device: torch.device) -> Contenders:
    """Q and R in two passes; today's gives Q alone, of tall Z in one.

    What none can avoid is one pass: Z read, Q and the triangle R written, half of a symmetric Gram matrix and half of a triangular
    solve, one factor; the floor of experiments/benching/sampling.py.
    """
    batch, n, r = (case.shape[name] for name in ("batch", "n", "r"))
    Z = case.normal(device, batch, n, r)
    needs = Cost(2 * Z.nbytes + batch * r * (r + 1) // 2 * 4, 2 * batch * n * r * r, cholesky.cost(batch, r).others)
    kernel, plain = functools.partial(cholesky.cholesky_qr, Z), functools.partial(cholesky.plain_qr, Z)
    return Contenders(kernel, plain, needs, _tolerance(case), lambda: haar_stiefel.orthonormalize(Z))


def plan(T: int, sizes: tuple[int, ...], matrices: tuple[tuple[int, int], ...], ranks: tuple[int, ...], batch: int) -> tuple[Case, ...]:
    """Every case, the kernels in turn: if time runs out, each of them has rows. The middle size also in float32."""
    middle, both = sizes[len(sizes) // 2], ("bfloat16", "float32")
    groups = [
        [
            Case(f"sketch {law}", dtype, {"T": T, "n": n, "r": n // 8}, sketches)
            for n in sorted(sizes, key=lambda n: n != middle)
            for law in LAWS
            for dtype in (both if n == middle else both[:1])
        ],
        [Case("hadamard", dtype, {"T": T, "n": n}, transforms) for n in sizes for dtype in (both if n == middle else both[:1])],
        [Case("lift", dtype, {"m": m, "n": n, "r": min(m, n) // 8}, lifts) for m, n in matrices for dtype in both],
        [Case("cholesky", "float32", {"batch": batch, "r": r}, factors) for r in ranks]
        + [Case("cholesky_qr", "float32", {"batch": batch, "n": middle, "r": ranks[0]}, orthonormal)],
    ]
    longest = max(map(len, groups))
    return tuple(group[place] for place in range(longest) for group in groups if place < len(group))


CASES = plan(8192, (1024, 2048, 4096), ((2048, 2048), (5461, 2048), (2048, 5461)), (64, 32), 168)
SMALL = plan(40, (16, 32), ((16, 24),), (4,), 2)
