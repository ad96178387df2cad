"""Steps, layers and bytes of LowRank-IPA beside full AdamW and LoRA, and what redraws and live measurement cost."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from estimators import LAWS, keyed
from estimators.haar_stiefel import HaarStiefel
from estimators.linear import LowRankLinear
from experiments import pretrain
from experiments.benching.limits import Limits
from experiments.training import cost
from experiments.training.live import Live
from experiments.training.stepper import Stepper
from experiments.training.timing import pairs, timed
from theory import operations

if TYPE_CHECKING:
    from experiments.bench import Config

STEP_TARGET, MEMORY_TARGET = 1.0, 0.2  # at r = n/8: time of a step and saved bytes, over full AdamW
LIFTED, INSIDE = "lift_every=1", "B in the forward pass"
LAYER_TARGETS = {LIFTED: 0.82, INSIDE: 0.95}  # over nn.Linear with its weight gradient
NEVER = 10**9
LIVE_LIMIT, LIVE_EVERY = 0.03, 100  # share of a run that live measurement may cost, and how often it is made by default


def settings(config: Config, law: str, method: str = "lowrank", **fields: Any) -> pretrain.Config:
    """The training configuration that is measured."""
    base = replace(pretrain.PRESETS[config.model], sequences=config.sequences, accumulate=1, length=config.length, seed=config.seed)
    rank = int(config.rank) if config.rank >= 1 else config.rank
    return replace(base, method=method, law=law, rank=rank, refresh_every=config.refresh_every, measure_every=0, **fields)


def stepper(config: Config, law: str, method: str, device: torch.device, **fields: Any) -> Stepper:
    """What is measured, of ``settings``."""
    return Stepper(settings(config, law, method, **fields), device)


def layer(config: Config, device: torch.device, limits: Limits) -> list[dict[str, Any]]:
    """T = 4096, m = n = 1024, r = 128: forward and backward, with the lift counted, B zero and B in the forward pass; on a GPU in bfloat16."""
    T, m, n, rank = 4096, 1024, 1024, 128
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = keyed.generator(config.seed, "bench layer", 0, device)
    X = torch.randn(T, n, generator=generator, device=device, dtype=dtype, requires_grad=True)
    D = torch.randn(T, m, generator=generator, device=device, dtype=dtype)
    dense = nn.Linear(n, m, bias=False, device=device, dtype=dtype)
    low = LowRankLinear(nn.Linear(n, m, bias=False, device=device, dtype=dtype), rank)
    low.hold(HaarStiefel(n=n, rank=rank).sample(generator=generator, dtype=dtype))

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

    rows = pairs(lambda: product(dense, dense.weight), {LIFTED: lifted, INSIDE: inside}, device, 2 * config.repeats)
    lifting = operations.lift(m, n, rank)
    count = {LIFTED: operations.low_rank(T, m, n, rank) + lifting, INSIDE: operations.low_rank(T, m, n, rank, inside=True)}
    for row in rows:
        least = limits.seconds(operations=count.get(row["name"], operations.dense(T, m, n)), dtype=dtype)
        row |= {"over": "nn.Linear", "dtype": str(dtype).removeprefix("torch."), "shape": f"T={T}, m={m}, n={n}, r={rank}"}
        row |= {"floor_seconds": least, "share": least / row["seconds"]}
        if row["name"] in LAYER_TARGETS:
            row |= {"target": LAYER_TARGETS[row["name"]], "holds": row["ratio"] <= LAYER_TARGETS[row["name"]]}
    return rows


def step(config: Config, device: torch.device, limits: Limits) -> list[dict[str, Any]]:
    """Whole steps; ``ratio_with_redraws`` adds 1/K of a redraw and of the full gradient before it; ``share``: the model's operations in full training
    over what the machine's rate does in that time, the model-FLOPs utilisation."""
    benches = {law: stepper(config, law, "lowrank", device) for law in config.law}
    for law in config.law:
        if LAWS[law].fitted:
            benches[f"{law} online"] = stepper(config, law, "lowrank", device, online=0.5, basis_every=NEVER)
    benches["lora"] = stepper(config, "gaussian", "lora", device)
    for bench in benches.values():
        bench.step()  # a fitted law sees its first full gradient here and draws from it
    peer = stepper(config, "gaussian", "adamw", device)
    full = cost.Cost(cast(Any, peer.task.model), config.length, device, torch.float32).flops_per_token * config.sequences * config.length
    rows = pairs(peer.step, {name: bench.step for name, bench in benches.items()}, device, config.repeats)
    for row in rows:
        row["tokens_per_second"] = config.sequences * config.length / row["seconds"]
        row |= {"over": "full AdamW", "share": limits.seconds(operations=full) / row["seconds"]}
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
        row = {"name": name, "over": "nn.Linear", "saved_bytes": shared, "saved_bytes_layer_by_layer": separate}
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
        rows.append(row | {"over": "a plain step", "share": share, "limit": LIVE_LIMIT, "holds": share <= LIVE_LIMIT})
    return rows


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
