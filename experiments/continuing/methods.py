"""How a sequence of tasks is learnt: methods of ``lowrank finetune`` that know nothing of tasks, and two that protect what earlier ones need.

``adamw``      every matrix by full AdamW.                       ``lora``     one adapter, which goes on (peft).
``protected``  the same, gradient and step off P (optimizers/protected.py).     ``gorp``     optimizers/gorp.py.
``lowrank``    LowRank-IPA.                                      ``joint``    full AdamW on all tasks at once: what no sequence is asked for.

All train the same weights: the linear layers of the blocks, and the heads; embeddings, norms and biases stay, as nothing protects them. Moments are
forgotten between tasks.
"""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from experiments.runs import WrongInput
from experiments.training.methods import Full, Lora, LowRank, Method, Projected
from experiments.training.methods.projected import BETAS
from experiments.training.options import Options
from optimizers.gorp import GORP
from optimizers.protected import ProtectedAdamW


class Gorp(Lora):
    """LoRA with the weights under it trained as well."""

    needs = ("rank", "lora_scale", "refresh_every", "energy")

    def __init__(self, model: nn.Module, settings: Options) -> None:
        super().__init__(model, settings)
        self.layers = list(self.adapters().values())
        for W in self.weights():
            W.requires_grad_(True)

    def weights(self) -> list[nn.Parameter]:
        """W of the adapted layers."""
        return [cast(nn.Parameter, layer.get_base_layer().weight) for layer in self.layers]

    def factors(self, name: str) -> list[nn.Parameter]:
        """A (l×n) or B (m×l) of the adapted layers."""
        return [cast(nn.Parameter, next(iter(getattr(layer, f"lora_{name}").values())).weight) for layer in self.layers]

    def matrices(self) -> list[nn.Parameter]:
        return [*self.weights(), *self.factors("A"), *self.factors("B")]

    def updates(self, config: Any) -> GORP:
        parts = {"weight": self.weights(), "A": self.factors("A"), "B": self.factors("B")}
        groups: list[dict[str, Any]] = [{"params": some, "part": part, "matrices": True} for part, some in parts.items()]
        groups.append({"params": self.others(), "matrices": False})
        shared = {"lora_scale": config.lora_scale, "energy": config.energy, "betas": BETAS, "seed": config.seed}
        try:
            return GORP(groups, config.lr, rank=config.rank, every=config.refresh_every, basis="randomized", **shared)
        except ValueError as error:
            raise WrongInput(str(error)) from None


class Protected(Projected):
    """Full AdamW off P."""

    kind, options, needs = ProtectedAdamW, {"energy": "energy"}, ("energy",)


METHODS: dict[str, type[Method]] = {
    "adamw": Full,
    "protected": Protected,
    "lora": Lora,
    "gorp": Gorp,
    "lowrank": LowRank,
    "joint": Full,
}
