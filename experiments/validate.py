"""Do the laws and estimators do what theory says? On synthetic matrices, on a small LLaMA in training, and on a pretrained model.

``model = synthetic``: every law's moments, and the error of the estimators built on it, by ``check_law`` and ``check_estimator``.

``model = tiny`` or ``smollm2``: the stochastic gradients of every linear layer over N mini-batches; predicted against measured mean squared
error of every law at several r/n, per layer and summed over the model, and the order of the laws put to the test.

    lowrank validate
    lowrank validate --law haar_stiefel spectral --shapes 12x20 --ratio 0.25
    lowrank validate --model tiny --steps 300
    lowrank validate --model smollm2 --draws 64
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from estimators import LAWS
from experiments import runs
from experiments.validation import layerwise, synthetic
from experiments.validation.checks import check_estimator, check_law
from experiments.validation.verdict import Check, Verdict

__all__ = ["Check", "Config", "Verdict", "check_estimator", "check_law", "main"]


DEFAULTS: dict[str, dict[str, Any]] = {  # what a model of that size affords on two cores
    "synthetic": {"sequences": 8, "draws": 512, "layer_resolution": 1.0, "model_resolution": 0.1},
    "tiny": {"sequences": 8, "draws": 512, "layer_resolution": 0.5, "model_resolution": 0.1},
    "smollm2": {"sequences": 2, "draws": 16, "layer_resolution": 10.0, "model_resolution": 0.5},
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Predicted against measured moments and errors of every law."""

    model: Literal["synthetic", "tiny", "smollm2"] = "synthetic"
    """Where the gradients come from: random matrices, a small LLaMA in training, or the pretrained SmolLM2-135M."""
    law: tuple[str, ...] = tuple(LAWS)
    """Laws to test, names from LAWS."""
    keep: tuple[float, ...] = (0.25,)
    """Also test sketched forms of the spectral law that keep these fractions k/n of the directions."""
    ratio: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
    """Ranks as fractions r/n of each layer's columns."""
    c: float = 1.0
    """Isotropy constant: E[VVᵀ] = cI."""
    seed: int = 0
    """Seed of everything random."""
    shapes: tuple[str, ...] = ("12x20", "24x16")
    """Synthetic: rows x columns."""
    spectra: tuple[str, ...] = ("power", "low_rank")
    """Synthetic: decay of the singular values, of flat, power, exponential, low_rank."""
    noise: float = 1.0
    """Synthetic: gradient noise tr Σ_ξ over ‖g‖²."""
    resolution: float = 0.01
    """Synthetic: relative defect in scale that every check must be able to see."""
    batches: int = 64
    """Real gradients: number N of mini-batches."""
    sequences: int | None = None
    """Real gradients: sequences in a mini-batch; None: 8 for tiny, 2 for smollm2."""
    length: int = 128
    """Real gradients: tokens in a sequence."""
    draws: int | None = None
    """Real gradients: draws per layer, law and rank; None: 512 for tiny, 16 for smollm2."""
    layer_resolution: float | None = None
    """Real gradients: relative defect in the error of one layer that must be visible; None: 0.5 for tiny, 10 for smollm2."""
    model_resolution: float | None = None
    """Real gradients: the same for the error summed over all layers ; None: 0.1 for tiny, 0.5 for smollm2."""
    steps: int = 300
    """Tiny: training steps before the gradients are taken."""
    lr: float = 3e-3
    """Tiny: peak learning rate of AdamW in those steps."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        for name in DEFAULTS[self.model]:
            object.__setattr__(self, name, self.affordable(name))
        for name in ("law", "ratio", "shapes", "spectra"):
            if not getattr(self, name):
                raise ValueError(f"{name} needs at least one value")
        unknown = [name for name in self.law if name not in LAWS]
        if unknown:
            raise ValueError(f"unknown law {unknown[0]!r}, known are {', '.join(LAWS)}")
        unknown = [name for name in self.spectra if name not in synthetic.SPECTRA]
        if unknown:
            raise ValueError(f"unknown spectrum {unknown[0]!r}, known are {', '.join(synthetic.SPECTRA)}")
        for shape in self.shapes:
            synthetic.shape_of(shape)
        for name in ("ratio", "keep"):
            for value in getattr(self, name):
                if not 0 < value <= 1:
                    raise ValueError(f"{name} is a fraction of n and must be in (0, 1], got {value}")
        for name in ("c", "noise", "resolution", "layer_resolution", "model_resolution", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name, least in (("batches", 2), ("sequences", 1), ("length", 2), ("draws", 2), ("steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def affordable(self, name: str) -> Any:
        """The value of a field whose default depends on the model."""
        value = getattr(self, name)
        return DEFAULTS[self.model][name] if value is None else value


PRESETS = {
    "smoke": Config(
        ratio=(0.25,), shapes=("4x6",), spectra=("power",), resolution=0.05, batches=4, sequences=2, length=32, draws=128, steps=3,
        layer_resolution=20.0, model_resolution=20.0,
    ),
}  # fmt: skip


def main(config: Config) -> runs.Run:
    """Fill and return the run directory."""
    run = runs.start("validate", config.model, config)
    if run.done:
        return run
    if config.model == "synthetic":
        synthetic.validate(config, run)
    else:
        layerwise.validate(config, run)
    run.finish()
    return run
