"""The optimizers whose state lives in a frame: what each keeps, what it does to the gradient on its way, and what comes out of its update.

``state``: bytes of live state tensors a matrix, beside the formula of theory/optimizer_state.py. ``path``: what the inner rule's frame passes
on of a mini-batch gradient, lifted back, against the true gradient g: alignment ⟨E[X], g⟩/‖g‖² with what the method claims of it, squared
bias and variance over ‖g‖². ``update``: what the weight gets after the nonlinearity, in the last of a period's steps: the cosine of its mean
with g and with AdamW's mean update on the same gradients, its length beside AdamW's, and its noise.
Gradients are g + noise with a decaying spectrum, frames were chosen by the first gradient of a period and have aged since, and every draw is
a replica of its own with its own gradients. They are those of small learning rates: the law of the gradients does not move with the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from estimators import Measurement, keyed, measure_estimates
from experiments import runs
from optimizers import OPTIMIZERS, Subspace
from optimizers.buckets import stack
from optimizers.outputs import Context
from theory import optimizer_state

LR = 1e-3
BY_SHARE = ("frugal", "lisa", "badam")  # a share of the matrices has its turn; the others' share is that of the directions
MATRICES = 4  # of one shape, so that a quarter of them can have their turn
# what the mean of the path is of g, at r over the smaller dimension; APOLLO's path is the gradient itself
CLAIMS: dict[str, Callable[[float], float]] = {
    "adamw": lambda _: 1.0,
    "golore": lambda ratio: ratio,
    "flora": lambda _: 1.0,
    "frugal": lambda ratio: ratio,
    "plumage": lambda _: 1.0,
    "spectral_adam": lambda _: 1.0,
    "rso": lambda _: 1.0,
    "foam": lambda _: 1.0,
    "muon": lambda _: 1.0,
    "gum": lambda _: 1.0,
    "lisa": lambda ratio: ratio,
    "badam": lambda ratio: ratio,
}


class AdamW(Subspace):
    """Full AdamW on the same loop, to compare with."""

    def rule(self, group: dict[str, Any]) -> Any:
        return self.rule_of({**group, "rank": None})


ALL: dict[str, type[Subspace]] = {"adamw": AdamW, **OPTIMIZERS}


@dataclass(frozen=True, kw_only=True)
class Config:
    """State, gradient path and update of every optimizer in a frame."""

    method: tuple[str, ...] = tuple(ALL)
    """Which: adamw and the names of the registry."""
    shape: tuple[int, int] = (512, 1376)
    """Matrix whose state is counted."""
    rank: int = 128
    """r of that matrix."""
    m: int = 24
    """Rows of the matrix that is measured."""
    n: int = 32
    """Its columns, at least m."""
    ratio: float = 0.25
    """r/m of the measurement."""
    noise: float = 1.0
    """E‖Ĝ − g‖²/‖g‖²."""
    period: int = 10
    """Steps of a replica: its frame is chosen at the first and measured at the last."""
    draws: int = 1024
    """Replicas."""
    seed: int = 0
    """Of gradients and draws."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        for name in self.method:
            if name not in ALL:
                raise ValueError(f"unknown method {name!r}, known are {', '.join(ALL)}")
        if not 0 < self.ratio < 1 or not self.noise > 0:
            raise ValueError(f"ratio={self.ratio} must be in (0, 1) and noise={self.noise} positive")
        if min(*self.shape, self.rank, self.m, self.period) < 1 or self.n < self.m:
            raise ValueError("shape, rank, m and period must be at least 1, and n at least m")
        if self.draws < 32:
            raise ValueError(f"draws must be at least 32, got {self.draws}")


def main(config: Config) -> runs.Run:
    """Rows ``state``, ``path`` and ``update``, one a method; returns the run."""
    run = runs.start("optimizers", f"{config.m}x{config.n}", config)
    if run.done:
        return run
    run.renew()
    with runs.progress(2 * len(config.method) + 1, "optimizers", config.quiet) as bar:
        adamw = _measured(config, "adamw", 1).mean
        assert adamw is not None
        bar.update()
        for name in config.method:
            bar.set_postfix_str(name)
            run.log(_state(config, name), _path(config, name))
            bar.update()
            run.log(_update(config, name, adamw))
            bar.update()
    run.finish()
    return run


def _state(config: Config, name: str) -> dict[str, Any]:
    """Of as many equal matrices as are needed for one of them to have its turn."""
    formula = optimizer_state.FORMULAS[name]
    parameters = [nn.Parameter(torch.zeros(config.shape)) for _ in range(MATRICES)]
    generator = keyed.generator(config.seed, "state", 0)
    kind = ALL[name]
    rank = formula.share if name == "frugal" else config.rank  # of the matrices, those that have their turn
    optimizer = kind(parameters, LR, seed=config.seed, **kind.takes(rank=rank, layers=1, freeze=False))
    for _ in range(2):
        for p in parameters:
            p.grad = torch.randn(config.shape, generator=generator)
        optimizer.step()
    measured = optimizer.state_bytes() / MATRICES
    share = sum(state["rest"] for state in optimizer.state.values()) / MATRICES if name == "gum" else formula.share  # as the coins fell
    predicted = optimizer_state.state_bytes(name, *config.shape, config.rank, share)
    full = optimizer_state.state_bytes("adamw", *config.shape, config.rank)
    return {
        "kind": "state",
        "method": name,
        "formula": formula.text,
        "predicted_bytes": predicted,
        "state_bytes": measured,
        "over_adamw": optimizer_state.state_bytes(name, *config.shape, config.rank) / full,
        "holds": measured == predicted,
    }


