"""FRUGAL: Adam on a part of the gradient, a step without state on the rest, so that every step is full-rank (arXiv 2411.07837).

    every T steps: choose a part of the coordinates; M = N = 0 and the bias correction begins anew
    W ← (1 − ηλ)W;  W ← W − η·s·( lift(M̂/(√N̂ + ε)) + c·sign(G − lift(sketch(G))) )      or the residual itself in the place of its sign

``part``: "svd", "random" (Haar), "permutation": density·m directions of the smaller dimension m, and the state is mr + 2nr elements
("permutation": r indices + 2nr); "columns", "rows", "entries": a random subset, 2ρmn numbers and their indices (64 bit); "blocks": whole matrices by
turns, ``density`` of those of the group, 2mn each while they have their turn. Biased: a sign is not linear, nor is Adam; nothing is
dropped. The published main runs use "blocks", here the default.
Differs: draws are keyed, equal on all ranks (the published ones come from the global generator); the order "mirror" is left out, it is
described nowhere.
"""

from __future__ import annotations

from typing import Any

from optimizers.bases import Basis, FromLaw, TopSingular
from optimizers.outputs import DROP, Descent, Sign
from optimizers.selections import RandomColumns, RandomEntries, Turns
from optimizers.subspace import Params, Rule, Side, Subspace
from optimizers.transports import KEEP, Reset

COMPLEMENTS = {"sign": Sign, "sgd": Descent, "drop": lambda _: DROP}


class Frugal(Subspace):
    """See the module docstring. ``rank``: ρ, the density, or r; ``every``: T in steps; ``scale``: s; ``rest``: "sign", "sgd" or "drop",
    ``rest_scale``: c (0.1 in fine-tuning); ``order`` of blocks; ``reset``: False keeps the moments by position."""

    choices = {
        "part": ("blocks", "svd", "random", "permutation", "columns", "rows", "entries"),
        "rest": tuple(COMPLEMENTS),
        "order": ("descending", "ascending", "random"),
    }

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        *,
        rank: int | float | None = 0.25,
        every: int = 200,
        part: str = "blocks",
        order: str = "descending",
        scale: float = 1.0,
        rest: str = "sign",
        rest_scale: float = 1.0,
        reset: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "every": every, "part": part, "order": order, "scale": scale, "rest": rest, "rest_scale": rest_scale}
        super().__init__(params, lr, own | {"reset": reset}, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        rank, part, rest = group["rank"], group["part"], group["rest"]
        parts: dict[str, Basis] = {
            "svd": TopSingular(rank),
            "random": FromLaw(rank, orthonormal=True),
            "permutation": RandomColumns(rank),
            "columns": RandomColumns(rank),
            "rows": RandomColumns(rank),
            "entries": RandomEntries(rank),
            "blocks": Turns(rank, group["order"]),
        }
        if part == "blocks" and not group["reset"]:
            raise ValueError("Frugal(part='blocks', reset=False): a matrix whose turn is over keeps nothing; blocks are always reset")
        sides: dict[str, Side] = {"columns": "right", "rows": "left", "entries": "right", "blocks": "right"}
        return Rule(
            basis=parts[part],
            every=group["every"],
            side=sides.get(part, "smaller"),
            inner=self.adam(group),
            transport=Reset() if group["reset"] else KEEP,
            complement=COMPLEMENTS[rest](group["rest_scale"]),
            multiplier=group["scale"],
        )
