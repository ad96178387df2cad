"""What an optimizer's state becomes when the subspace changes from V to V′: named policies for any ``torch.optim`` optimizer.

The state belongs to coordinates of V: the first moment M (m×r) is a mean of ĜV, the second N (m×r) of (ĜV)². With R = V⁺V′ (r×r, V⁺ the
pseudo-inverse) the part of a gradient that V saw has coordinates ĜV·R in V′.

``reset``            all state is dropped; Adam starts anew with its bias correction.
``keep``             state stays as it is, in coordinates that now mean something else.
``reproject_first``  M ← MR; N stays (GaLore's rows keep their scale).
``reproject_both``   M ← MR, N ← (N − M²)(R∘R) + (MR)²: the variance of a rotated vector with uncorrelated entries (LDAdam, 2410.16103).
                     |M| counts as at most √N here: Adam's N lags behind M² in its first 1/(1−β₂) steps, and V′ = V must change nothing.
``row_scale``        M ← 0, N ← its row means: a non-zero v₀ (2412.02153) with the scale known and no direction preferred.

A policy of its own for N alone (``Second``), beside what the policy above does to M:

``zero``             N ← 0. With ``reset`` that is ``reset``.
``keep``             N stays.
``reproject``        N as under ``reproject_both``.
``row_scale``        N ← its row means.
``random``           N ← its row means times z², z standard normal: the random v₀ of 2412.02153 with the scale of the rows in the place of a constant.
``first_batch``      N ← B², B = ĜV′ the first sketch after the change, as the optimizer gets it: the v₀ from data of 2412.02153, of one batch.

With ``reset`` and an N that is not zero M ← 0 and the step count goes on: N is then no mean of few numbers that the bias correction could correct.
Beside a first moment that goes on, ``zero`` and ``first_batch`` are for comparison only: M/√N is then about M/|B| in the next step, and B, one
sketch, may be as small as it likes. With M = 0 the step is bounded.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from estimators import keyed, processes

Policy = Literal["reset", "keep", "reproject_first", "reproject_both", "row_scale"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
Second = Literal["zero", "keep", "reproject", "row_scale", "random", "first_batch"]
SECONDS: tuple[Second, ...] = get_args(Second)
FIRST = ("exp_avg", "momentum_buffer")
SECOND = ("exp_avg_sq", "max_exp_avg_sq")


def change_of_basis(V: Float[Tensor, "n r"], new: Float[Tensor, "n r"]) -> Float[Tensor, "r r"]:
    """R = V⁺V′, by least squares in V's precision; dependent columns of V (a coordinate drawn twice) are met by the least-norm solution."""
    return torch.linalg.pinv(V, rtol=1e-5) @ new


