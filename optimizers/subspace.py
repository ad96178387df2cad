"""The one loop behind every optimizer here: AdamW's, except that the state lives in a frame which the gradient is sketched in.

For a matrix parameter W with gradient G, oriented so that its projected dimension is the last:

    G ← complement.enter(G)                       the error of the last step comes back, if there is any
    every T steps: frame ← basis.choose(G),  state ← transport.carry(state)
    B ← frame.sketch(G)                           all that the inner rule sees
    D ← inner.move(state, B)                      a step in the frame's coordinates
    W ← (1 − ηλ)W + output(D) + complement.term   lifted, and what is done about the rest of G

A named method picks the six parts in ``rule(group)`` and nothing else. Groups whose ``rank`` is None are AdamW. All state is tensors and
ints in ``optimizer.state``; ``p.grad`` and ``p.data`` keep their shapes.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from optimizers.bases import Basis, Draw, Identity
from optimizers.buckets import Bucket, Member, buckets, members, names, refuse_unusable, stack
from optimizers.frames import Frame
from optimizers.groups import Named, check, load_exactly
from optimizers.inner import Adafactor, Adam, Inner, Rate, State, rms
from optimizers.outputs import DROP, LIFT, Change, Complement, Context, Lift
from optimizers.storage import FLOAT, EightBit, Storage
from optimizers.transports import KEEP, Transport, refuse, renewing

Side = Literal["smaller", "larger", "left", "right"]
Watcher = Callable[[tuple[str, ...], Context], None]
Injected = Callable[[str, int], "Frame | None"]
Params = Iterable[Any]
COMMON: dict[str, Any] = {
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "states": "float",
    "smallest_8bit": 4096,
    "rounding": "nearest",
    "foreach": None,
    "second_moment": None,
    "clock": 0,  # calls of step()
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a method is. ``every``: T, None for never again; ``phase``: refresh where (clock + phase) mod T = 0, clock = steps made before;
    ``precondition``: a rule whose second moments divide the full gradient before it is sketched; ``relative``: the learning rate is
    multiplied by max(relative, RMS(W)); ``multiplier`` of it, but not of the decay, and ``adjust`` a function of the parameter's shape that is
    one more; ``decay_last``: decay after the step, of the new W."""

    basis: Basis
    inner: Inner
    every: int | None = None
    phase: int = 0
    side: Side = "smaller"
    transport: Transport = KEEP
    output: Lift = LIFT
    complement: Complement = DROP
    precondition: Adafactor | None = None
    relative: float | None = None
    multiplier: float = 1.0
    adjust: Callable[[int, int], float] | None = None
    decay_last: bool = False


