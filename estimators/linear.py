"""A linear layer whose weight moves only through a low-rank B: it keeps XV for the backward pass, and X only for an observer.

Y = XWᵀ + (XV)Bᵀ + b with W (m×n) frozen, V (n×r) drawn from a law, B (m×r) the trained parameter. With Δ = ∂L/∂Y (T×m):
∂L/∂B = Δᵀ(XV) = ĜV, the sketch of the full gradient Ĝ = ΔᵀX, from T×r stored numbers; ∂L/∂X = ΔW + (ΔB)Vᵀ is exact, so the
estimate's noise does not compound through depth. Unbiased because E[ĜVVᵀ] = c·g for V independent of the batch; variance: theory/mse.py.
While B = 0 the second product is skipped: 4Tmn + 2Tr(m+n) operations a step against 6Tmn of ``nn.Linear``.
Reference: arXiv 2603.20632; the same layer with V fixed is LoRA-FA (2308.03303), with Gaussian V it is CompAct (2410.15352).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from estimators.processes import DTensor

Observer = Callable[[Tensor, Tensor], None]  # receives X (T, n) and Δ (T, m) in the backward pass


class _Product(torch.autograd.Function):
    """XWᵀ + (XV)Bᵀ + b in ``dtype`` for X (T, n), saving XV.

    ``zero``: B is known to be zero; ``redraw``: gives V again in the backward pass, which then does not keep it; ``observer``: save X as
    well and show it with Δ.
    """

    @staticmethod
    def forward(
        ctx: Any,
        X: Tensor,
        W: Tensor,
        V: Tensor,
        B: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        zero: bool,
        redraw: Callable[[], Tensor] | None,
        observer: Observer | None,
    ) -> Tensor:
        X_ = X.to(dtype)
        XV = X_ @ V.to(dtype)
        Y = F.linear(X_, W.to(dtype), None if bias is None else bias.to(dtype))
        saved = {"XV": XV, "W": W}
        if not zero:
            Y = Y.addmm_(XV, B.to(dtype).mT)
            saved |= {"B": B} if redraw else {"B": B, "V": V}
        if observer:
            saved |= {"X": X_}
        ctx.names = tuple(saved)
        ctx.save_for_backward(*saved.values())
        ctx.dtype, ctx.input_dtype, ctx.B_dtype, ctx.bias_dtype = dtype, X.dtype, B.dtype, None if bias is None else bias.dtype
        ctx.zero, ctx.redraw, ctx.observer = zero, redraw, observer
        return Y

    @staticmethod
    @once_differentiable  # XV is saved without its history: a second derivative would miss terms
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = dict(zip(ctx.names, ctx.saved_tensors))
        D = gradients[0].to(ctx.dtype)
        dX = dB = dbias = None
        if ctx.needs_input_grad[0]:
            dX = D @ saved["W"].to(ctx.dtype)
            if not ctx.zero:
                V = ctx.redraw() if ctx.redraw else saved["V"]
                dX = dX.addmm_(D @ saved["B"].to(ctx.dtype), V.to(ctx.dtype).mT)
            dX = dX.to(ctx.input_dtype)
        if ctx.needs_input_grad[3]:
            dB = (D.mT @ saved["XV"]).to(ctx.B_dtype)
        if ctx.needs_input_grad[4]:
            dbias = D.sum(0).to(ctx.bias_dtype)
        if ctx.observer:
            ctx.observer(saved["X"], D)
        return dX, None, None, dB, dbias, None, None, None, None


class LowRankLinear(nn.Module):
    """``nn.Linear`` with a frozen weight and a trained B (m×r) in the subspace of V (n×r).

    ``weight``: W, (m, n), its gradient is never formed; ``bias``: (m,) or None, trained as before; ``B``: (m, r) ``Parameter``, zero at the
    start, in float32 where the weight is 16-bit; ``basis()``: V, stored in the buffer ``V``, or drawn anew from its key at each use when the
    layer was given no storage (``redraw``). Whoever changes W, V or B in place breaks nothing: the shortcut for B = 0 is taken
    only while B is untouched since it was zeroed. Fused optimizers and ``.data`` leave no trace of a write, so call ``moved`` after them.
    """

    V: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        """Take over the parameters of ``linear``. Raises ``ValueError`` unless 1 ≤ rank < min(m, n)."""
        super().__init__()
        m, n = linear.weight.shape
        if not 1 <= rank < min(m, n):
            raise ValueError(f"LowRankLinear(m={m}, n={n}, rank={rank}): rank must be at least 1 and below min(m, n)")
        self.out_features, self.in_features, self.rank = m, n, rank
        weight = linear.weight
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = linear.bias
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.B = nn.Parameter(torch.zeros(m, rank, dtype=wide, device=weight.device))
        self.register_buffer("V", None, persistent=False)
        self.redraw: Callable[[], Tensor] | None = None
        self.observer: Observer | None = None
        self.zero()

    def extra_repr(self) -> str:
        """As ``nn.Linear`` shows itself, with the rank."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, bias={self.bias is not None}"

    def basis(self) -> Float[Tensor, "n r"]:
        """V in use. Raises ``RuntimeError`` before the first ``hold``."""
        if self.V is not None:
            return self.V
        if self.redraw is None:
            raise RuntimeError("LowRankLinear has no V yet; give it one by hold(V), or use convert()")
        return self.redraw()

    def hold(self, V: Float[Tensor, "n r"] | None, redraw: Callable[[], Tensor] | None = None) -> None:
        """Use this V from now on; with None, what ``redraw`` returns at each use. B should be zero, else W + BVᵀ jumps."""
        self.V, self.redraw = V, redraw

    @property
    def at_zero(self) -> bool:
        """Whether B is known to be zero: nothing has written to it since it was zeroed. Compiled code trusts ``zero`` and ``moved``.

        In the forward pass of ``fully_shard`` the layer has a gathered copy in the place of B; the shard that was zeroed is asked then.
        """
        (zeroed,), version = self._zeroed
        same = zeroed is self.B or isinstance(zeroed, DTensor)
        return self._zero and (torch.compiler.is_compiling() or (same and version == zeroed._version))

    @torch.no_grad()
    def zero(self) -> None:
        """B ← 0."""
        self.B.zero_()
        self._zero, self._zeroed = True, ((self.B,), self.B._version)  # in a tuple: the module would list a parameter

    def moved(self) -> None:
        """Say that B may differ from zero, to compiled code and for writers that leave no trace (``.data``, fused optimizers)."""
        self._zero = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.moved()  # a copy, or a layer from a file: its B counts writes anew

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self.moved()  # B may be another tensor now, which counts its own writes

    def forward(self, X: Float[Tensor, "*tokens n"]) -> Float[Tensor, "*tokens m"]:
        """XWᵀ + (XV)Bᵀ + b. Under autocast the products are in its dtype, else in that of X."""
        kind = X.device.type
        casts = torch.is_autocast_enabled(kind) and X.dtype != torch.float64  # autocast leaves float64 alone
        dtype = torch.get_autocast_dtype(kind) if casts else X.dtype
        rows = X.reshape(-1, self.in_features)
        Y = _Product.apply(
            rows, self.weight, self.basis(), self.B, self.bias, dtype, self.at_zero, self.redraw if self.V is None else None, self.observer
        )
        assert isinstance(Y, Tensor)
        return Y.view(*X.shape[:-1], self.out_features)
