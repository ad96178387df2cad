"""A sparse code that dies under plain descent and lives under the coupled step (theory/coupled.py, estimators/coupled.py): figure and sentence."""

from __future__ import annotations

import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from estimators.coupled import coupled
from experiments.pages.figures import style
from theory import coupled as exact

SIGMA, PENALTY, ETA = 1.0, 0.6, 0.05
START = (0.05, 0.4)  # x, a
THRESHOLD, STEPS = 0.25, 800
LOOKS = {"plain": ("#D55E00", "--"), "coupled": ("#0072B2", "-")}


def path(threshold: float) -> pd.DataFrame:
    """x, a and f(x, a) at steps 0 … ``STEPS``; ``threshold`` of the coupled step, 0 for plain proximal descent."""
    x, a = START
    points = [(x, a)]
    for _ in range(STEPS):
        x_, a_ = exact.descent(SIGMA, PENALTY, ETA, x, a)
        if threshold:
            old, new = (torch.tensor([[value]], dtype=torch.float64) for value in (x, x_))
            x_ = float(coupled(old, new, torch.tensor([[a]], dtype=torch.float64), threshold))
        x, a = x_, a_
        points.append((x, a))
    found = pd.DataFrame(points, columns=["x", "a"])
    return found.assign(loss=exact.loss(SIGMA, PENALTY, found.x.to_numpy(), found.a.to_numpy()))


def figure() -> Figure:
    """Code, atom and loss of both; vertical lines: bounds of theory for the death of the plain code and for the revival of the coupled one."""
    style()
    made, axes = plt.subplots(1, 3, figsize=(11.0, 3.2))
    paths = {"plain": path(0.0), "coupled": path(THRESHOLD)}
    for ax, (column, name) in zip(axes, {"x": "code x", "a": "atom a", "loss": "½(σ − xa)² + λ|x|"}.items(), strict=True):
        for label, found in paths.items():
            colour, dashes = LOOKS[label]
            ax.plot(1 + found.index, found[column], dashes, color=colour, label=label, linewidth=1.6)
        for bound, label in ((_vanish(), "plain"), (_revive(), "coupled")):
            ax.axvline(1 + bound, color=LOOKS[label][0], linestyle=":", linewidth=1.0)
        ax.set(xscale="log", xlabel="1 + step", title=name)
    axes[0].legend(frameon=False)
    made.tight_layout()
    return made


def markdown() -> str:
    """What happens, in numbers that are computed here."""
    plain, lives = path(0.0), path(THRESHOLD)
    died = int((plain.x == 0).to_numpy().argmax())
    grew = int((lives.x > START[0] * (1 + 1e-9)).to_numpy().argmax())
    return (
        f"½(σ − xa)² + λ|x| at σ = {SIGMA:g}, λ = {PENALTY:g}, η = {ETA:g} from x = {START[0]:g}, a = {START[1]:g}: under proximal descent "
        f"x is 0 from step {died} on (bound {_vanish()}), and the loss stays at {plain.loss.iloc[-1]:.3f}; the coupled step (α = {THRESHOLD:g}) "
        f"keeps x until a has grown, x grows from step {grew} on (bound {_revive() + 1}), and after {STEPS} steps the loss is "
        f"{lives.loss.iloc[-1]:.3f}."
    )


def _vanish() -> int:
    return exact.steps_to_vanish(SIGMA, PENALTY, ETA, *START)


def _revive() -> int:
    return exact.steps_to_revive(SIGMA, PENALTY, ETA, *START)
