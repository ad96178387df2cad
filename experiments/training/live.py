"""The law in use, measured while the model trains: predicted and realised error, captured energy, and how noisy the gradient is.

In one backward pass every N steps the layers show X and Δ (``Conversion.observe``). The sequences of the micro-batch are halved, which gives
two independent gradients G_a, G_b of one mean g, formed layer by layer and freed:  ‖g‖² ← ⟨G_a, G_b⟩,  tr S ← (‖G_a‖² + ‖G_b‖²)/2,
tr Σ_ξ = tr S − ‖g‖², all unbiased. Predicted is the exact error of the law at these moments (theory/levels.py); realised is that of the V in
use, ‖GVVᵀ‖² − 2⟨G_aV, G_bV⟩ + ⟨G_a, G_b⟩ averaged over both halves. Their means over draws agree while V is independent of the gradient, as
it is just after a draw; training in a subspace that is held changes the gradient inside it. All for gradients of half a micro-batch, but
``predicted_step``: that of the whole step, with its smaller noise.
The noise scale tr Σ_ξ/‖g‖² in tokens is that of arXiv 1812.06162: the batch at which noise and signal are equal.
"""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from estimators import Conversion, processes
from estimators.law import Law
from theory import levels

SUMMED = ("signal", "noise", "predicted", "realised", "captured", "predicted_step")


class Live:
    """Collects one row a layer, and their sum, in the next backward pass after ``arm``."""

    def __init__(self, handle: Conversion, sequences: int, accumulate: int) -> None:
        """``sequences``: of a micro-batch in this process, at least 2; ``accumulate``: micro-batches of a step, by which their losses were
        divided.

        Gradients are reported for the undivided mean loss. What several processes see of their own halves is averaged.
        """
        self.handle, self.sequences, self.accumulate = handle, sequences, accumulate
        self.seconds = 0.0  # spent measuring, over the whole run
        self._rows: list[dict[str, Any]] = []
        self._tokens = 0

    def arm(self) -> None:
        """Measure in the next backward pass."""
        self._rows = []
        self.handle.observe(self._look)

    def rows(self) -> list[dict[str, Any]]:
        """What the last measured pass showed: one row a layer, and one named ``all`` with the sums; empty if there was none."""
        rows, self._rows = self._rows, []
        if not rows:
            return []
        total: dict[str, Any] = {name: sum(row[name] for row in rows) for name in SUMMED}
        return [self._derive(row) for row in [*rows, {"layer": "all", **total}]]

    def _derive(self, row: dict[str, Any]) -> dict[str, Any]:
        second = row["signal"] + row["noise"]
        noise_scale = self._tokens * row["noise"] / row["signal"] if row["signal"] > 0 else None  # noise swamps the estimate of ‖g‖²
        return row | {
            "captured": row["captured"] / second if second > 0 else 0.0,
            "noise_scale_tokens": noise_scale,
            "tokens": self._tokens,
        }

    @torch.no_grad()
    def _look(self, name: str, X: Tensor, D: Tensor) -> None:
        start = _now(X)
        V, law = self.handle.layers[name].basis().float(), self.handle.law_of(name)
        half = self.sequences // 2 * (len(X) // self.sequences)  # whole sequences: tokens of one are not independent
        scale, self._tokens = self.accumulate * len(X) / half, half
        A, B = (scale * (D[rows].mT @ X[rows]).float() for rows in (slice(0, half), slice(half, 2 * half)))
        Q = known(law, V)
        AV, BV, AQ, BQ = A @ V, B @ V, A @ Q, B @ Q
        gram = V.mT @ V
        lifted = (((AV @ gram) * AV).sum() + ((BV @ gram) * BV).sum()) / 2
        frame = _frame(V)
        captured = ((A @ frame).square().sum() + (B @ frame).square().sum()) / 2
        second, signal = (A.square().sum() + B.square().sum()) / 2, (A * B).sum()
        realised = lifted - 2 * (AV * BV).sum() + signal
        on, signal_on = (AQ.square() + BQ.square()).sum(0) / 2, (AQ * BQ).sum(0)
        seen = torch.cat([torch.stack([second, signal, realised, captured]), on, signal_on]).double()
        packed = processes.mean(seen).cpu().numpy()
        k = Q.shape[1]
        second_, signal_, realised_, captured_ = packed[:4].tolist()
        on_, signal_on_ = packed[4 : 4 + k], packed[4 + k :]
        share = half / (self.accumulate * len(X) * processes.size())  # the noise of a step is this share of the noise of a half
        known_levels = levels_of(law)
        predicted = levels.ipa(known_levels, second_, signal_, on_, signal_on_)
        whole = levels.ipa(
            known_levels, signal_ + share * (second_ - signal_), signal_, signal_on_ + share * (on_ - signal_on_), signal_on_
        )
        row = {"signal": signal_, "noise": second_ - signal_, "predicted": predicted, "realised": realised_, "captured": captured_}
        row |= {"predicted_step": whole}
        self._rows.append({"layer": name, **row})
        self.seconds += _now(X) - start


def known(law: Law, V: Tensor) -> Tensor:
    """The directions Q (n, k) that the levels of this law refer to; none for laws that treat all alike."""
    basis = getattr(law, "basis", None)
    if basis is None:
        return torch.eye(law.n, law.rank, dtype=V.dtype, device=V.device) if law.stem == "truncated" else V[:, :0]
    return basis.to(V)


def levels_of(law: Law) -> levels.Levels:
    """What theory says of a law, from its own fields."""
    values = {f.name: getattr(law, f.name) for f in fields(law) if f.name not in ("n", "rank", "c", "basis")}
    parameters = {name: v.detach().double().cpu().numpy() if isinstance(v, Tensor) else v for name, v in values.items() if v is not None}
    return levels.levels(law.stem, law.n, law.rank, law.c, **parameters)


def _frame(V: Tensor) -> Tensor:
    """Orthonormal columns with the span of V, zero in the place of what is dependent (a coordinate drawn twice)."""
    lengths, U = torch.linalg.eigh(V.mT @ V)
    weight = torch.where(lengths > 1e-6 * lengths[-1], lengths, torch.inf).rsqrt()
    return V @ (U * weight)


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
