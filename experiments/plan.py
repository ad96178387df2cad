"""Where sending m×r numbers in the place of m×n pays: memory, bytes and step time of full and low-rank training on up to 1 024 devices.

    lowrank plan
    lowrank plan --model 70b --devices 64 1024 --bandwidth-gb 12.5 50 --sequences 1 4
    torchrun --nproc-per-node 2 -m experiments.plan measured

A plan counts and measures nothing (theory/memory.py, theory/communication.py, theory/step_time.py): it lies between a step in which everything sent
is hidden under operations and one in which nothing is, for devices and links as they are given. ``ddp``: all on every device, gradients summed over
all; ``fsdp``: rows of everything over all devices; ``hybrid``: FSDP inside a node, gradients summed between nodes (``lowrank pretrain`` has the
first two).
``measured`` times DDP steps of the processes that torchrun started, at several batches, and holds them against the same bounds.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from estimators import LAWS
from experiments import allowed, memory, pretrain, runs
from experiments.training import parallel
from experiments.training.options import Precision
from theory import memory as counted
from theory import step_time
from theory.llama import Setting
from theory.step_time import Link

GB = 10**9
Shard = Literal["ddp", "fsdp", "hybrid"]
PEER = "adamw"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Memory, bytes and step time by devices, bandwidth and batch; full AdamW beside LowRank-IPA."""

    model: tuple[str, ...] = ("7b", "70b")
    """Presets: 83k, 267k, 935k, tiny, 9m, 20m, 60m, 100m, 130m, 350m, 1b, 7b, 70b."""
    law: str = "haar_stiefel"
    """Law of V, a name from LAWS."""
    rank: float = 0.25
    """r of every layer; a fraction in (0, 1) is r/n."""
    store: bool = True
    """Keep V, whole on every device; otherwise draw it from its key at each use."""
    precision: Precision = "bf16"
    """fp32; bf16 (products in bfloat16, weights and messages float32); bf16_weights."""
    checkpoint_activations: bool = True
    """Recompute the blocks in the backward pass."""
    length: int = 2048
    """Tokens a sequence."""
    sequences: tuple[int, ...] = (1, 4, 16)
    """Sequences a device and step."""
    devices: tuple[int, ...] = (8, 64, 256, 1024)
    """Devices."""
    node: int = 8
    """Devices of a node."""
    shard: tuple[Shard, ...] = ("ddp", "fsdp", "hybrid")
    """ddp, fsdp, or hybrid (FSDP inside a node, all-reduce between nodes)."""
    rate_tera: float = 400.0
    """Operations a second that a device reaches, in 10¹²."""
    near_gb: float = 300.0
    """What a device sends inside its node, 10⁹ bytes a second."""
    bandwidth_gb: tuple[float, ...] = (1.25, 12.5, 50.0)
    """What a device sends to other nodes, 10⁹ bytes a second; 1.25 is 10 Gbit/s."""
    latency_us: float = 5.0
    """Of a message, 10⁻⁶ seconds."""
    memory_gb: float = 80.0
    """Memory of a device, 10⁹ bytes."""
    measure: bool = False
    """Time steps of the processes that torchrun started, in the place of a plan."""
    repeats: int = 9
    """Timed steps of each, with measure."""
    seed: int = 0
    """Seed of the weights and draws that are timed."""
    device: str = "auto"
    """cpu, cuda, or auto: where steps are timed."""
    runs_dir: Path = Path("runs")
    """Where run directories go."""
    quiet: bool = False
    """No progress bars."""

    def __post_init__(self) -> None:
        for name, known in (("model", pretrain.PRESETS), ("shard", get_args(Shard))):
            if not getattr(self, name):
                raise ValueError(f"{name} needs at least one value")
            for value in getattr(self, name):
                if value not in known:
                    raise ValueError(f"unknown {name} {value!r}, known are {', '.join(known)}")
        if self.law not in LAWS:
            raise ValueError(f"unknown law {self.law!r}, known are {', '.join(LAWS)}")
        for name in ("sequences", "devices", "bandwidth_gb"):
            if not getattr(self, name):
                raise ValueError(f"{name} needs at least one value")
        allowed.at_least(self, 1, "sequences", "devices", "node", "repeats")
        for name in ("rate_tera", "near_gb", "bandwidth_gb", "memory_gb"):
            value = getattr(self, name)
            if not all(one > 0 for one in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"{name} must be positive, got {value}")
        allowed.at_least(self, 0, "latency_us")
        if wrong := [p for p in self.devices if "hybrid" in self.shard and p > self.node and p % self.node]:
            raise ValueError(
                f"devices={wrong[0]} do not fill nodes of {self.node}, which hybrid needs; leave it out of --shard, or give --node"
            )
        for model in self.model:
            for shard in self.shard:  # what is in rows inside a node must be possible in rows
                settings(self, model, self.devices[0], self.sequences[0], "ddp" if shard == "ddp" else "fsdp")


