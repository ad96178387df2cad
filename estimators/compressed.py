"""Linear layers whose weight is trained as ever, by a gradient estimated from a compressed activation: less of X is kept, nothing else changes.

Y = XWᵀ + b with W (m×n) an ordinary parameter. With Δ = ∂L/∂Y (T×m) the layer's ``Keeper`` keeps a compression of X (T×n) in the forward pass
and gives an estimate of ΔᵀX (m×n) from it in the backward pass. ∂L/∂X = ΔW is exact, so Δ of every layer is the one of plain backpropagation:
an estimate is unbiased if E[estimate | X, Δ] = ΔᵀX, and the errors of different layers do not compound.
Variance: theory/mse.py, ``tokens`` for laws on the tokens and ``ipa`` for laws on the features; theory/wta_crs.py.
Reference: RAD, arXiv 2007.10412; WTA-CRS, 2305.15265; VeLoRA, 2405.17991.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from estimators import keyed, processes, selection


@dataclass(frozen=True)
class Key:
    """What a draw is a function of: the call ``call`` of the layer ``name`` within the step ``index``, of the process of that number."""

    seed: int
    name: str
    index: int
    call: int
    device: torch.device
    process: int = 0

    def generator(self, stem: str, *, alike: bool = False) -> torch.Generator:
        """A fresh generator of this key for the draw called ``stem``; the same in every process if ``alike``."""
        name = f"{self.name}/{stem}/{self.call}" + ("" if alike else f"/{self.process}")
        return keyed.generator(self.seed, name, self.index, self.device)


class Keeper(abc.ABC):
    """The rule by which one layer keeps X, and its state. ``unbiased``: E[gradient | X, Δ] = ΔᵀX."""

    unbiased: bool = True

    @abc.abstractmethod
    def keep(self, X: Float[Tensor, "t n"], key: Key) -> tuple[Tensor, ...]:
        """What is saved of X for the backward pass; T ≥ 1."""

    @abc.abstractmethod
    def gradient(self, kept: tuple[Tensor, ...], D: Float[Tensor, "t m"], key: Key) -> Float[Tensor, "m n"]:
        """The estimate of ΔᵀX from what ``keep`` returned under the same key."""

    def visit(self, ids: Int[Tensor, " b"]) -> None:  # noqa: B027
        """The samples whose tokens the next forward pass has, in the order of its rows; for rules that remember samples."""

    def step(self) -> None:  # noqa: B027
        """An optimizer step is over: take over what its backward passes showed."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and ints from which ``load_state_dict`` goes on; empty for a rule without state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Go on from ``state_dict``."""


