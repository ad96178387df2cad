"""Who is compared in fine-tuning, by labels ``method`` or ``method:law``, and the tuning runs of each.

A label may go on with ``+recomputed`` (the blocks are computed again in the backward pass), ``+fused`` (updates inside it) and ``+ranks`` (each layer
has its rank from a file)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimators import LAWS
from experiments.comparison import search
from experiments.finetuning.config import WITH_LAWS, Tuning
from experiments.training.methods import METHODS
from experiments.training.methods.gradlite import VARIANTS
from optimizers import OPTIMIZERS, ZEROTH_ORDER

if TYPE_CHECKING:
    from experiments.finetune import Config

TUNING_SEED = 1000  # none of the seeds that are compared
GENTLE, FORWARD = 1e-3, 1e-4  # starts of the search for few steps on a pretrained model: of AdamW, and of forward passes alone
HOW = {"recomputed": "recompute", "fused": "fused"}  # the end of a label → field
RANKS = "ranks"  # the end of a label whose layers have ranks of their own
VARIES = {"method", "lr", "seed", "tests", "steps", "sequences", "ranks", "ranks_sha256"}  # between the trainings of one comparison

DRAWN = tuple(name for name, law in LAWS.items() if not law.fitted)  # laws without a gradient to look at
LEADING = ("galore", "ldadam", "muon")  # some in a frame
VARIED = ("adamw", "lora", "lowrank:haar_stiefel", "lowrank:gaussian", "lowrank:coordinate", "lowrank:spectral")
BACKWARD = (  # what the backward pass keeps and when it updates, GradLite's published ablations among them
    *("adamw", "adamw+recomputed", "galore", "lomo+fused", "gradlite+fused"),
    *("gradlite_no_feedback+fused", "gradlite_static+fused"),
)
FORWARDS = ("lowrank_lr:haar_stiefel", "mezo", "lozo", "subzero")
EVERY = (
    *("adamw", "lora", "relora"),
    *(f"lowrank:{law}" for law in LAWS),
    *(f"tokens:{law}" for law in LAWS),
    *("rad", "wta_crs", "velora", "compact"),
    *OPTIMIZERS,
    *(name for name in VARIANTS if name not in OPTIMIZERS),
    *(f"lowrank_lr:{law}" for law in DRAWN),
    *(name for name in ZEROTH_ORDER if name != "lowrank_lr"),
)


def trial(config: Config, label: str, lr: float) -> Tuning:
    """The tuning run of one contender at one learning rate. Raises ``ValueError`` for a contender that does not exist."""
    name, *how = label.split("+")
    if unknown := set(how) - {*HOW, RANKS}:
        raise ValueError(f"method {label!r}: unknown {', '.join(sorted(unknown))}, known are {', '.join((*HOW, RANKS))}")
    method, _, law = name.partition(":")
    if how and method in ZEROTH_ORDER:
        raise ValueError(f"method {label!r}: without a backward pass nothing is recomputed or fused")
    if law and method not in WITH_LAWS:
        raise ValueError(f"method {label!r}: only {', '.join(WITH_LAWS[:-1])} and {WITH_LAWS[-1]} have laws")
    if method == "lowrank_lr" and law and law in LAWS and LAWS[law].fitted:
        raise ValueError(f"method {label!r}: forward passes show no gradient to fit a law to; known are {', '.join(DRAWN)}")
    if RANKS in how and (config.ranks is None or method not in METHODS or not METHODS[method].by_layer):
        raise ValueError(f"method {label!r}: +ranks is for lowrank, compact, lora and relora, with a file of --ranks")
    values = search.common(Tuning, config, VARIES) | {"runs_dir": config.runs_dir / "cells", "quiet": True}
    forward = method in ZEROTH_ORDER
    steps, sequences = (config.forward_steps, config.forward_sequences) if forward else (config.steps, config.sequences)
    if forward:
        values |= {"warmup": 0.0, "final_lr": 1.0}
    values |= {"steps": steps, "sequences": sequences, "tests": 1, "seed": TUNING_SEED, **({"law": law} if law else {})}
    values |= {HOW[word]: True for word in how if word != RANKS} | ({"ranks": config.ranks} if RANKS in how else {})
    return Tuning(method=method, lr=lr, **values)


def first(config: Config, label: str) -> list[float]:
    """The three learning rates that the search begins with: around AdamW's gentle one, as much larger as the method's own in pre-training is."""
    method = label.split("+")[0].partition(":")[0]
    if method in ZEROTH_ORDER:
        start = FORWARD if config.lr is None else config.lr / 10
    else:
        start = (GENTLE if config.lr is None else config.lr) * search.start(method) / search.USUAL
    return search.around(start)
