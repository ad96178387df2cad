"""The optimizers whose state lives in a frame, and their neighbours: what each keeps, what it does to the gradient on its way, and what comes out.

``state``: bytes of live state tensors a matrix, beside the formula of theory/optimizer_state.py. ``path``: what of a mini-batch gradient reaches the
weight but for the inner rule, against the true gradient g: alignment ⟨E[X], g⟩/‖g‖² with what the method claims of it, squared bias, variance and
mean squared error over ‖g‖². ``update``: what the weight gets after the nonlinearity, in the last of a period's steps: the cosine of its mean with g
and with AdamW's mean update on the same gradients, for methods whose nonlinearity makes singular values equal also with Muon's, its length beside
AdamW's, and its noise.

Gradients are synthetic, or those of the layers of one block of a LLaMA in training (tiny) or of a trained one (smollm2): --batches mini-batches are
the population, and their mean is g. Frames were chosen by the first gradient of a period and have aged since; experiments/validation/replicas.py.

    lowrank optimizers
    lowrank optimizers tiny
    lowrank optimizers smollm2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from estimators import keyed
from estimators.measure import jackknife
from experiments import allowed, runs
from experiments.validation import replicas
from experiments.validation.block import gradients_of_a_block
from experiments.validation.replicas import LR, Pair, Replicas, Source
from experiments.validation.travelling import FIRST, HOOKS, travelling
from optimizers import OPTIMIZERS, Subspace
from theory import optimizer_state

ORTHOGONAL = ("muon", "trion", "dion", "mofasgd", "gum")  # their nonlinearity on whole gradients is Muon's, the others' AdamW's
BY_SHARE = ("frugal", "lisa", "badam")  # a share of the matrices has its turn; the others' share is that of the directions
MATRICES = replicas.TOGETHER  # of one shape, so that a quarter of them can have their turn
DRAWS = 16 * replicas.TOGETHER  # groups of the jackknife, each of whole turns
# what the mean of the path is of g, at r over the smaller dimension; APOLLO's path is the gradient itself
CLAIMS: dict[str, Callable[[float], float]] = {
    "adamw": lambda _: 1.0,
    "golore": lambda ratio: ratio,
    "flora": lambda _: 1.0,
    "frugal": lambda ratio: ratio,
    "plumage": lambda _: 1.0,
    "spectral_adam": lambda _: 1.0,
    "grass_sampled": lambda _: 1.0,
    "rso": lambda _: 1.0,
    "foam": lambda _: 1.0,
    "muon": lambda _: 1.0,
    "gum": lambda _: 1.0,
    "lisa": lambda ratio: ratio,
    "badam": lambda ratio: ratio,
    "lomo": lambda _: 1.0,
    "adalomo": lambda _: 1.0,
    "law_hook": lambda _: 1.0,
}


class AdamW(Subspace):
    """Full AdamW on the same loop, to compare with."""

    def rule(self, group: dict[str, Any]) -> Any:
        return self.rule_of({**group, "rank": None})


ALL: dict[str, type[Subspace]] = {"adamw": AdamW, **OPTIMIZERS, **dict.fromkeys(HOOKS, AdamW)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """State, gradient path and update of every optimizer in a frame."""

    method: tuple[str, ...] = tuple(ALL)
    """Which: adamw, the names of the registry, and AdamW after a communication hook."""
    shape: tuple[int, int] = (512, 1376)
    """Rows and columns of the matrix whose state is counted."""
    rank: int = 128
    """r of the matrix whose state is counted."""
    model: Literal["synthetic", "tiny", "smollm2"] = "synthetic"
    """Where gradients come from: random matrices, a small LLaMA in training, or the pretrained SmolLM2-135M."""
    m: int = 24
    """Synthetic: rows of the matrix that is measured."""
    n: int = 32
    """Synthetic: columns of the matrix that is measured, at least m."""
    ratio: float = 0.25
    """r of the matrices that are measured, over their smaller dimension."""
    noise: float = 1.0
    """Synthetic: gradient noise E‖Ĝ − g‖² over ‖g‖²."""
    batches: int = 64
    """Real gradients: mini-batches of the population."""
    sequences: int = 8
    """Real gradients: sequences in a mini-batch."""
    length: int = 128
    """Real gradients: tokens in a sequence."""
    steps: int = 300
    """Tiny: training steps before the gradients are taken."""
    period: int = 10
    """Steps of a replica: its frame is chosen at the first and measured at the last."""
    draws: int = 1024
    """Replicas of each method, a multiple of 64."""
    seed: int = 0
    """Seed of gradients and draws."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        for name in self.method:
            if name not in ALL:
                raise ValueError(f"unknown method {name!r}, known are {', '.join(ALL)}")
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is a fraction of the smaller dimension and must be in (0, 1), got {self.ratio}")
        if not 0 < self.noise < float("inf"):
            raise ValueError(f"noise must be positive and finite, got {self.noise}")
        allowed.at_least(self, 1, "shape", "rank", "m", "period", "sequences")
        allowed.at_least(self, self.m, "n")
        allowed.at_least(self, 2, "batches", "length")
        allowed.at_least(self, 0, "steps")
        if self.model not in ("synthetic", "tiny", "smollm2"):
            raise ValueError(f"unknown model {self.model!r}, known are synthetic, tiny, smollm2")
        if self.draws < 1 or self.draws % DRAWS:
            raise ValueError(f"draws must be a multiple of {DRAWS}, got {self.draws}")