class _Product(torch.autograd.Function):
    """XWᵀ + b in ``dtype`` for X (T, n), saving what the keeper of ``layer`` keeps, with its key.

    The key is saved among the tensors: recomputation (``torch.utils.checkpoint``) calls forward again and puts what that call saves in the place of
    what the first one saved, while attributes of ``ctx`` stay those of the first; and a call that cannot be told from another has a key of its own.
    """

    @staticmethod
    def forward(ctx: Any, X: Tensor, W: Tensor, bias: Tensor | None, dtype: torch.dtype, layer: CompressedLinear, key: Key) -> Tensor:
        with torch.autocast(X.device.type, enabled=False):  # it would round the draws
            X_ = X.to(dtype)
            Y = F.linear(X_, W.to(dtype), None if bias is None else bias.to(dtype))
            kept = layer.keeper.keep(X_, key) if ctx.needs_input_grad[1] and len(X) else ()
        counters = (torch.tensor([key.index, key.call]),) if kept else ()
        layer.saved_bytes = storage_bytes((*counters, *kept))
        ctx.save_for_backward(*([W] if ctx.needs_input_grad[0] else []), *counters, *kept)
        ctx.dtype, ctx.layer, ctx.key = dtype, layer, key
        ctx.input_dtype, ctx.shape, ctx.W_dtype, ctx.bias_dtype = X.dtype, W.shape, W.dtype, None if bias is None else bias.dtype
        return Y

    @staticmethod
    @once_differentiable  # what is kept is saved without its history: a second derivative would miss terms
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        D = gradients[0].to(ctx.dtype)
        saved = list(ctx.saved_tensors)
        keeper: Keeper = ctx.layer.keeper
        ctx.layer.passed = True
        dX = dW = dbias = None
        with torch.autocast(D.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dX = (D @ saved.pop(0).to(ctx.dtype)).to(ctx.input_dtype)
            if ctx.needs_input_grad[1]:
                dW = D.new_zeros(ctx.shape)
                if saved:
                    index, call = (int(number) for number in saved.pop(0))
                    key = Key(ctx.key.seed, ctx.key.name, index, call, D.device, ctx.key.process)
                    dW = keeper.gradient(tuple(saved), D, key)
                    # an error that is not finite shows even if its token was not kept
                    dW += 0 * D.sum(dtype=torch.promote_types(D.dtype, torch.float32)).to(dW.dtype)
                dW = dW.to(ctx.W_dtype)
            if ctx.needs_input_grad[2]:
                dbias = D.sum(0).to(ctx.bias_dtype)
        return dX, dW, dbias, None, None, None


def storage_bytes(tensors: tuple[Tensor, ...]) -> int:
    """Bytes that these tensors keep alive: whole storages, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


class CompressedLinear(nn.Module):
    """``nn.Linear`` that keeps of its input what ``keeper`` says. ``weight`` (m, n) and ``bias`` (m,) or None are those of ``linear`` themselves.

    ``seed``, ``name``, ``index`` (the step) and ``calls`` (calls within it) are the key of the next draw; each call has its own.
    ``saved_bytes``: bytes that the last call kept for the gradient of the weight; none if the weight is frozen, or without gradients. A
    compiled model runs this layer eagerly.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, keeper: Keeper, *, seed: int = 0, name: str = "") -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias = cast(nn.Parameter, linear.weight), linear.bias
        self.keeper, self.seed, self.name = keeper, seed, name
        self.index = self.calls = self.saved_bytes = 0
        self.forwards: list[int] = []  # calls since the last backward pass
        self.passed = False  # whether a backward pass has come by since

    def extra_repr(self) -> str:
        """As ``nn.Linear`` shows itself, with the rule."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, keeper={self.keeper}"

    @torch.compiler.disable
    def forward(self, X: Float[Tensor, "*tokens n"]) -> Float[Tensor, "*tokens m"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """XWᵀ + b. Under autocast the product is in its dtype, else in that of X."""
        kind = X.device.type
        casts = torch.is_autocast_enabled(kind) and X.dtype != torch.float64  # autocast leaves float64 alone
        dtype = torch.get_autocast_dtype(kind) if casts else X.dtype
        if not torch.is_grad_enabled():
            return F.linear(X.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        key = Key(self.seed, self.name, self.index, self._call(), X.device, processes.rank())
        Y = _Product.apply(X.reshape(-1, self.in_features), self.weight, self.bias, dtype, self, key)
        assert isinstance(Y, Tensor)
        return Y.view(*X.shape[:-1], self.out_features)

    def _call(self) -> int:
        """The number of this call. A call inside a backward pass repeats one of the forward pass (``torch.utils.checkpoint``) and has its number, so
        that a recomputed training is the plain one; where there were several in it, which of them is not known, and it has one of its own."""
        backward = torch._C._current_graph_task_id() != -1
        if backward and len(self.forwards) == 1:
            return self.forwards[0]
        if not backward:
            self.forwards, self.passed = [*([] if self.passed else self.forwards), self.calls], False
        self.calls += 1
        return self.calls - 1

    def begin(self, index: int, calls: int = 0) -> None:
        """The next call is number ``calls`` of step ``index``."""
        self.index, self.calls, self.forwards, self.passed = index, calls, [], False


class Compression:
    """Have the targeted ``nn.Linear`` modules of ``model`` keep compressed activations, in place; the handle that drives them.

        handle = compress(model, keeper=lambda linear: LawOnTokens("coordinate", 0.1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for batch in batches:
            loss(model, batch).backward(); optimizer.step(); handle.step(); optimizer.zero_grad()
        handle.finalize()

    ``keeper``: the rule for a layer, a new object at each call; ``targets``: as in ``convert``; ``seed``: of all draws. ``layers``: name →
    ``CompressedLinear``; ``left_alone``: parameter or module name → why it was not replaced. Raises ``ValueError`` when nothing is left to replace.
    """

    def __init__(
        self, model: nn.Module, *, keeper: Callable[[nn.Linear], Keeper], targets: selection.Targets = None, seed: int = 0
    ) -> None:
        chosen, self.left_alone = selection.choose(model, targets, None)
        if not chosen:
            reasons = "; ".join(sorted(set(self.left_alone.values()))) or "no parameters"
            raise ValueError(f"compress(): no layer of {type(model).__name__} can be replaced ({reasons})")
        self.model, self.seed, self.steps = model, seed, 0
        self.layers = {name: CompressedLinear(linear, keeper(linear), seed=seed, name=name) for name, linear in chosen.items()}
        for name, layer in self.layers.items():
            selection.replace(model, name, layer)

    @property
    def touched_share(self) -> float:
        """Weights whose gradient is an estimate, as a share of all weights of the model."""
        return sum(layer.weight.numel() for layer in self.layers.values()) / sum(p.numel() for p in self.model.parameters())

    @property
    def unbiased(self) -> bool:
        """Whether the estimate of every layer is."""
        return all(layer.keeper.unbiased for layer in self.layers.values())

    def visit(self, ids: Int[Tensor, " b"]) -> None:
        """Say which samples the next forward pass has, (B,) integers in the order of its rows: for rules that remember samples."""
        for layer in self.layers.values():
            layer.keeper.visit(ids)

    def step(self) -> None:
        """Call once after every ``optimizer.step()``: the next draws are those of the next step."""
        self._begin(self.steps + 1)
        for layer in self.layers.values():
            layer.keeper.step()

    def _begin(self, steps: int) -> None:
        self.steps = steps
        for layer in self.layers.values():
            layer.begin(steps)

    def saved_bytes(self) -> int:
        """Bytes that the layers kept of their inputs in the last forward pass, measured; a layer that was called twice counts once."""
        return sum(layer.saved_bytes for layer in self.layers.values())

    def state_dict(self) -> dict[str, Any]:
        """The step and the keepers' states; weights are in the model's own ``state_dict``, under the names they had before."""
        keepers = {name: state for name, layer in self.layers.items() if (state := layer.keeper.state_dict())}
        calls = {name: layer.calls for name, layer in self.layers.items()}  # of a step that was skipped
        return {"steps": self.steps, "calls": calls, "made_of": self._made_of(), "keepers": keepers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken. Raises ``ValueError`` if the draws would be others."""
        if different := [key for key, value in self._made_of().items() if state["made_of"][key] != value]:
            raise ValueError(f"Compression.load_state_dict: the state is of a compression that differs in {', '.join(different)}")
        self.steps = state["steps"]
        for name, layer in self.layers.items():
            layer.begin(self.steps, state["calls"][name])
            layer.keeper.load_state_dict(state["keepers"].get(name, {}))

    def _made_of(self) -> dict[str, Any]:
        return {"seed": self.seed, "layers": {name: str(layer.keeper) for name, layer in self.layers.items()}}

    def finalize(self) -> nn.Module:
        """Put plain ``nn.Linear`` modules with the same parameters back in place and return the model; the handle is then spent."""
        for name, layer in self.layers.items():
            linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.weight, linear.bias = layer.weight, layer.bias  # pyright: ignore[reportAttributeAccessIssue]
            selection.replace(self.model, name, linear)
        self.layers = {}
        return self.model


compress = Compression  # reads as the verb it is: handle = compress(model, keeper=…)
