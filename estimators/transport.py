"""What an optimizer's state becomes when the subspace changes from V to V′: five named policies for any ``torch.optim`` optimizer.

The state belongs to coordinates of V: the first moment M (m×r) is a mean of ĜV, the second N (m×r) of (ĜV)². With R = V⁺V′ (r×r, V⁺ the
pseudo-inverse) the part of a gradient that V saw has coordinates ĜV·R in V′.

``reset``            all state is dropped; Adam starts anew with its bias correction.
``keep``             state stays as it is, in coordinates that now mean something else.
``reproject_first``  M ← MR; N stays (GaLore's rows keep their scale).
``reproject_both``   M ← MR, N ← (N − M²)(R∘R) + (MR)²: the variance of a rotated vector with uncorrelated entries (LDAdam, 2410.16103).
                     |M| counts as at most √N here: Adam's N lags behind M² in its first 1/(1−β₂) steps, and V′ = V must change nothing.
``row_scale``        M ← 0, N ← its row means: a non-zero v₀ (2412.02153) with the scale known and no direction preferred.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from estimators import processes

Policy = Literal["reset", "keep", "reproject_first", "reproject_both", "row_scale"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
FIRST = ("exp_avg", "momentum_buffer")
SECOND = ("exp_avg_sq", "max_exp_avg_sq")


def change_of_basis(V: Float[Tensor, "n r"], new: Float[Tensor, "n r"]) -> Float[Tensor, "r r"]:
    """R = V⁺V′, by least squares in V's precision; dependent columns of V (a coordinate drawn twice) are met by the least-norm solution."""
    return torch.linalg.pinv(V, rtol=1e-5) @ new


@torch.no_grad()
def carry(policy: Policy, state: dict[str, Any], V: Float[Tensor, "n r"], new: Float[Tensor, "n r"]) -> None:
    """Apply ``policy`` to the state of one parameter B (m×r), in place.

    ``state`` is ``optimizer.state[B]``; 8-bit states are read and written in float32. Raises ``ValueError`` for a state tensor whose
    meaning is unknown, which only ``reset`` and ``keep`` can treat.
    """
    if policy not in POLICIES:
        raise ValueError(f"carry(policy={policy!r}): unknown policy, known are {', '.join(POLICIES)}")
    if policy == "reset":
        state.clear()
    if policy in ("reset", "keep") or not state:
        return
    # of a sharded state the rows held here: no policy mixes rows
    matrices = {key: processes.local(value) for key, value in state.items() if isinstance(value, Tensor) and value.ndim == 2}
    unknown = [key for key in matrices if key not in (*FIRST, *SECOND)]
    if unknown:
        raise ValueError(f"carry(policy={policy!r}): do not know what the optimizer state {unknown[0]!r} means, use 'reset' or 'keep'")
    R = change_of_basis(V, new) if policy != "row_scale" else None
    first = next((_read(matrices[key]).clone() for key in FIRST if key in matrices), None)  # a copy: M is overwritten before N is
    for key, value in matrices.items():
        old = _read(value)
        if R is None:
            value.copy_(torch.zeros_like(old) if key in FIRST else old.mean(1, keepdim=True).expand_as(old).contiguous())
        elif key in FIRST:
            value.copy_(old @ R)
        elif policy == "reproject_both":
            M = torch.zeros_like(old) if first is None else first.sign() * torch.minimum(first.abs(), old.clamp_min(0).sqrt())
            value.copy_((old - M.square()).clamp_min(0) @ R.square() + (M @ R).square())


def _read(value: Tensor) -> Tensor:
    """A state tensor in float32 or better, 8-bit ones dequantised."""
    dequantize = getattr(value, "dequantize", None)
    if dequantize is not None and type(value) is not Tensor:
        return dequantize(torch.float32)
    return value.to(torch.promote_types(value.dtype, torch.float32))
