"""GoLore: GaLore whose directions are random, and no longer the gradient's own, from a late step on (arXiv 2410.11289).

    every T steps: V = r leading right singular vectors of G before step ``random_from``; afterwards uniform on the Stiefel manifold
    the first moment follows: M ← M·VᵀV_new;   otherwise as GaLore (optimizers/galore.py), or SGD with momentum instead of Adam

Near a minimum leading singular directions are those of the noise. With random V the sketch is unbiased up to scale, E[VVᵀ] = (r/n)I; no
n/r is paid back, and Adam hides it: only the direction of the mean update of the SGD form is right. Before the switch biased as GaLore.
State: mr + 2nr elements (m ≤ n). Moments of V: theory/haar_stiefel.py with c = r/n.

``variant="reference-code"``: the re-projected M serves one step and is then forgotten, with that step's gradient, as the published code does
(its SGD form begins to re-project at the second refresh only); ε before the bias correction and decay after the step, as in GaLore's code.
"""

from __future__ import annotations

from typing import Any, Literal

from optimizers.bases import FromLaw, Switch, TopSingular
from optimizers.inner import Momentum
from optimizers.outputs import Lift
from optimizers.subspace import Params, Rule, Subspace
from optimizers.transports import ReprojectFirst, ReprojectOnce


class GoLore(Subspace):
    """See the module docstring. ``rank``: r; ``every``: T in steps; ``random_from``: steps after which directions are random; ``scale``: α."""

    choices = {"variant": ("paper", "reference-code"), "inner": ("adam", "sgd")}

    def __init__(
        self,
        params: Params,
        lr: float = 0.01,
        *,
        rank: int | float | None = 128,
        every: int = 200,
        random_from: int = 0,
        scale: float = 0.25,
        inner: Literal["adam", "sgd"] = "adam",
        momentum: float = 0.9,
        variant: str = "paper",
        seed: int = 0,
        **options: Any,
    ) -> None:
        own = {"rank": rank, "every": every, "random_from": random_from, "scale": scale, "inner": inner, "momentum": momentum}
        super().__init__(params, lr, own | {"variant": variant}, seed=seed, **options)

    def rule(self, group: dict[str, Any]) -> Rule:
        code, sgd = group["variant"] == "reference-code", group["inner"] == "sgd"
        return Rule(
            basis=Switch(group["rank"], TopSingular(group["rank"]), FromLaw(group["rank"], orthonormal=True), group["random_from"]),
            every=group["every"],
            inner=Momentum(beta=group["momentum"], storage=self.storage(group)) if sgd else self.adam(group, eps_inside=code),
            transport=ReprojectOnce(since=2 if sgd else 1) if code else ReprojectFirst(),
            output=Lift(group["scale"]),
            decay_last=code,
        )
