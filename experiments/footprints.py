"""Bytes of one training step by category, of every method: run on fake tensors, so that no hardware is needed for any size of model.

    lowrank memory measure roberta-large
    lowrank memory measure 7b --method adamw haar_stiefel
    lowrank memory measure roberta-tiny --real

A step is made with batch and options as stated and every storage is followed (experiments/training/faked.py). What is reported is the largest sum
of a plain step and what it was made of; and the largest sum of the steps in which V, a projector or a turn changes. ``--real`` also runs the steps
on real tensors and compares with the allocator's own peak.

weights: parameters, trained or not, with factors and codes that stand for them; gradients: of parameters; states: moments and other memory of
optimizers; activations: what the forward pass leaves for the backward pass; projector: V, frames, known directions, and residuals that are
fed back; temporaries: all else, recomputed activations and those of a pass without gradients among it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from estimators import LAWS
from estimators.linear import LowRankLinear
from experiments import pretrain, runs
from experiments.training import classifiers, footprint, models
from experiments.training.faked import CATEGORIES, Ledger, faked
from experiments.training.methods import METHODS, Compressed, LowRank, Projected
from experiments.training.stepper import ForwardStepper, FusedStepper, Stepper, Task, language
from optimizers import ZEROTH_ORDER, Subspace

TOLERANCE = 0.1  # of the allocator's peak
PLAIN, CHANGE = "plain", "change"  # steps that are watched: nothing or everything that changes once in K changes
FULL = "adamw"  # whom all others are compared with
RECOMPUTED = "adamw recomputed"  # whom those that recompute their activations anyway are compared with
TARGETS = {  # name → at most so much of the peak of whom, on RoBERTa-large
    "lowrank_lr": (0.20, FULL),
    "haar_stiefel fused": (0.45, FULL),
    "haar_stiefel fused recomputed": (0.45, FULL),
    "gradlite fused recomputed": (0.50, RECOMPUTED),
    "gradlite fused recomputed 8bit": (0.50, RECOMPUTED),
}
TARGETED = "roberta-large"
RESIDUALS = ("error", "error_scale")  # states that are neither a frame nor a moment

CONTENDERS: dict[str, dict[str, Any]] = {  # name → settings of the training; "fused": updates inside the backward pass
    "adamw": {"method": "adamw"},
    "adamw fused": {"method": "adamw", "fused": True},
    "adamw recomputed": {"method": "adamw", "checkpoint_activations": True},
    "lora": {"method": "lora"},
    "relora": {"method": "relora"},
    "haar_stiefel": {"method": "lowrank", "law": "haar_stiefel"},
    "haar_stiefel fused": {"method": "lowrank", "law": "haar_stiefel", "fused": True},
    "haar_stiefel fused recomputed": {"method": "lowrank", "law": "haar_stiefel", "fused": True, "checkpoint_activations": True},
    "spectral": {"method": "lowrank", "law": "spectral"},
    "tokens": {"method": "tokens", "law": "coordinate"},
    "tokens haar_stiefel": {"method": "tokens", "law": "haar_stiefel"},
    "galore fused": {"method": "galore", "fused": True},
    "lomo fused": {"method": "lomo", "fused": True},
    "lomo fused recomputed": {"method": "lomo", "fused": True, "checkpoint_activations": True},
    "adalomo fused": {"method": "adalomo", "fused": True},
    "gradlite fused": {"method": "gradlite", "fused": True},
    "gradlite fused recomputed": {"method": "gradlite", "fused": True, "checkpoint_activations": True},
    "gradlite fused recomputed 8bit": {"method": "gradlite", "fused": True, "checkpoint_activations": True, "residual": "8bit"},
    **{name: {"method": name} for name in METHODS if name not in ("adamw", "lora", "relora", "lowrank", "tokens")},
    **{name: {"kind": kind} for name, kind in ZEROTH_ORDER.items()},
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Bytes of a training step by category, of every method, on fake tensors."""

    model: str = "roberta-large"
    """roberta-large, roberta-tiny (two-class classifiers), or a LLaMA preset: 83k, 267k, 935k, tiny, 9m, 20m, 60m, 100m, 130m, 350m, 1b, 7b, 70b."""
    method: tuple[str, ...] = ()
    """Methods, by the names of the table; all if none are named."""
    rank: int | float = 0.125
    """r of LowRank-IPA, LoRA and the optimizers with a frame; a fraction in (0, 1) is r/n. Methods without gradients have their own defaults."""
    sequences: int | None = None
    """Sequences of the batch; None: 64 for classifiers, for LLaMA a micro-batch of lowrank pretrain MODEL."""
    length: int | None = None
    """Tokens a sequence; None: 128 for classifiers, for LLaMA as in lowrank pretrain MODEL."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32; bf16 (products in bfloat16, weights float32)."""
    real: bool = False
    """Also make the steps with real tensors and compare the peak with the allocator's."""
    operations: int = 1_000_000
    """Operations of a method's steps; one that needs more is not run, and says so."""
    device: str = "cpu"
    """cpu or cuda: whose operations the fake tensors stand for, and where real ones are."""
    seed: int = 0
    """Seed of weights and draws."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        if self.model not in classifiers.PRESETS and self.model not in models.PRESETS:
            raise ValueError(f"unknown model {self.model!r}, known are {', '.join((*classifiers.PRESETS, *models.PRESETS))}")
        for name in self.method:
            if name not in CONTENDERS:
                raise ValueError(f"unknown method {name!r}, known are {', '.join(CONTENDERS)}")
        for name in ("sequences", "operations"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        settings(self)


def settings(config: Config, **fields: Any) -> pretrain.Config:
    """As ``lowrank pretrain`` has them. Of a classifier the model field is not read: its task is given."""
    if config.model in classifiers.PRESETS:
        preset, sequences, length = pretrain.Config(model="350m"), 64, 128
        limit = classifiers.PRESETS[config.model]["max_position_embeddings"] - 2
        if config.length is not None and not 2 <= config.length <= limit:
            raise ValueError(f"length must be between 2 and the model's {limit}, got {config.length}")
    else:
        preset = pretrain.PRESETS[config.model]
        sequences, length = preset.sequences // preset.accumulate, preset.length
    batch = {"sequences": config.sequences or sequences, "length": config.length or length, "accumulate": 1}
    same = {name: getattr(config, name) for name in ("rank", "precision", "seed", "device")}
    return replace(preset, **batch, **same, measure_every=0, eval_tokens=max(2, batch["length"]), **fields)


PRESETS = {name: Config(model=name) for name in (*classifiers.PRESETS, *models.PRESETS)}


def main(config: Config) -> runs.Run:
    """Make the steps of every method and return the run directory."""
    made = settings(config)
    said = [f"{made.sequences}x{made.length}"] if config.sequences or config.length else []
    said += [config.precision] if config.precision != "fp32" else []
    run = runs.start("memory", "-".join(["measure", config.model, *said, *(["real"] if config.real else [])]), config)
    if run.done:
        return run
    device = runs.device(config.device)
    done = {row["name"] for row in run.rows() if row["kind"] in ("footprint", "not_run")}
    chosen = [name for name in config.method or CONTENDERS if name not in done]
    with runs.progress(len(chosen), "memory measure", config.quiet) as bar:
        for name in chosen:
            bar.set_postfix_str(name)
            try:
                run.log(*measured(config, name, device))
            except ValueError as refused:  # what it cannot do with this rank, or within the operations
                run.log({"kind": "not_run", "model": config.model, "name": name, "why": str(refused)})
            bar.update()
    run.log(*targets([row for row in run.rows() if row["kind"] == "footprint"]))
    run.finish()
    return run


def measured(config: Config, name: str, device: torch.device) -> list[dict[str, Any]]:
    """A row of kind footprint; with ``real`` also one of kind agreement for each part. Raises ``ValueError`` for what a method refuses."""
    made = settings(config)
    ledger = faked_steps(config, name, device)
    held = {step: ledger.peak(step) for step in ledger.parts}
    said = {"model": config.model, "name": name, "sequences": made.sequences, "length": made.length, "precision": config.precision}
    totals = {step: sum(sizes.values()) for step, sizes in held.items()}
    rows: list[dict[str, Any]] = [{"kind": "footprint", **said, **held[PLAIN], "total": totals[PLAIN], "change": totals.get(CHANGE)}]
    if config.real:
        peaks = real_steps(config, name, device)
        for step, fake in totals.items():
            real = peaks[step]
            sizes = {"fake": fake, "allocated": real, "ratio": fake / real, "holds": abs(fake / real - 1) <= TOLERANCE}
            rows.append({"kind": "agreement", **said, "step": step, "device": device.type, **sizes})
    return rows


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised of RoBERTa-large, and where it does not hold which categories are the reason."""
    peaks = {row["name"]: row for row in rows if row["model"] == TARGETED}
    found = []
    for name, (target, reference) in TARGETS.items():
        if name in peaks and reference in peaks:
            mine, full = peaks[name], peaks[reference]
            ratio = mine["total"] / full["total"]
            parts = sorted(((mine[category] / full["total"], category) for category in CATEGORIES), reverse=True)
            why = ", ".join(f"{category} {share:.2f}×" for share, category in parts if share >= 0.005)
            sizes = {"peak": mine["total"], "full": full["total"], "ratio": ratio, "target": target, "holds": ratio <= target}
            found.append({"kind": "target", "model": TARGETED, "name": name, "reference": reference, **sizes, "of": why})
    return found


