"""How a sequence of tasks is learnt: methods of ``lowrank finetune`` that know nothing of tasks, and two that protect what earlier ones need.

``adamw``      every matrix by full AdamW.                       ``lora``     one adapter, which goes on (peft).
``protected``  the same, gradient and step off P (optimizers/protected.py).     ``gorp``     optimizers/gorp.py.
``lowrank``    LowRank-IPA.                                      ``joint``    full AdamW on all tasks at once: what no sequence is asked for.

All train the same weights: the linear layers of the blocks, and the heads; embeddings, norms and biases stay, as nothing protects them. Moments are
forgotten between tasks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from experiments.runs import WrongInput
from experiments.training.methods import Full, Lora, LowRank, Method
from experiments.training.methods.projected import BETAS
from experiments.training.options import Options
from experiments.training.updates import optimizers as usual
from optimizers.gorp import GORP


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

    def parts(self) -> list[dict[str, Any]]:
        """The optimizer's groups of the matrices."""
        return [{"params": self.weights(), "part": "weight"}, *({"params": self.factors(name), "part": name} for name in "AB")]


class Protected(Full):
    """Full AdamW off P."""

    needs = ("energy",)

    def parts(self) -> list[dict[str, Any]]:
        """The optimizer's group of the matrices."""
        return [{"params": self.matrices(), "part": "full"}]


METHODS: dict[str, type[Method]] = {
    "adamw": Full,
    "protected": Protected,
    "lora": Lora,
    "gorp": Gorp,
    "lowrank": LowRank,
    "joint": Full,
}


def optimizer_of(config: Any, method: Method) -> torch.optim.Optimizer:
    """Of all that is trained. Raises ``WrongInput`` for what cannot be."""
    if not isinstance(method, Gorp | Protected):
        return usual(config, method)[0]
    groups = [group | {"matrices": True} for group in method.parts()] + [{"params": method.others(), "matrices": False}]
    shared = {"lora_scale": config.lora_scale, "energy": config.energy, "betas": BETAS, "seed": config.seed}
    try:
        return GORP(groups, config.lr, rank=config.rank, every=config.refresh_every, basis="randomized", **shared)
    except ValueError as error:
        raise WrongInput(str(error)) from None