PRESETS = {
    "synthetic": Config(),
    "tiny": Config(model="tiny", draws=256),
    "smollm2": Config(model="smollm2", sequences=2, batches=32, draws=64, period=5),
}


def main(config: Config) -> runs.Run:
    """Rows ``state``, one a method, ``path`` and ``update``, one a method and matrix, ``promise``, one a claim; returns the run."""
    run = runs.start("optimizers", f"{config.m}x{config.n}" if config.model == "synthetic" else config.model, config)
    if run.done:
        return run
    run.renew()
    with runs.progress(0, "optimizers", config.quiet) as bar:
        for name in config.method:
            run.log(_state(config, name))
        paths: dict[str, list[dict[str, Any]]] = {name: [] for name in config.method}
        for source in _sources(config, run):
            plain = _measured(config, "adamw", source)
            orthogonal = _measured(config, "muon", source) if set(config.method) & set(ORTHOGONAL) else plain
            for name in config.method:
                bar.set_postfix_str(f"{source.name} {name}")
                pair = {"adamw": plain, "muon": orthogonal}.get(name) or _measured(config, name, source)
                paths[name].append(_path(config, name, source, pair))
                run.log(paths[name][-1], _update(name, source, pair, plain, orthogonal if name in ORTHOGONAL else None))
                bar.update()
        run.log(*(_promise(rows) for name, rows in paths.items() if name in CLAIMS))
    run.finish()
    return run


def _sources(config: Config, run: runs.Run) -> Iterator[Source]:
    if config.model == "synthetic":
        yield replicas.gaussian(config.m, config.n, config.noise, config.seed)
        return
    for name, gradients in gradients_of_a_block(config, run):
        yield replicas.population(name, gradients)


def _measured(config: Config, name: str, source: Source) -> Pair:
    rank = max(1, round(config.ratio * min(source.g.shape)))
    return replicas.measure(Replicas(ALL[name], rank, config.ratio, config.period, config.seed, _hook(name)), source, config.draws)


def _hook(name: str) -> str | None:
    return name if name in HOOKS else None


def _state(config: Config, name: str) -> dict[str, Any]:
    """Of as many equal matrices as are needed for one of them to have its turn."""
    formula = optimizer_state.FORMULAS[name]
    parameters = [nn.Parameter(torch.zeros(config.shape)) for _ in range(MATRICES)]
    generator = keyed.generator(config.seed, "state", 0)
    kind = ALL[name]
    rank = formula.share if name == "frugal" else config.rank  # of the matrices, those that have their turn
    optimizer = kind(parameters, LR, seed=config.seed, **kind.takes(rank=rank, layers=1, freeze=False))
    beside = 0
    with travelling(_hook(name), parameters, config.rank, config.seed) as give:
        for _ in range(FIRST + 1):
            beside = give(torch.randn(MATRICES, *config.shape, generator=generator))
            optimizer.step()
    measured = (optimizer.state_bytes() + beside) / MATRICES
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


def _claim(config: Config, name: str, source: Source) -> float | None:
    small = min(source.g.shape)
    ratio = config.ratio if name in BY_SHARE else max(1, round(config.ratio * small)) / small
    return CLAIMS[name](ratio) if name in CLAIMS else None