def _gradient(config: Config) -> Tensor:
    """g: m×n with singular values 1, 1/2, 1/3, …, so that a quarter of them holds most of it."""
    generator = keyed.generator(config.seed, "gradient", 0)
    U, V = (torch.linalg.qr(torch.randn(k, config.m, generator=generator, dtype=torch.float64))[0] for k in (config.m, config.n))
    return (U / torch.arange(1, config.m + 1)) @ V.mT


def _replicas(config: Config, name: str, which: int) -> Callable[[int, torch.Generator], Tensor]:
    """What a number of replicas makes of its gradients at the end of a period: the path (0) or the update over the learning rate (1)."""
    g = _gradient(config)
    spread = (config.noise * float(g.square().sum()) / g.numel()) ** 0.5
    rank = max(1, round(config.ratio * config.m))
    start = torch.randn(g.shape, generator=keyed.generator(config.seed, "weights", 0), dtype=g.dtype)
    serial = iter(range(10**9))

    def draw(size: int, generator: torch.Generator) -> Tensor:
        first = next(serial) * config.draws
        named = [(f"{first + i}", nn.Parameter(start.clone())) for i in range(size)]
        parameters = [p for _, p in named]
        kind = ALL[name]
        options = kind.takes(every=config.period, rank=config.ratio if name == "frugal" else rank, order="random", layers=config.ratio)
        options |= kind.takes(freeze=False, precision="full")
        optimizer = kind(named, LR, seed=config.seed + first, foreach=True, **options)
        before, passed = torch.zeros(size, *g.shape), torch.zeros(size, *g.shape, dtype=g.dtype)

        def watch(names: tuple[str, ...], context: Context) -> None:
            places = [int(called) - first for called in names]
            passed[places] = _upright(context.path(_batch([parameters[i] for i in places], context.flipped)), context.flipped)

        for _ in range(config.period):
            passed.zero_()  # a matrix that has no turn passes nothing on
            noise = torch.randn(size, *g.shape, generator=generator, dtype=g.dtype)
            for p, N in zip(parameters, noise, strict=True):
                p.grad = g + spread * N
            before = torch.stack([p.detach() for p in parameters]).clone()
            optimizer.watch = watch
            optimizer.step()
        return (before - torch.stack([p.detach() for p in parameters])) / LR if which == 1 else passed

    return draw


def _batch(parameters: list[nn.Parameter], flipped: bool) -> Tensor:
    """Their gradients as the frame saw them."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return stack([G.mT if flipped else G for G in gradients])


def _upright(X: Tensor, flipped: bool) -> Tensor:
    return X.mT if flipped else X


def _measured(config: Config, name: str, which: int) -> Measurement:
    generator = keyed.generator(config.seed, f"{name}.{which}", 1)
    return measure_estimates(_replicas(config, name, which), _gradient(config), config.draws, generator=generator, budget_bytes=2**23)


def _path(config: Config, name: str) -> dict[str, Any]:
    measured = _measured(config, name, 0)
    assert measured.bias is not None and measured.variance is not None
    signal = float(_gradient(config).square().sum())
    rank = max(1, round(config.ratio * config.m))
    claim = CLAIMS[name](config.ratio if name in BY_SHARE else rank / config.m) if name in CLAIMS else None
    row = {"kind": "path", "method": name, "alignment": measured.alignment.value, "alignment_error": measured.alignment.standard_error}
    row |= {f"{key}{suffix}": value / signal for key, e in (("bias2", measured.bias), ("variance", measured.variance))
            for suffix, value in (("", e.value), ("_error", e.standard_error))}  # fmt: skip
    if claim is None:
        return row
    z = (measured.alignment.value - claim) / measured.alignment.standard_error
    unbiased = claim != 1.0 or abs(measured.bias.value) < 5 * measured.bias.standard_error  # in every direction, not along g alone
    return row | {"claim": claim, "z": z, "resolution": 8 * measured.alignment.standard_error, "holds": abs(z) < 5 and unbiased}


def _update(config: Config, name: str, adamw: Tensor) -> dict[str, Any]:
    measured = _measured(config, name, 1)
    assert measured.mean is not None and measured.variance is not None
    g, mean = _gradient(config), measured.mean
    cosine = lambda a, b: float((a * b).sum() / (a.norm() * b.norm()))  # noqa: E731
    return {
        "kind": "update",
        "method": name,
        "cosine_with_gradient": cosine(mean, g),
        "cosine_with_adamw": cosine(mean, adamw),
        "length_over_adamw": float(mean.norm() / adamw.norm()),
        "noise_over_mean": (measured.variance.value**0.5) / float(mean.norm()),
    }
