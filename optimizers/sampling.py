"""Layers by turns: what LISA, OwLore and BAdam share. In a period some layers are open; the others take no step, keep no state, and need no gradient.

With ``freeze`` the matrices of closed layers have ``requires_grad=False``, so that backward passes form no gradients for them; it must be False with
several processes: DistributedDataParallel must know from the start which parameters take part.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from estimators import processes
from estimators.selection import rank_of
from optimizers.buckets import Member, names
from optimizers.selections import in_turn
from optimizers.subspace import Params, Subspace


class LayerSampling(Subspace):
    """Base. Options of a group: ``layers`` in a period, a number or a share; ``every``, its steps; ``freeze``. A period begins with empty states."""

    def __init__(self, params: Params, lr: float, own: dict[str, Any], *, seed: int = 0, **options: Any) -> None:
        super().__init__(params, lr, {"open": None} | own, seed=seed, **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in the base; the turns of its layers begin."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if isinstance(group["layers"], float) and group["layers"] >= 1:
                raise ValueError(f"{type(self).__name__}(layers={group['layers']}): must be an integer, or a share in (0, 1)")
            if group["freeze"] and group["rank"] is not None and processes.size() > 1:
                raise ValueError(
                    f"{type(self).__name__}(freeze=True): parameters that come and go cannot be averaged over processes; use freeze=False"
                )
            self._begin([group])
        except ValueError:
            self.param_groups.pop()
            raise

    @abstractmethod
    def order(self, group: dict[str, Any]) -> tuple[Any, Any]:
        """The order of the layers, and their weights if it is random."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As in the base; at the end of a period other layers are opened."""
        loss = super().step(closure)
        self._begin([group for group in self.param_groups if group["clock"] % group["every"] == 0])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in the base; the layers that were open are open again."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            self._freeze(group)

    def _taking_part(self, group: dict[str, Any]) -> list[Member]:
        return [member for member in super()._taking_part(group) if group["rank"] is None or group["open"][member.place]]

    def _begin(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            if group["rank"] is None:
                continue
            of = units(names(self, group))
            count = max(of) + 1
            order, weights = self.order(group)
            size = min(count, rank_of(count, group["layers"]))
            chosen = in_turn(count, size, order, group["seed"], group["clock"] // group["every"], weights)
            group["open"] = [unit in chosen for unit in of]
            for p in group["params"]:
                self.state.pop(p, None)
            self._freeze(group)

    def _freeze(self, group: dict[str, Any]) -> None:
        if group["rank"] is None or not group["freeze"]:
            return
        for p, is_open in zip(group["params"], group["open"], strict=True):
            p.requires_grad_(is_open)
            if not is_open:
                p.grad = None


def units(group: tuple[str, ...]) -> list[int]:
    """The layer of every parameter by its name: numbered by first appearance of what stands before and at the first number in the name
    (``model.layers.3.mlp.up_proj.weight`` and ``model.layers.3.self_attn.q_proj.weight`` are one); a name without a number, or with nothing else, as
    parameters without names are called by their places, is its own."""
    stems = []
    for name in group:
        parts = name.split(".") if any(letter.isalpha() for letter in name) else [name]
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        stems.append(name if number is None else ".".join(parts[: number + 1]))
    order = {stem: place for place, stem in enumerate(dict.fromkeys(stems))}
    return [order[stem] for stem in stems]