class Subspace(Named, torch.optim.Optimizer, abc.ABC):
    """Base of all optimizers here.

    ``params``: parameters, named parameters, or groups of either; a group with ``rank`` (an integer, or a fraction in (0, 1) of the projected
    dimension) holds matrices and is projected, one with ``rank=None`` is trained by AdamW. Names key the draws; without them the position does.

    Common options, all of a group: ``lr``, ``betas``, ``eps``, ``weight_decay`` (decoupled), ``states`` ("float" or "8bit"; moments of fewer than
    ``smallest_8bit`` numbers stay float), ``rounding`` of 16-bit weights ("nearest", or "stochastic", which is right in expectation), ``foreach``
    (equal shapes as one batch; None: on GPUs), ``second_moment`` (transports.py; None: the method's). ``seed`` of all draws. ``inject``: see there.

    ``step`` raises ``ValueError`` for gradients that are not finite, or whose squares are not, before it changes anything, and ``TypeError`` for
    sparse or sharded ones.
    """

    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    """What the named options may be. ``variant``: the paper's rule, and where the published code has another one, that."""

    coded_weights: ClassVar[bool] = False
    """Whether the method's weights are held in 8-bit codes (``int8_weights``); it also trains others."""

    any_shape: ClassVar[bool] = False
    """Whether groups with a rank may hold tensors of any shape; what is no matrix is one of a single row."""

    fused: ClassVar[bool] = False
    """Whether the method is one of updates inside the backward pass, where gradients do not accumulate (``per_layer``)."""

    inject: Injected | None = None
    """The one way to give a method its frame: a function (name of the parameter, steps made before this one) → frame, or None for the
    method's own choice. Asked at every refresh; the frame acts on the oriented gradient, whose projected dimension is the last."""

    watch: Watcher | None = None
    """Called at every step with the names of the parameters and what happened to their gradients (``Context``), before the weights change."""

    def __init__(self, params: Params, lr: float = 1e-3, own: Any = None, *, seed: int = 0, **options: Any) -> None:
        """``own``: a dict of the method's options, ``rank`` among them; ``options``: common ones. Raises ``TypeError`` for others."""
        if unknown := options.keys() - COMMON.keys():
            known = ", ".join(sorted({"lr", "seed", *(own or {}), *COMMON}))
            raise TypeError(f"{type(self).__name__}({', '.join(sorted(unknown))}): unknown option, known are {known}")
        super().__init__(params, COMMON | {"lr": lr, "rank": None, "seed": seed} | (own or {}) | options)

    @abc.abstractmethod
    def rule(self, group: dict[str, Any]) -> Rule:
        """The parts of the method for a group that is projected."""

    def rule_of(self, group: dict[str, Any]) -> Rule:
        """``rule``, or AdamW's for a group without a rank."""
        return self.rule(group) if group["rank"] is not None else Rule(basis=Identity(), inner=self.adam(group), side="right")

    @staticmethod
    def storage(group: dict[str, Any]) -> Storage:
        """How a group's moments are kept."""
        return EightBit(group["smallest_8bit"]) if group["states"] == "8bit" else FLOAT

    @classmethod
    def adam(cls, group: dict[str, Any], **options: Any) -> Adam:
        """Adam with a group's betas, eps and storage."""
        return Adam(betas=group["betas"], eps=group["eps"], storage=cls.storage(group), **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, and checked: values in range, and matrices where there is a rank. A group that is refused is not added."""
        super().add_param_group(param_group)
        try:
            check(type(self).__name__, self.param_groups[-1], self.choices, self.any_shape)
            if self.param_groups[-1]["rank"] is not None:
                inner = (rule := self.rule(self.param_groups[-1])).inner
                refuse(type(self).__name__, self.param_groups[-1]["second_moment"], inner, rule.basis.frame, rule.precondition is not None)
                if self.param_groups[-1]["states"] == "8bit" and not isinstance(inner.storage, EightBit):
                    raise ValueError(f"{type(self).__name__}(states='8bit'): what this method keeps is not kept in 8 bits")
        except ValueError:
            self.param_groups.pop()
            raise

    # one step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        present = [(group, self._taking_part(group)) for group in self.param_groups]
        refuse_unusable(type(self).__name__, [member for _, found in present for member in found], "nothing was changed")
        for group, found in present:
            self._advance_all(group, found)
            group["clock"] += 1
        return loss

    @torch.no_grad()
    def step_of(self, p: Tensor) -> None:
        """One step for one parameter."""
        group = self.group_of(p)
        found = [member for member in self._taking_part(group) if member.p is p]
        refuse_unusable(type(self).__name__, found, "this parameter was not changed")
        self._advance_all(group, found)

    def group_of(self, p: Tensor) -> dict[str, Any]:
        """The group that holds p."""
        return next(group for group in self.param_groups if any(p is other for other in group["params"]))

    def _taking_part(self, group: dict[str, Any]) -> list[Member]:
        """Who has a gradient and a step now."""
        return members(self, group)

    def _advance_all(self, group: dict[str, Any], found: list[Member]) -> None:
        rule = self.rule_of(group)
        together = group["foreach"] if rule.basis.batched and self.inject is None else False
        for bucket in buckets(found, together, rows=group["rank"] is not None):
            self._advance(group, rule, bucket)

    def _advance(self, group: dict[str, Any], rule: Rule, bucket: Bucket) -> None:
        flipped = _flipped(bucket.shape, rule.side)
        W, G, state = bucket.weights(flipped), bucket.gradients(flipped), bucket.state()
        draws = state["draws"]

        lr = float(group["lr"])  # schedules may make it a tensor
        rate: Rate = lr * rule.multiplier * (1.0 if rule.adjust is None else rule.adjust(*bucket.shape))
        decay: Rate = 1 - lr * group["weight_decay"]
        if rule.relative is not None:
            weight_rms = rms(stack(W)).clamp_min(rule.relative)
            rate, decay = rate * weight_rms, 1 - lr * weight_rms * group["weight_decay"]
        context = self._inner_step(group, rule, bucket, rule.complement.enter(G, W, state, flipped), state, rate)
        if context.G is G:
            context.known_norm = bucket.norm()
        changes = [change for change in (rule.output.dense(context, rate), rule.complement.term(context)) if change is not None]
        if self.watch is not None:
            self.watch(bucket.names, context)
        low = rule.output.low(context)

        if group["weight_decay"] and not rule.decay_last:
            _scale(W, decay)
        _add(W, context.frame, low, changes)
        if group["weight_decay"] and rule.decay_last:
            _scale(W, decay)
        rule.complement.finish(W, context, rate)
        bucket.write_weights(W, flipped, (group["seed"], group["clock"]) if group["rounding"] == "stochastic" else None)
        state["clock"] += 1
        kept = context.frame.tensors().keys() if state["draws"] == draws and not rule.basis.follows else ()
        bucket.write_state(state, unchanged=kept)

    def _inner_step(self, group: dict[str, Any], rule: Rule, bucket: Bucket, G: Tensor, state: State, rate: Rate) -> Context:
        """Everything between the gradient and the step in the frame's coordinates; the state advances."""
        inner, name, history, lost, memo = rule.inner, rule.inner.first, None, None, None
        old: Frame | None = rule.basis.frame.of(state)
        clock = state["clock"] if rule.basis.batched else group["clock"]
        due = old is None or rule.basis.due(state, clock + rule.phase, rule.every)
        wanted = rule.output.needs_history or (due and (rule.complement.needs_history or rule.basis.needs_mean))
        if old is not None and name in state and wanted:
            history = old.lift(inner.moment(state, name), G)
        if due:
            frame = self._choose(group, rule, bucket, G, state, old, history)
            if old is not None and state["step"]:
                memo = renewing(rule.transport, group, bucket.names, G).carry(inner, state, old, frame)
                if history is not None and rule.complement.needs_history:
                    lost = history - frame.lift(inner.moment(state, name), G)
            state |= frame.tensors()
            state["draws"] += 1
        else:
            assert old is not None
            frame = old
        state["step"] += 1
        if rule.precondition is not None:
            G = rule.precondition.precondition(state, G)
        B = frame.sketch(G)
        move = inner.move(state, B, rate)
        rule.transport.settle(inner, state, memo)
        state |= rule.basis.follow(G, B, frame, state)
        return Context(G, B, move, frame, state, history, lost, _flipped(bucket.shape, rule.side), rule)

    def _choose(
        self, group: dict[str, Any], rule: Rule, bucket: Bucket, G: Tensor, state: State, old: Frame | None, history: Tensor | None
    ) -> Frame:
        if self.inject is not None and (given := self.inject(bucket.names[0], state["clock"])) is not None:
            kind = rule.basis.frame
            if not isinstance(given, kind):
                raise ValueError(f"{type(self).__name__}.inject: the frame must be {kind.__name__}, got {type(given).__name__}")
            return given
        known = {} if history is None else {"mean": history / rule.inner.corrections(state["step"])[0]}
        if history is not None:
            known["moment"] = rule.inner.moment(state, rule.inner.first)
        turn = group["clock"] // rule.every if rule.every else 0
        at = (group["seed"], state["draws"], state["clock"], turn, bucket.place, names(self, group), _flipped(bucket.shape, rule.side), old)
        return rule.basis.choose(G, Draw(bucket.names, *at, **known))

    # checkpoints and sizes

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps the precision it was saved in."""
        super().load_state_dict(state_dict)
        load_exactly(self, state_dict)

    def state_bytes(self) -> int:
        """Bytes of all live state tensors, each storage counted once."""
        storages = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for state in self.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        }
        return sum(storages.values())


def _flipped(shape: tuple[int, ...], side: Side) -> bool:
    """Whether the projected dimension of an m×n parameter is the first: the smaller one, columns where they are equal, or the one named."""
    if side in ("left", "right"):
        return side == "left"
    m, n = shape
    return m < n if side == "smaller" else m >= n


def _scale(W: list[Tensor], factor: Rate) -> None:
    for i, weight in enumerate(W):
        weight.mul_(factor if not isinstance(factor, Tensor) or len(W) == 1 else factor[i])


def _add(W: list[Tensor], frame: Frame, low: tuple[Tensor, float] | None, changes: list[Change]) -> None:
    if low is not None and len(W) == 1:
        frame.add(W[0], *low)
    elif low is not None:
        changes = [(frame.lift(low[0], stack(W)), low[1]), *changes]
    for X, factor in changes:
        for i, weight in enumerate(W):
            part, scale = (X, factor) if len(W) == 1 else (X[i], factor[i] if isinstance(factor, Tensor) else factor)
            if isinstance(scale, Tensor):
                weight.addcmul_(part, scale)
            else:
                weight.add_(part, alpha=scale)