# the steps


def faked_steps(config: Config, name: str, device: torch.device) -> Ledger:
    """All steps on fake tensors, in a ledger with the parts PLAIN and, if anything changes, CHANGE."""
    return followed(lambda ledger: side(config, name, device, ledger), config.operations)


def followed(make: Callable[[Ledger], Stepper | ForwardStepper], operations: int) -> Ledger:
    """The steps of what ``make`` builds on fake tensors, told when a forward pass ends. ``ValueError`` after ``operations``."""
    with faked(), Ledger(limit=operations) as ledger:
        made = make(ledger)
        ledger.owned = lambda: owned(made)
        for p in made.task.model.parameters():
            if p.requires_grad:
                p.register_hook(lambda G: ledger.name(G, "gradients"))
        walk(made, ledger.part)
    return ledger


def real_steps(config: Config, name: str, device: torch.device) -> dict[str, int]:
    """The allocator's peak of the same parts, bytes."""
    with footprint.watching(device) as watch:
        walk(side(config, name, device), watch.part)
    return {part: stretch.peak for part, stretch in watch.parts.items()}


def walk(made: Stepper | ForwardStepper, part: Callable[[str], Any]) -> None:
    """A plain step with all states there, and one in which V, a frame or a turn changes, if one does: not where the method does not read K, nor
    without gradients, where V is drawn at every use."""
    if isinstance(made, Stepper):
        for _ in range(max(1, made.settings.refresh_every - 2)):
            made.step()
    with part(PLAIN):
        made.step()
    if isinstance(made, Stepper) and "refresh_every" in made.method.needs:
        with part(CHANGE):
            made.step()


