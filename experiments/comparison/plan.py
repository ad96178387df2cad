"""Who is compared, and the training runs that takes: the trials of each learning rate, and the runs of every seed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from experiments import pretrain
from experiments.comparison import search
from experiments.comparison.outcomes import GIVEN, Contender
from experiments.training import gradinit
from experiments.training.methods import METHODS, Method

if TYPE_CHECKING:
    from experiments.compare import Config

SAID = {"second_moment": "{}", "init": "{}", "coupled": "α={:g}"}  # in a label, where there are several
TUNING_SEED = 1000  # none of the seeds that are compared


def contenders(config: Config) -> list[Contender]:
    """Laws first, then baselines; full AdamW has neither rank nor K."""
    found: dict[Contender, None] = {}

    def add(base: Contender) -> None:
        for given in product(*(getattr(config, name) if _takes(base.method, name) else (plain,) for name, plain in GIVEN.items())):
            more = dict(zip(GIVEN, given, strict=True))
            told = [
                SAID[name].format(value) for name, value in more.items() if len(getattr(config, name)) > 1 and _takes(base.method, name)
            ]
            found[replace(base, label=" ".join([base.label, *told]), **more)] = None

    several = {name for name in ("rank", "refresh_every", "c") if len(getattr(config, name)) > 1} - ({"c"} if config.tune_c else set())
    for law, rank, period, c in product(config.law, config.rank, config.refresh_every, (None,) if config.tune_c else config.c):
        label = law + (f" r={rank:g}" if "rank" in several else "") + (f" K={period}" if "refresh_every" in several else "")
        label += f" c={c}" if "c" in several else ""
        add(Contender(label, "lowrank", law, whole(rank), period, rank if c == "r/n" else c))
    for method, rank in product(config.baselines, config.rank):
        needs = METHODS[method].needs
        label = method + (f" r={rank:g}" if "rank" in several and "rank" in needs else "")
        period = {"relora": config.merge_every}.get(method, config.refresh_every[0]) if "refresh_every" in needs else None
        add(Contender(label, method, None, whole(rank) if "rank" in needs else None, period, None))
    return list(found)


def _takes(method: str, given: str) -> bool:
    """Whether a method can be given this."""
    kind = METHODS[method]
    if given == "second_moment":
        return given in kind.needs
    return gradinit.knows(kind) if given == "init" else kind.pairs is not Method.pairs


def whole(rank: float) -> float:
    """A rank of 1 or more as the integer that it is."""
    return int(rank) if rank >= 1 else rank


def trials(config: Config, contender: Contender) -> list[pretrain.Config]:
    """The tuning runs of one contender: as many as any other's, if all second knobs have as many values."""
    base = replace(
        pretrain.PRESETS[config.model],
        method=contender.method,
        **{name: value for name in ("law", "rank", "refresh_every", "c") if (value := getattr(contender, name)) is not None},
        **{name: getattr(contender, name) for name in GIVEN},
        state=config.state,
        steps=config.tune_steps,
        sequences=config.sequences,
        accumulate=1,
        length=config.length,
        seed=TUNING_SEED,
        data=config.data,
        precision=config.precision,
        optimizer=config.optimizer,
        other_lr=config.other_lr,
        weight_decay=config.weight_decay,
        device=config.device,
        measure_every=0,
        checkpoint_every=0,
        eval_tokens=config.length,
        save_model=False,
        quiet=True,
        runs_dir=config.runs_dir / "cells",
    )
    if config.lift_every is not None:
        base = replace(base, lift_every=config.lift_every)
    if "layers" in METHODS[contender.method].needs:
        base = replace(base, layers=config.layers)
    if config.search == "climb":
        return [replace(base, lr=lr) for lr in search.first(contender.method)]
    needs = METHODS[contender.method].needs
    if contender.c is not None:
        return [replace(base, lr=lr) for lr in config.lr]
    for knob in ("c", "lora_scale"):
        if knob in needs:
            values = [contender.rank if value == "r/n" else value for value in getattr(config, knob)]
            return [replace(base, lr=lr, **{knob: value}) for lr, value in product(config.lr, values)]
    rates = np.geomspace(min(config.lr), max(config.lr), len(config.lr) * max(len(config.c), len(config.lora_scale)))
    return [replace(base, lr=float(f"{rate:.3g}")) for rate in rates]


def compared(config: Config, trial: pretrain.Config, seed: int) -> pretrain.Config:
    """The run of one seed with what a trial chose."""
    return replace(
        trial,
        seed=seed,
        steps=config.steps,
        eval_every=max(1, config.steps // config.evaluations),
        eval_tokens=config.eval_tokens,
        measure_every=max(1, config.steps // 4),
        checkpoint_every=100,
        keep_checkpoints=1,
    )