def _path(config: Config, name: str, source: Source, pair: Pair) -> dict[str, Any]:
    measured = pair.path
    assert measured.bias is not None and measured.variance is not None
    signal = float(source.g.double().square().sum())
    row = {"kind": "path", "method": name, "layer": source.name, "signal": signal, "claim": _claim(config, name, source)}
    assert measured.group_means is not None
    along = (measured.group_means * source.g.double()).sum((-2, -1)).cpu() / signal
    alignment = jackknife(lambda keep: float(along[keep].mean()), len(along))  # replicas of a group share their turns, groups nothing
    row |= {"alignment": alignment.value, "alignment_error": alignment.standard_error}
    for key, found in (("bias2", measured.bias), ("variance", measured.variance), ("mse", measured.mse)):
        row |= {key: found.value / signal, f"{key}_error": found.standard_error / signal}
    return row


def _promise(paths: list[dict[str, Any]]) -> dict[str, Any]:
    """The claim of a method and its path, of all layers together, over Σ‖g‖². It holds if it is met, and if missing it altogether would be seen."""
    total = sum(row["signal"] for row in paths)
    mean = {key: sum(row["signal"] * row[key] for row in paths) / total for key in ("claim", "alignment", "bias2")}
    error = {key: sum((row["signal"] * row[f"{key}_error"]) ** 2 for row in paths) ** 0.5 / total for key in ("alignment", "bias2")}
    z = (mean["alignment"] - mean["claim"]) / error["alignment"]
    everywhere = mean["claim"] != 1.0 or abs(mean["bias2"]) < 5 * error["bias2"]  # in every direction, not along g alone
    resolution = 8 * error["alignment"] / mean["claim"]
    row = {"kind": "promise", "method": paths[0]["method"], "claim": mean["claim"], "alignment": mean["alignment"], "z": z}
    return row | {"resolution": resolution, "holds": abs(z) < 5 and everywhere and resolution <= 1}


def _update(name: str, source: Source, pair: Pair, plain: Pair, orthogonal: Pair | None) -> dict[str, Any]:
    """Cosines, length and noise of the mean update, with jackknife errors over groups of draws, which every method has had the same gradients in.

    Products of means are of different groups, which are independent: those of one would add their noise to its length.
    """
    mine, theirs = pair.update, plain.update
    assert mine.group_means is not None and theirs.group_means is not None and mine.group_mse is not None
    g, deviation = source.g.double(), mine.group_mse
    A, B = mine.group_means.flatten(1), theirs.group_means.flatten(1)
    defects = A - g.flatten()
    along, length = (A @ g.flatten()).cpu(), float(g.norm())
    own, both, full, gram = ((x @ y.T).cpu() for x, y in ((A, A), (A, B), (B, B), (defects, defects)))

    def apart(products: Tensor, keep: Tensor) -> float:
        some = products[keep][:, keep]
        return float((some.sum() - some.diagonal().sum()) / (len(keep) * (len(keep) - 1)))

    norm = lambda products, keep: max(0.0, apart(products, keep)) ** 0.5  # noqa: E731
    over = lambda value, by: value / by if by > 0 else float("nan")  # noqa: E731
    statistics: dict[str, Callable[[Tensor], float]] = {
        "cosine_with_gradient": lambda keep: over(float(along[keep].mean()), norm(own, keep) * length),
        "cosine_with_adamw": lambda keep: over(apart(both, keep), norm(own, keep) * norm(full, keep)),
        "length_over_adamw": lambda keep: over(norm(own, keep), norm(full, keep)),
        "noise_over_mean": lambda keep: over(max(0.0, float(deviation[keep].mean()) - apart(gram, keep)) ** 0.5, norm(own, keep)),
    }
    if orthogonal is not None:
        assert orthogonal.update.group_means is not None
        C = orthogonal.update.group_means.flatten(1)
        with_muon, muon = (A @ C.T).cpu(), (C @ C.T).cpu()
        statistics["cosine_with_muon"] = lambda keep: over(apart(with_muon, keep), norm(own, keep) * norm(muon, keep))
    row: dict[str, Any] = {"kind": "update", "method": name, "layer": source.name}
    for key, statistic in statistics.items():
        found = jackknife(statistic, len(A))
        row |= {key: found.value, f"{key}_error": found.standard_error}
    return row
