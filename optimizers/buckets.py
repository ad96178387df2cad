"""Parameters of one group that are treated as one batch: equal shapes, kinds and counters, stacked on a leading dimension, or one alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from estimators import keyed, processes
from estimators.rounding import SIXTEEN_BIT, stochastic_round

State = dict[str, Any]
COUNTERS = ("step", "clock", "draws")  # t of the bias correction; steps made; frames chosen


@dataclass
class Member:
    """A parameter in a step: its name, place among the parameters of its group, state, and ‖gradient‖ once it has been checked."""

    name: str
    place: int
    p: Tensor
    state: State
    norm: Tensor | None = None

    @property
    def gradient(self) -> Tensor:
        """Shaped as the parameter."""
        assert self.p.grad is not None
        return self.p.grad


def members(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[Member]:
    """The parameters of ``group`` that have a gradient."""
    called = names(optimizer, group)
    return [Member(called[place], place, p, optimizer.state[p]) for place, p in enumerate(group["params"]) if p.grad is not None]


def names(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> tuple[str, ...]:
    """Of all parameters of ``group``; the place stands for one without."""
    if called := group.get("param_names"):
        return _plain(tuple(called))
    index = next(i for i, other in enumerate(optimizer.param_groups) if other is group)
    return tuple(f"{index}.{place}" for place in range(len(group["params"])))


@lru_cache(maxsize=64)  # asked for once a parameter where steps are made one by one
def _plain(called: tuple[str, ...]) -> tuple[str, ...]:
    """The names without what DistributedDataParallel and torch.compile put before them, so that draws are the same with and without them."""
    return tuple(".".join(part for part in name.split(".") if part not in ("module", "_orig_mod")) for name in called)


def norms(gradients: list[Tensor]) -> tuple[list[Tensor], list[bool]]:
    """‖G‖ of each (scalars), in float32 for 16-bit ones, and whether that is finite. One pass, one wait for all of one kind."""
    found: dict[int, tuple[Tensor, bool]] = {}
    for kind in {(g.dtype, g.device) for g in gradients}:
        places = [i for i, g in enumerate(gradients) if (g.dtype, g.device) == kind]
        some = torch._foreach_norm([gradients[i] for i in places], 2, dtype=torch.promote_types(kind[0], torch.float32))  # pyright: ignore
        found |= zip(places, zip(some, torch.stack(some).isfinite().tolist(), strict=True), strict=True)
    return [found[i][0] for i in range(len(gradients))], [found[i][1] for i in range(len(gradients))]


class UnusableGradient(ValueError):
    """A gradient that is not finite, or whose square is not."""


def refuse_unusable(call: str, found: list[Member], kept: str) -> None:
    """Raises ``TypeError`` for sparse and sharded gradients, ``UnusableGradient`` for those whose norm is not finite; ``kept``: what was not
    changed."""
    found = [member for member in found if member.gradient.numel()]
    for gradient in (member.gradient for member in found):
        if gradient.is_sparse:
            raise TypeError(f"{call}: sparse gradients are not supported")
        if processes.local(gradient) is not gradient:
            raise TypeError(
                f"{call}: the parameter is sharded (DTensor) and a frame needs the whole matrix; use DistributedDataParallel, or"
                " estimators.convert with any torch optimizer under fully_shard"
            )
    bad = []
    for member, norm, finite in zip(found, *norms([member.gradient for member in found]), strict=True):
        member.norm = norm
        if not finite:
            bad.append(member.name)
    if bad:
        raise UnusableGradient(f"{call}.step(): gradient of {', '.join(bad[:3])} is NaN, infinite, or too large to be squared; {kept}")


def buckets(found: list[Member], together: bool | None, rows: bool = False) -> Iterator[Bucket]:
    """All of them in batches of equal shapes where ``together`` (None: on GPUs), otherwise each alone. ``rows``: what is no matrix is taken for
    one of a single row."""
    batches: dict[Any, list[Member]] = {}
    for member in found:
        p, counters = member.p, tuple(member.state.get(name, 0) for name in COUNTERS)
        alike = p.ndim == 2 and (together if together is not None else p.is_cuda)
        batches.setdefault((p.shape, p.dtype, p.device, counters) if alike else member.place, []).append(member)
    yield from (Bucket(some, rows and some[0].p.ndim != 2) for some in batches.values())


class Bucket:
    """What a step reads and writes of its members. Tensors are (M, N) for one member, (members, M, N) for more; ``row``: of any shape as (1, N)."""

    def __init__(self, members: list[Member], row: bool = False) -> None:
        self.members, self.row = members, row
        self.shape = tuple(members[0].p.shape)
        self.dtype = members[0].p.dtype
        self.exact = torch.promote_types(self.dtype, torch.float32)

    @property
    def names(self) -> tuple[str, ...]:
        """One a member."""
        return tuple(member.name for member in self.members)

    @property
    def place(self) -> int:
        """Of the first member."""
        return self.members[0].place

    def weights(self, flipped: bool) -> list[Tensor]:
        """The weights in float32 or better, transposed where ``flipped``; they share memory with 32-bit parameters."""
        return [self._oriented(_values(member.p, self.exact), flipped).to(self.exact) for member in self.members]

    def gradients(self, flipped: bool) -> Tensor:
        """The gradients in float32 or better, transposed where ``flipped``."""
        return stack([self._oriented(member.gradient, flipped).to(self.exact) for member in self.members])

    def norm(self) -> Tensor | None:
        """‖G‖ of the gradients, (*batch, 1, 1); None if they were not checked."""
        known = [member.norm for member in self.members if member.norm is not None]
        return stack([norm.reshape(1, 1) for norm in known]) if len(known) == len(self.members) else None

    def state(self) -> State:
        """The state of all members; counters are equal."""
        first = self.members[0].state
        same = (self.exact, torch.int64, torch.uint8)
        exact = lambda v: v if v.dtype in same else v.to(self.exact)  # noqa: E731  # a model may have become float64
        tensors = {key: exact(stack([m.state[key] for m in self.members])) if isinstance(v, Tensor) else v for key, v in first.items()}
        return dict.fromkeys(COUNTERS, 0) | tensors

    def write_weights(self, W: list[Tensor], flipped: bool, stochastic: tuple[int, int] | None) -> None:
        """Give 16-bit and quantised parameters what was changed in float32: rounded to the nearest, or stochastically, by seed and clock of the
        group: the clock of the parameter's own state begins anew where a method forgets that state, and its draws must not."""
        for member, changed in zip(self.members, W, strict=True):
            layer = getattr(member.p, "quantized", None)
            rounds = layer is not None or self.dtype in SIXTEEN_BIT
            if not rounds and (not self.row or member.p.is_contiguous()):  # other rows are copies
                continue
            generator = None
            if stochastic is not None and rounds:
                seed, clock = stochastic
                generator = keyed.generator(seed, f"{member.name}.rounding.{clock}", member.state.get("clock", 0), changed.device)
            if layer is not None:
                layer.store(self._oriented(changed, flipped), generator)
            else:
                rounded = changed if generator is None else stochastic_round(changed, self.dtype, generator)
                member.p.detach().copy_(rounded.view(member.p.shape) if self.row else self._oriented(rounded, flipped))

    def write_state(self, state: State, unchanged: Iterable[str]) -> None:
        """Give every member its part of ``state``; ``unchanged`` names need no writing."""
        for i, member in enumerate(self.members):
            for key in member.state.keys() - state.keys():
                del member.state[key]
            for key, value in state.items():
                if not isinstance(value, Tensor):
                    member.state[key] = value
                elif len(self.members) == 1:
                    member.state[key] = value.contiguous()  # as a checkpoint gives it back: products round by the layout
                elif key not in unchanged:
                    member.state[key] = value[i].clone()  # not a view: a state must not hold its neighbours' memory

    def _oriented(self, X: Tensor, flipped: bool) -> Tensor:
        if self.row:
            return X.reshape(1, X.numel())
        return X.mT if flipped else X


def _values(p: Tensor, exact: torch.dtype) -> Tensor:
    """The numbers of a parameter, which its layer keeps in codes where it has the attribute ``quantized`` (optimizers/quantized.py)."""
    layer = getattr(p, "quantized", None)
    return p.detach() if layer is None else layer.read(exact)


def stack(tensors: list[Any]) -> Any:
    """The one tensor itself, or all on a new leading dimension."""
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors)
