"""OwLore: a few layers by turns, those with more outlying weights more often, and GaLore inside (arXiv 2405.18380).

    every K steps: γ of the L layers without replacement, with probabilities proportional to their shares of outliers
    of their matrices: V = r leading right singular vectors of G;  R = GV;  M, N ← Adam's means of R, R²;  W ← (1 − ηλ)W − η·α·(M̂/(√N̂ + ε))Vᵀ

    share of outliers of a layer: entries of |W|, times the norm of their input where it is known, above ``multiple`` times the mean
    (`outlier_shares`)

Biased as GaLore, and by the unequal chances of the layers, which are not paid back. State: mr + 2nr elements while a layer has its turn; with
``freeze`` gradients as well. Weights that were drawn and not yet trained have no outliers: all chances are equal then, and as the shares are counted
once, when the group is added, they stay so.

Differs from the published code, which has no licence and was not read but is described: a layer's directions are chosen at the beginning of its
turn, there every 100 steps of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, float64

from optimizers.bases import TopSingular
from optimizers.buckets import names
from optimizers.outputs import Lift
from optimizers.sampling import LayerSampling, units
from optimizers.subspace import Params, Rule


class OwLore(LayerSampling):
    """See the module docstring. ``rank``: r; ``layers``: γ, a number or a share; ``every``: K in steps; ``weights``: of the layers in the order of
    their appearance, equal ones if None; "outliers": their ``outlier_shares`` when the group is added; ``scale``: α; ``freeze``: see
    ``LayerSampling``."""

    def __init__(
        self,
        params: Params,
        lr: float = 3e-4,
        *,
        rank: int | float | None = 256,
        layers: int | float = 5,
        every: int = 50,
        weights: tuple[float, ...] | Literal["outliers"] | None = "outliers",
        scale: float = 1.0,
        freeze: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "layers": layers, "every": every, "weights": weights, "scale": scale, "freeze": freeze}
        super().__init__(params, lr, own, seed=seed, **options)

    def order(self, group: dict[str, Any]) -> tuple[Any, Any]:
        if isinstance(group["weights"], str) and group["weights"] != "outliers":
            raise ValueError(f'OwLore(weights={group["weights"]!r}): must be "outliers", numbers, or None')
        if group["weights"] == "outliers":
            group["weights"] = outlier_shares(zip(names(self, group), group["params"], strict=True))
        return "random", group["weights"]

    def rule(self, group: dict[str, Any]) -> Rule:
        return Rule(basis=TopSingular(group["rank"]), inner=self.adam(group), output=Lift(group["scale"]))


def outlier_shares(
    named: Iterable[tuple[str, Tensor]], multiple: float = 13.0, inputs: Mapping[str, Float[Tensor, " n"]] | None = None
) -> tuple[float, ...]:
    """For ``OwLore(weights=…)``: of every layer, in the order of appearance, the mean share of entries above ``multiple`` times the mean.

    ``named``: the projected matrices (m, n) with their names, as in the group; ``inputs``: the norm of every input of a matrix, by its name. Layers
    without any get a tenth of the least other share, equal ones if no layer has any: every layer must keep a chance. Raises ``ValueError`` for no
    matrices.
    """
    pairs = list(named)
    if not pairs:
        raise ValueError("outlier_shares: no matrices")
    of = units(tuple(name for name, _ in pairs))
    found: dict[int, list[float]] = {}
    for unit, (name, W) in zip(of, pairs, strict=True):
        size = W.detach().abs() * (inputs[name] if inputs is not None else 1.0)
        found.setdefault(unit, []).append(float((size > multiple * size.mean()).to(float64).mean()))
    shares = [sum(some) / len(some) for _, some in sorted(found.items())]
    least = min((share for share in shares if share > 0), default=10.0) / 10
    return tuple(max(share, least) for share in shares)
