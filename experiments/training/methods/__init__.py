"""How a model is trained: which parameters move, what happens after each optimizer step, and what is left when it is over.

``lowrank`` is LowRank-IPA with any law, ``compact`` the same with a Gaussian V that is not kept; ``adamw`` trains every weight, ``tokens``, ``rad``,
``wta_crs`` and ``velora`` do so by an estimate of its gradient from a compressed input; ``lora`` is the frozen subspace (peft); ``relora`` merges
and restarts LoRA every K steps (2307.05695); the optimizers of ``optimizers/`` keep weights and gradients whole and their own state in a frame, and
``gradlite`` also has layers that keep less and follow their error signals. All run in one loop, with the same data order, schedule and clipping;
embeddings, head and norms are always trained in full, so methods differ only in the linear layers inside the blocks.
"""

from experiments.training.methods.compressed import RAD, CompAct, Compressed, Groups, Tokens, WinnersTakeAll
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
    "tokens": Tokens,
    "rad": RAD,
    "wta_crs": WinnersTakeAll,
    "velora": Groups,
    "compact": CompAct,
    **{name: projected(optimizer) for name, optimizer in OPTIMIZERS.items()},
    **VARIANTS,
}

__all__ = ["METHODS", "Compressed", "Full", "Lora", "LowRank", "Method", "Projected", "ReLora", "Settings"]
