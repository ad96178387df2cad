"""The options of a parameter group: what each may be, checked before a group is taken."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch

from estimators.transport import SECONDS

SIDES = ("smaller", "larger", "left", "right")
CHOICES: dict[str, tuple[str | None, ...]] = {
    "states": ("float", "8bit"),
    "rounding": ("nearest", "stochastic"),
    "side": SIDES,
    "second_moment": (None, *SECONDS),
    "variant": ("paper",),
}
FINITE = ("threshold",)
SHARES = ("beta", "beta1", "momentum", "rho", "floor")  # in [0, 1)
PARTS = ("mu",)  # in [0, 1]
POSITIVE = ("scale", "keep", "limit", "clip", "relative", "rest_scale", "layers", "largest")
NOT_NEGATIVE = ("penalty", "pull", "basis_lr")
COUNTS = ("smallest_8bit", "random_from", "level")
FROM_ONE = ("every", "recalibrate", "kept")


class Named:
    """Which options the constructor of a class has, by their names."""

    @classmethod
    def takes(cls, **wanted: Any) -> dict[str, Any]:
        """Those of the ``wanted`` options that this method has."""
        return {name: value for name, value in wanted.items() if name in inspect.signature(cls.__init__).parameters}

    @classmethod
    def default(cls, option: str) -> Any:
        """What an option is if it is not given. Raises ``KeyError`` for one that the method has not."""
        return inspect.signature(cls.__init__).parameters[option].default


def check(call: str, group: dict[str, Any], choices: Mapping[str, tuple[str, ...]], any_shape: bool = False) -> None:
    """Raises ``ValueError`` that names the call, the option and the value. ``choices``: of the method, beside the common ones; ``any_shape``: a rank
    does not ask for matrices."""
    for name, known in (CHOICES | dict(choices)).items():
        if group.get(name, known[0]) not in known:
            raise ValueError(f"{call}({name}={group[name]!r}): unknown, known are {', '.join(map(str, known))}")
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= group[name] < math.inf:
            raise ValueError(f"{call}({name}={group[name]}): must be finite and not negative")
    for name in FINITE:
        if (value := group.get(name)) is not None and not math.isfinite(value):
            raise ValueError(f"{call}({name}={value}): must be finite")
    for name in SHARES:
        if (value := group.get(name)) is not None and not 0 <= value < 1:
            raise ValueError(f"{call}({name}={value}): must be in [0, 1)")
    for name in PARTS:
        if (value := group.get(name)) is not None and not 0 <= value <= 1:
            raise ValueError(f"{call}({name}={value}): must be in [0, 1]")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"{call}(betas={group['betas']}): must be two numbers in [0, 1)")
    for name in POSITIVE:
        if (value := group.get(name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"{call}({name}={value}): must be positive and finite")
    for name in NOT_NEGATIVE:
        if (value := group.get(name)) is not None and not 0 <= value < math.inf:
            raise ValueError(f"{call}({name}={value}): must be finite and not negative")
    for name in (*COUNTS, *FROM_ONE):
        least = int(name in FROM_ONE)
        if (value := group.get(name)) is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{call}({name}={value}): must be an integer of at least {least}")
    _check_rank(call, group["rank"], [] if any_shape else group["params"])


def load_exactly(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """After torch's ``load_state_dict``, which casts: every tensor in the precision it was saved in."""
    saved = [index for group in state_dict["param_groups"] for index in group["params"]]
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in zip(saved, mine, strict=True):
        for key, value in state_dict["state"].get(index, {}).items():
            if isinstance(value, torch.Tensor):
                optimizer.state[p][key] = value.detach().to(p.device, copy=True)


def _check_rank(call: str, rank: Any, matrices: list[Any]) -> None:
    if rank is None:
        return
    if isinstance(rank, bool) or not ((isinstance(rank, int) and rank >= 1) or (isinstance(rank, float) and 0 < rank < 1)):
        raise ValueError(f"{call}(rank={rank!r}): must be a positive integer, a fraction in (0, 1), or None for AdamW")
    for p in matrices:
        if p.ndim != 2:
            raise ValueError(f"{call}(rank={rank}): projects matrices, got a parameter of shape {tuple(p.shape)}; give it rank=None")