def settings(config: Config, model: str, devices: int, sequences: int, shard: Shard) -> tuple[Setting, Setting]:
    """(full AdamW, LowRank-IPA) as theory sees them; of hybrid the setting of all devices under DDP. Raises ``ValueError`` as lowrank memory does."""
    found = []
    rank = int(config.rank) if config.rank >= 1 else config.rank
    methods: tuple[dict[str, Any], ...] = ({"method": PEER}, {"law": config.law, "rank": rank})
    for fields in methods:
        asked = memory.Config(
            model=model,
            store=config.store,
            precision=config.precision,
            checkpoint_activations=config.checkpoint_activations,
            length=config.length,
            sequences=sequences * devices,
            accumulate=1,
            world_size=devices,
            shard="fsdp" if shard == "fsdp" else "ddp",
            **fields,
        )
        found.append(memory.setting(memory.step(asked), devices, asked.shard, "cuda"))
    return found[0], found[1]


PRESETS = {
    "smoke": Config(model=("tiny",), devices=(2, 8), sequences=(1,), length=64, bandwidth_gb=(1.25,)),
    "measured": Config(
        model=("60m",), precision="fp32", checkpoint_activations=False, length=17, sequences=(1, 2, 4, 8, 16, 32), devices=(2,), shard=("ddp",),
        measure=True,
    ),
}  # fmt: skip


def main(config: Config) -> runs.Run:
    """Rows ``plan`` and ``threshold``, or with measure ``point``."""
    if not config.measure:
        return _main(config)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        raise runs.WrongInput("measure times what processes send; start them with torchrun --nproc-per-node 2 -m experiments.plan measured")
    with parallel.joined(runs.device(config.device)):
        return _main(config)


def _main(config: Config) -> runs.Run:
    label = "two-processes" if config.measure else "-".join(config.model)
    run = runs.start("plan", label, config)
    if run.done:
        return run
    run.renew()
    run.log(*(measured(config) if config.measure else planned(config)))
    run.finish()
    return run


def measured(config: Config) -> list[dict[str, Any]]:
    """A row a batch, by all processes together."""
    from experiments.planning import points

    device = runs.device(config.device)
    here = points.link(device)
    base = replace(
        pretrain.PRESETS[config.model[0]], method="lowrank", law=config.law, rank=config.rank, length=config.length, accumulate=1
    )
    base = replace(base, eval_tokens=max(2, config.length), measure_every=0, save_model=False, seed=config.seed)
    return [points.point(replace(base, sequences=sequences), here, device, config.repeats) for sequences in config.sequences]


def planned(config: Config) -> list[dict[str, Any]]:
    """A row for every model, way to share, number of devices, bandwidth and batch; and of each but the batch the batches from which sending hides."""
    rows: list[dict[str, Any]] = []
    for model in config.model:
        for shard in config.shard:
            for devices in config.devices:
                if shard == "hybrid" and devices <= config.node:
                    continue  # that is FSDP
                for sequences in config.sequences:
                    rows += _rows(config, model, shard, devices, sequences)
    return rows


def _rows(config: Config, model: str, shard: Shard, devices: int, sequences: int) -> list[dict[str, Any]]:
    both: dict[str, Setting] = dict(zip(("full", "low"), settings(config, model, devices, sequences, shard), strict=True))
    peaks = {name: _peak(config, one, shard) for name, one in both.items()}
    said = {"model": model, "shard": shard, "devices": devices, "sequences": sequences, "tokens": both["full"].tokens * devices}
    said |= {f"{name}_peak": peak for name, peak in peaks.items()}
    said |= {"low_projectors": counted.held(both["low"])["projectors"]}
    said |= {f"{name}_fits": peak <= config.memory_gb * GB for name, peak in peaks.items()}
    rows: list[dict[str, Any]] = []
    for bandwidth in config.bandwidth_gb if devices > config.node else (config.near_gb,):
        full, low = (_step(config, one, shard, bandwidth) for one in both.values())
        hidden, serial = step_time.bounds(full, low)
        made = {f"{name}_{part}": getattr(one, part) for name, one in (("full", full), ("low", low)) for part in ("compute", "sending")}
        shares = {"operations_share": low.compute / full.compute, "sending_share": low.sending / full.sending if full.sending else 1.0}
        rows.append(
            {"kind": "plan", **said, "bandwidth_gb": bandwidth, **made, **shares, "ratio_hidden": hidden, "ratio_serial": serial}
            | {"pays": full.sending > low.compute}
        )
        if sequences == config.sequences[0]:
            tokens = {
                f"{name}_hides": step_time.hiding_tokens(both[name], config.rate_tera * 1e12, one)
                for name, one in (("full", full), ("low", low))
            }
            rows.append(
                {"kind": "threshold", "model": model, "shard": shard, "devices": devices, "bandwidth_gb": bandwidth, **tokens, **shares}
            )
    return rows


def _peak(config: Config, setting: Setting, shard: Shard) -> int:
    own = step_time.inside(setting, config.node) if shard == "hybrid" else setting
    return max(counted.peak(own, redraw).total for redraw in ((False, True) if own.fitted else (False,)))


def _step(config: Config, setting: Setting, shard: Shard, bandwidth: float) -> step_time.Step:
    """``bandwidth``: of the slowest link on the way, 10⁹ bytes a second."""
    rate, far = config.rate_tera * 1e12, Link(bandwidth=bandwidth * GB, latency=config.latency_us * 1e-6)
    if shard == "hybrid":
        return step_time.hybrid(setting, config.node, rate, replace(far, bandwidth=config.near_gb * GB), far)
    return step_time.step(setting, rate, far)


if __name__ == "__main__":
    from experiments import cli

    sys.exit(cli.main(["plan", *sys.argv[1:]]))
