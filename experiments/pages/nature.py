"""What the gradient that a method steps with is of the mini-batch's own, in one word for tables.

``exact``: that gradient; of LoRA and ReLoRA, the factors'. ``unbiased``: an estimate with its mean. ``unbiased × s``: with a share of it, the same
for all entries: layers or coordinates by turns, a projection on a random subspace. ``compensated``: biased at every step, and what was left out is
fed back later. ``biased``: neither. Before Adam, signs and Newton–Schulz, after which none is unbiased. What is said here of optimizers is measured
by ``lowrank optimizers``; laws and keepers say it of themselves. Methods without gradients: up to ε².
"""

from __future__ import annotations

from estimators import LAWS
from experiments.continuing.methods import METHODS as IN_SEQUENCE
from experiments.optimizers import CLAIMS
from experiments.training.methods import METHODS
from experiments.validation.travelling import HOOKS
from optimizers import ZEROTH_ORDER

EXACT, UNBIASED, SHARE, COMPENSATED, BIASED = "exact", "unbiased", "unbiased × s", "compensated", "biased"
ALL_OF_IT = ("adamw", "lora", "relora", "apollo", "apollo_mini", "foam", "muon", "lomo", "adalomo")
FED_BACK = ("ldadam", "dct_adamw", "trion", "dion", "gradlite", "gradlite_inputs", "powersgd", "law_hook_feedback")
ESTIMATED = ("compact", "rad", "wta_crs", "gradlite_law")
OF_A_LAW = ("lowrank", "tokens", *ZEROTH_ORDER)
NEUTRAL = 0.5  # a ratio at which a claim of 1 is told from one of the ratio


def nature(label: str) -> str:
    """Of a row of a table: a method, or a law of LowRank-IPA; ``:law`` or ``law`` after a method, ``+option`` after either. Raises ``ValueError``."""
    name, *law = label.split("+")[0].replace(":", " ").split()
    if law and (name not in OF_A_LAW or law[0] not in LAWS):
        raise ValueError(f"nature({label!r}): {law[0]!r} is not a law of {name}")
    if name in ALL_OF_IT:
        return EXACT
    if name in FED_BACK:
        return COMPENSATED
    if name in CLAIMS:
        return UNBIASED if CLAIMS[name](NEUTRAL) == 1 else SHARE
    if law or name in LAWS:
        return UNBIASED if LAWS[law[0] if law else name].unbiased else BIASED
    if name in ESTIMATED or name in OF_A_LAW:
        return UNBIASED
    if name in METHODS or name in HOOKS or name in IN_SEQUENCE:
        return BIASED
    raise ValueError(f"nature({label!r}): not the name of a method or a law")