def period(method: str, law: str = "") -> int:
    """K for the steps of ``walk``: optimizers change their frames in the step that begins a period, LowRank-IPA its V in the one that ends it, and a
    fitted law also after the very first, where it drops its states."""
    if issubclass(METHODS[method], Projected):
        return 2
    return 4 if law and LAWS[law].fitted else 3


def side(config: Config, name: str, device: torch.device, ledger: Ledger | None = None) -> Stepper | ForwardStepper:
    """The model under one method; ``ledger`` is told when a forward pass is over."""
    fields = dict(CONTENDERS[name])
    kind, fused = fields.pop("kind", None), fields.pop("fused", False)
    if kind is None:
        fields["refresh_every"] = period(fields["method"], fields.get("law", ""))
    made = settings(config, **fields)
    if config.model in classifiers.PRESETS:
        task = classifiers.classification(config.model, made.sequences, made.length, made.seed, made.precision, device)
    else:
        task = language(made, device)
    if made.checkpoint_activations:
        task.model.gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]
    if kind is not None:
        return ForwardStepper(kind, task)
    if ledger is not None:
        task = Task(task.model, lambda loss=task.loss: kept(loss(), ledger))
    task.model.train()
    return (FusedStepper if fused else Stepper)(made, device, task)


def kept(loss: Tensor, ledger: Ledger) -> Tensor:
    """The loss, after a forward pass is over: what lives now waits for the backward pass."""
    ledger.keeps("activations")
    return loss


def owned(made: Stepper | ForwardStepper) -> Iterator[tuple[str, Tensor]]:
    """What stands still between operations, by category."""
    for module in made.task.model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            yield "projector" if isinstance(module, LowRankLinear) and name == "V" else "weights", buffer
    for p in made.task.model.parameters():
        yield "weights", p
        if p.grad is not None:
            yield "gradients", p.grad
    for optimizer in made.optimizers:
        yield from _states(optimizer)
    if isinstance(made, Stepper) and isinstance(made.method, Compressed):
        keepers = (layer.keeper for layer in made.method.compression.layers.values())
        yield from (("projector", t) for keeper in keepers for t in keeper.state_dict().values() if isinstance(t, Tensor))
    if isinstance(made, Stepper) and isinstance(made.method, LowRank):
        conversion = made.method.conversion
        yield from (("weights", W) for W in conversion.writer.masters.values())
        fitting = conversion.fitting
        yield from (("projector", t) for known in (*fitting.known.values(), *fitting.pending.values()) for t in known)


def _states(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        kind = optimizer.rule_of(group).basis.frame if isinstance(optimizer, Subspace) else None
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            frame = kind.of(state) if kind is not None else None
            names = {*RESIDUALS, *(frame.tensors() if frame is not None else ())}
            for name, value in state.items():
                if isinstance(value, Tensor):
                    yield "projector" if name in names else "states", value


if __name__ == "__main__":
    from experiments import cli

    sys.exit(cli.main(["memory", "measure", *sys.argv[1:]]))
