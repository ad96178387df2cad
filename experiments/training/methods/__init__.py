"""How a model is trained: which parameters move, what happens after each optimizer step, and what is left when it is over.

``lowrank`` is LowRank-IPA with any law; ``adamw`` trains every weight; ``lora`` is the frozen subspace (peft); ``relora`` merges and restarts
LoRA every K steps (2307.05695); the optimizers of ``optimizers/`` keep weights and gradients whole and their own state in a frame; ``gradlite``
also has layers that keep less and follow their error signals. All run in one loop, with the same data order, schedule and clipping;
embeddings, head and norms are always trained in full, so methods differ only in the linear layers inside the blocks.
"""

from experiments.training.methods.gradlite import VARIANTS
from experiments.training.methods.lora import Lora, ReLora
from experiments.training.methods.lowrank import LowRank
from experiments.training.methods.method import Full, Method, Settings
from experiments.training.methods.projected import Projected, projected
from optimizers import OPTIMIZERS

METHODS: dict[str, type[Method]] = {
    "lowrank": LowRank,
    "adamw": Full,
    "lora": Lora,
    "relora": ReLora,
    **{name: projected(optimizer) for name, optimizer in OPTIMIZERS.items()},
    **VARIANTS,
}

__all__ = ["METHODS", "Full", "Lora", "LowRank", "Method", "Projected", "ReLora", "Settings"]
