"""How fast and how small: one run measures the machine, then everything as ratios to a named peer, in pairs taken side by side.

``step``: one optimizer step of each method on the same batches, over that of full AdamW; the lift is part of it, redraws are timed apart and
added at their share 1/K. ``memory``: bytes that the linear layers of the blocks save for the backward pass, each storage counted once, over
those of ``nn.Linear``. ``layer``: LowRankLinear forward and backward over nn.Linear with its weight gradient. ``refresh``: what a redraw
costs, for laws fitted to the gradient with its full gradient or its online updates. ``live``: a step that is measured live over one that is not,
and its share of a run. ``optimizers``: updates of the optimizers in a frame alone, over their two products and over published packages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from estimators import LAWS, keyed
from estimators.haar_stiefel import HaarStiefel
from estimators.linear import LowRankLinear
from experiments import pretrain, runs
from experiments.training import cost, updating
from experiments.training.live import Live
from experiments.training.stepper import Stepper
from experiments.training.timing import pairs, timed

STEP_TARGET, MEMORY_TARGET = 1.0, 0.2  # at r = n/8: time of a step and saved bytes, over full AdamW
NEVER = 10**9
LIVE_LIMIT, LIVE_EVERY = 0.03, 100  # share of a run that live measurement may cost, and how often it is made by default
GROUPS = ("layer", "step", "memory", "refresh", "live", "optimizers")
DEFAULT = GROUPS[:-1]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Time and memory of LowRank-IPA beside its peers."""

    group: tuple[str, ...] = DEFAULT
    """What to measure: layer, step, memory, refresh, live, optimizers."""
    model: str = "60m"
    """Preset of lowrank pretrain."""
    law: tuple[str, ...] = ("haar_stiefel", "spectral")
    """Laws of LowRank-IPA."""
    rank: float = 0.125
    """r of every layer; a fraction in (0, 1) is r/n."""
    refresh_every: int = 200
    """K, over which the cost of a redraw is spread."""
    sequences: int = 8
    """Sequences a step."""
    length: int = 256
    """Tokens a sequence."""
    repeats: int = 7
    """Pairs of measurements, at least 5."""
    seed: int = 0
    """Of weights and draws."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        for name in self.group:
            if name not in GROUPS:
                raise ValueError(f"unknown group {name!r}, known are {', '.join(GROUPS)}")
        if self.repeats < 5:
            raise ValueError(f"repeats must be at least 5, got {self.repeats}")
        for law in self.law:
            settings(self, law)


def settings(config: Config, law: str, method: str = "lowrank", **fields: Any) -> pretrain.Config:
    """The training configuration that is measured."""
    base = replace(pretrain.PRESETS[config.model], sequences=config.sequences, accumulate=1, length=config.length, seed=config.seed)
    rank = int(config.rank) if config.rank >= 1 else config.rank
    return replace(base, method=method, law=law, rank=rank, refresh_every=config.refresh_every, measure_every=0, **fields)


PRESETS = {
    "tiny": Config(model="tiny", sequences=16, length=128),
    "60m": Config(),
    "optimizers": Config(group=("optimizers",), rank=0.25, length=128, repeats=31),
}


def main(config: Config) -> runs.Run:
    """Measure every group and return the run directory. Nothing is reused from before: times belong to one run."""
    run = runs.start("bench", config.model if config.group != ("optimizers",) else f"{config.model}-optimizers", config)
    run.renew()
    device = runs.device(config.device)
    parts: dict[str, Callable[[Config, torch.device], list[dict[str, Any]]]] = {
        "layer": layer,
        "step": step,
        "memory": memory,
        "refresh": refresh,
        "live": live,
        "optimizers": update,
    }
    run.log({"kind": "machine", "gemm_flops": cost.matmul_rate(device, torch.float32), "threads": torch.get_num_threads()})
    with runs.progress(len(config.group), "bench", config.quiet) as bar:
        for name in config.group:
            bar.set_postfix_str(name)
            run.log(*({"kind": name, **row} for row in parts[name](config, device)))
            bar.update()
    run.finish()
    return run


def stepper(config: Config, law: str, method: str, device: torch.device, **fields: Any) -> Stepper:
    """What is measured, of ``settings``."""
    return Stepper(settings(config, law, method, **fields), device)


# groups


def layer(config: Config, device: torch.device) -> list[dict[str, Any]]:
    """T = 4096, m = n = 1024, r = 128: forward and backward, with the lift counted, B zero and B in the forward pass."""
    T, m, n, rank = 4096, 1024, 1024, 128
    generator = keyed.generator(config.seed, "bench layer", 0, device)
    X = torch.randn(T, n, generator=generator, device=device, requires_grad=True)
    D = torch.randn(T, m, generator=generator, device=device)
    dense = nn.Linear(n, m, bias=False, device=device)
    low = LowRankLinear(nn.Linear(n, m, bias=False, device=device), rank)
    low.hold(HaarStiefel(n=n, rank=rank).sample(generator=generator))

    def product(module: nn.Module, weight: Tensor) -> None:
        torch.autograd.grad(module(X), (X, weight), D)

    @torch.no_grad()
    def lift() -> None:
        low.weight.addmm_(low.B, low.basis().mT)
        low.zero()

    def lifted() -> None:
        product(low, low.B)
        lift()

    def inside() -> None:
        low.moved()
        product(low, low.B)
        low.zero()

    rows = pairs(
        lambda: product(dense, dense.weight), {"lift_every=1": lifted, "B in the forward pass": inside}, device, 2 * config.repeats
    )
    return [row | {"shape": f"T={T}, m={m}, n={n}, r={rank}"} for row in rows]


def step(config: Config, device: torch.device) -> list[dict[str, Any]]:
    """Whole steps; ``ratio_with_redraws`` adds 1/K of a redraw and of the full gradient before it."""
    benches = {law: stepper(config, law, "lowrank", device) for law in config.law}
    for law in config.law:
        if LAWS[law].fitted:
            benches[f"{law} online"] = stepper(config, law, "lowrank", device, online=0.5, basis_every=NEVER)
    benches["lora"] = stepper(config, "gaussian", "lora", device)
    for bench in benches.values():
        bench.step()  # a fitted law sees its first full gradient here and draws from it
    peer = stepper(config, "gaussian", "adamw", device)
    rows = pairs(peer.step, {name: bench.step for name, bench in benches.items()}, device, config.repeats)
    for row in rows:
        row["tokens_per_second"] = config.sequences * config.length / row["seconds"]
        row["state_bytes"] = cost.state_bytes((peer if row["name"] == "peer" else benches[row["name"]]).optimizers)
        handle = benches[row["name"]].method.handle if row["name"] in benches else None
        if handle is not None:
            per_step = sum(_redraw(benches[row["name"]], device).values()) / config.refresh_every
            row["ratio_with_redraws"] = row["ratio"] + per_step / rows[0]["seconds"]
            row |= {"target": STEP_TARGET, "holds": row["ratio_with_redraws"] <= STEP_TARGET}
    return rows


def memory(config: Config, device: torch.device) -> list[dict[str, Any]]:
    """Bytes saved for the backward pass by the linear layers of the blocks."""
    rows: list[dict[str, Any]] = []
    for name, method in [("peer", "adamw"), *((law, "lowrank") for law in config.law), ("lora", "lora")]:
        bench = stepper(config, name if method == "lowrank" else "gaussian", method, device)
        bench.step()
        body: Any = bench.task.model.model
        names = [name for name, _ in body.named_modules() if name.endswith("_proj")]
        shared, separate = cost.saved_bytes(body, names, bench.loss)
        row = {"name": name, "saved_bytes": shared, "saved_bytes_layer_by_layer": separate}
        base = rows[0] if rows else row
        row |= {"ratio": shared / base["saved_bytes"], "ratio_layer_by_layer": separate / base["saved_bytes_layer_by_layer"]}
        if method == "lowrank":
            row |= {"target": MEMORY_TARGET, "holds": row["ratio"] <= MEMORY_TARGET}
        rows.append(row)
    return rows


def refresh(config: Config, device: torch.device) -> list[dict[str, Any]]:
    """Seconds of a redraw, of the full gradient before it, and of the online update; bytes of what is known and of V."""
    rows = []
    for law in config.law:
        for online in (0.0, 0.5) if LAWS[law].fitted else (0.0,):
            bench = stepper(config, law, "lowrank", device, online=online, basis_every=NEVER if online else 1)
            for _ in range(2):
                bench.step()
            handle = bench.method.handle
            assert handle is not None
            V = [layer.basis() for layer in handle.layers.values()]
            bytes_ = {"known_bytes": handle.fitting.bytes(), "V_bytes": sum(map(cost.bytes_of, V))}
            rows.append({"name": law + (" online" if online else "")} | bytes_ | _redraw(bench, device))
    return rows


def live(config: Config, device: torch.device) -> list[dict[str, Any]]:
    """Steps in which every layer shows X and Δ and is measured, beside plain ones; ``share`` is what one in LIVE_EVERY adds to a run."""
    rows = []
    for law in config.law:
        bench = stepper(config, law, "lowrank", device)
        for _ in range(2):
            bench.step()
        assert bench.method.handle is not None
        watch = Live(bench.method.handle, config.sequences, 1)

        def measured(bench: Stepper = bench, watch: Live = watch) -> None:
            watch.arm()
            bench.step()
            watch.rows()

        _, row = pairs(bench.step, {law: measured}, device, config.repeats)
        share = (row["ratio"] - 1) / LIVE_EVERY
        rows.append(row | {"share": share, "limit": LIVE_LIMIT, "holds": share <= LIVE_LIMIT})
    return rows


def update(config: Config, device: torch.device) -> list[dict[str, Any]]:
    """The optimizers in a frame: a step over its two products and over published packages, a refresh over theirs."""
    return updating.rows(settings(config, "gaussian", "adamw"), device, config.repeats)


def _redraw(bench: Stepper, device: torch.device) -> dict[str, float]:
    """Seconds of the full gradient where one is due, beyond a plain backward pass, and of the redraw itself; medians of 5."""
    handle = bench.method.handle
    assert handle is not None
    plain, observed, redrawn = [], [], []
    for _ in range(5):
        plain.append(timed(lambda: bench.loss().backward(), device))
        if handle.law.fitted and not handle.fitting.online:
            handle.observe(lambda name, X, D: handle.fitting.reduce(name, handle.layers[name], X, D, handle.draws))
            observed.append(timed(lambda: bench.loss().backward(), device) - plain[-1])
        redrawn.append(timed(lambda: handle.redraw(bench.optimizers[0]), device))
    return {"full_gradient_seconds": max(0.0, float(np.median(observed))) if observed else 0.0, "redraw_seconds": float(np.median(redrawn))}