@torch.no_grad()
def carry(
    policy: Policy,
    state: dict[str, Any],
    V: Float[Tensor, "n r"],
    new: Float[Tensor, "n r"],
    second: Second | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Apply ``policy`` to the state of one parameter B (m×r), in place; ``second``: what becomes of N, where that is not the policy's own.

    ``state`` is ``optimizer.state[B]``; 8-bit states are read and written in float32. A state without second moments has none to be treated.
    ``generator``: of the ``random`` N, on the device of B. Under ``first_batch`` N is zero until ``fill`` is called with the first gradient.
    Raises ``ValueError`` for a state tensor whose meaning is unknown, which only ``reset`` and ``keep`` can treat.
    """
    if policy not in POLICIES:
        raise ValueError(f"carry(policy={policy!r}): unknown policy, known are {', '.join(POLICIES)}")
    if second is not None and second not in SECONDS:
        raise ValueError(f"carry(second={second!r}): unknown policy, known are {', '.join(SECONDS)}")
    # of a sharded state the rows held here: no policy mixes rows
    matrices = {key: processes.local(value) for key, value in state.items() if isinstance(value, Tensor) and value.ndim == 2}
    if not matrices.keys() & set(SECOND):
        second = None
    if policy == "reset" and second in (None, "zero"):
        state.clear()
    if (policy in ("reset", "keep") and second is None) or not state:
        return
    unknown = [key for key in matrices if key not in (*FIRST, *SECOND)]
    if unknown:
        raise ValueError(f"carry(policy={policy!r}): do not know what the optimizer state {unknown[0]!r} means, use 'reset' or 'keep'")
    own: dict[Policy, Second] = {"reproject_both": "reproject", "row_scale": "row_scale"}
    second = second or own.get(policy, "keep")
    R = change_of_basis(V, new) if policy.startswith("reproject") or second == "reproject" else torch.empty(0)
    z = _normal(state, generator) if second == "random" else None
    first = next((_read(matrices[key]).clone() for key in FIRST if key in matrices), None)  # a copy: M is overwritten before N is
    for key, value in matrices.items():
        old = _read(value)
        if key in FIRST and policy != "keep":
            value.copy_(old @ R if policy.startswith("reproject") else torch.zeros_like(old))
        elif key in SECOND and second == "reproject":
            M = torch.zeros_like(old) if first is None else first.sign() * torch.minimum(first.abs(), old.clamp_min(0).sqrt())
            value.copy_((old - M.square()).clamp_min(0) @ R.square() + (M @ R).square())
        elif key in SECOND:
            value.copy_(renewed(second, old, z))


def renewed(
    second: Second, N: Float[Tensor, "*batch m r"], normal: Float[Tensor, "*batch m r"] | None = None
) -> Float[Tensor, "*batch m r"]:
    """What becomes of N under a policy that looks at nothing else; ``normal``: z of ``random``. Zero under ``first_batch``, until there is one."""
    rows = N.mean(-1, keepdim=True)
    match second:
        case "keep":
            return N
        case "row_scale":
            return rows.expand_as(N).contiguous()
        case "random":
            assert normal is not None
            return rows * normal.square().to(N.dtype)
        case "zero" | "first_batch":
            return torch.zeros_like(N)
    raise ValueError(f"renewed(second={second!r}): needs more than the second moment")


@torch.no_grad()
def fill(state: dict[str, Any], gradient: Float[Tensor, "m r"]) -> None:
    """N ← B² for the first gradient B (m×r) after a change, before the optimizer's step with it: N is then B² also after that step."""
    for key in SECOND:
        if key in state:
            value = processes.local(state[key])
            value.copy_(processes.local(gradient).to(_read(value).dtype).square())


def _normal(state: dict[str, Any], generator: torch.Generator | None) -> Tensor:
    """Of the shape of N, of a sharded one the rows held here: the same numbers whatever the number of processes."""
    N = next(state[key] for key in SECOND if key in state)
    device = None if generator is None else generator.device
    return processes.local(processes.like(torch.randn(tuple(N.shape), generator=generator, device=device), N))


def _read(value: Tensor) -> Tensor:
    """A state tensor in float32 or better, 8-bit ones dequantised."""
    dequantize = getattr(value, "dequantize", None)
    if dequantize is not None and type(value) is not Tensor:
        return dequantize(torch.float32)
    return value.to(torch.promote_types(value.dtype, torch.float32))


class Transport:
    """The policies of one ``Conversion`` at work. ``waiting``: the parameters whose N awaits their first gradient, by the names of their layers.

    Raises ``ValueError`` that begins with ``call`` for an unknown policy.
    """

    def __init__(self, call: str, policy: Policy, second: Second | None, seed: int) -> None:
        if policy not in POLICIES:
            raise ValueError(f"{call}: unknown state policy {policy!r}, known are {', '.join(POLICIES)}")
        if second not in (None, *SECONDS):
            raise ValueError(f"{call}: unknown second_moment {second!r}, known are {', '.join(SECONDS)}")
        self.policy: Policy = policy
        self.second: Second | None = second
        self.seed, self.attached, self.waiting = seed, False, dict[str, nn.Parameter]()

    @property
    def needs_optimizer(self) -> bool:
        """Whether anything happens to the state."""
        return self.policy != "keep" or self.second not in (None, "keep")

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """From now on ``fill`` what awaits a gradient before each step of this optimizer."""
        optimizer.register_step_pre_hook(self._fill)
        self.attached = True

    def carry(self, name: str, index: int, optimizer: torch.optim.Optimizer, B: nn.Parameter, V: Tensor, new: Tensor) -> None:
        """For the layer ``name`` at its draw ``index``. Raises ``ValueError`` for ``first_batch`` without ``attach``."""
        if B not in optimizer.state:
            return
        if self.second == "first_batch":
            if not self.attached:
                raise ValueError("convert(second_moment='first_batch'): call attach(optimizer) once, before the first step")
            self.waiting[name] = B
        generator = keyed.generator(self.seed, f"{name}.second_moment", index, B.device) if self.second == "random" else None
        carry(self.policy, optimizer.state[B], V, new, self.second, generator)

    def _fill(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for name, B in list(self.waiting.items()):
            if B.grad is not None:
                fill(optimizer.state[B], B.grad)
                del self.waiting[name]
