"""One launch of two processes for every test that needs one: starting them takes longer than all that they do."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments import pretrain, runs
from tests.experiments.test_pretrain import few

ROOT = Path(__file__).parents[2]
FSDP: dict[str, Any] = {"shard": "fsdp"}
SCENARIOS: dict[str, dict[str, Any]] = {  # what is trained by one process and by two
    "haar ddp": {"accumulate": 2, "sequences": 4},
    "haar fsdp": {"accumulate": 2, "sequences": 4, **FSDP},
    "lift fsdp": {"lift_every": 2, "state": "reproject_both", "optimizer": "sgd", "weight_decay": 0.1, **FSDP},
    "recompute fsdp": {"checkpoint_activations": True, "store": False, "state": "row_scale", **FSDP},
    "svd ddp": {"law": "top_svd", "rank": 4},
    "svd fsdp": {"law": "top_svd", "rank": 4, **FSDP},
    "online ddp": {"law": "spectral", "rank": 4, "keep": 1.0, "online": 0.5, "basis_every": 2},
    "spectral fsdp": {"law": "spectral", "rank": 4, "keep": 1.0, "save_model": True, **FSDP},
    "adamw fsdp": {"method": "adamw", **FSDP},
    "adamw ddp": {"method": "adamw"},
    "relora ddp": {"method": "relora"},
    "relora fsdp": {"method": "relora", "save_model": True, **FSDP},
    "live ddp": {"measure_every": 2, "sequences": 4},
    "moved fsdp": {"checkpoint_every": 2, "refresh_every": 4, "lift_every": 3, **FSDP},  # saved between two lifts, B not zero
    "lora fsdp": {"method": "lora", **FSDP},
    "bf16 ddp": {"precision": "bf16"},
    "bf16 fsdp": {"precision": "bf16", **FSDP},
    "moved ddp": {"checkpoint_every": 2, "law": "spectral", "rank": 4, "keep": 1.0},
    "galore ddp": {"method": "galore", "rank": 4},
    "ldadam ddp": {"method": "ldadam", "rank": 4},
    "spectral_adam ddp": {"method": "spectral_adam", "rank": 4},
    "gradlite ddp": {"method": "gradlite", "rank": 4, "inner": "sgd"},
    "gradlite_static ddp": {"method": "gradlite_static", "rank": 0.25},
    "rounded ddp": {"precision": "bf16_weights", "lift": "stochastic"},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "uneven": ({"sequences": 3}, "3 sequences cannot be divided among 2"),
    "master fsdp": ({"precision": "bf16_weights", **FSDP}, "float32 factors beside its weights"),
    "eight fsdp": ({"optimizer": "adamw8bit", **FSDP}, "states of adamw8bit cannot be sharded"),
    "galore fsdp": ({"method": "galore", **FSDP}, "the projector of galore needs whole gradients"),
    "gradlite_law fsdp": ({"method": "gradlite_law", **FSDP}, "the projector of gradlite_law needs whole gradients"),
    "online fsdp": ({"law": "spectral", "online": 0.5, **FSDP}, "sees whole sketches"),
}


MEASURED: dict[str, dict[str, Any]] = {  # whose memory is measured, before anything else has left garbage
    "fsdp 1": {"shard": "fsdp", "accumulate": 1},
    "ddp 1": {"shard": "ddp", "accumulate": 1},
    "ddp 2": {"shard": "ddp", "accumulate": 2},
}
STEPS = 120  # of the command that is interrupted


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def torchrun(*arguments: str) -> list[str]:
    """Two processes of a module."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", *arguments]


def command(text: Path, runs_dir: Path, *more: str) -> list[str]:
    """Of a run that is given as a user gives it."""
    return ["pretrain", "tiny", *more, "--length", "16", "--data", str(text), "--runs-dir", str(runs_dir), "--device", "cpu", "--quiet"]


def interrupted_command(text: Path, folder: Path) -> list[str]:
    flags = f"--steps {STEPS} --sequences 2 --refresh-every 5 --eval-tokens 256 --measure-every 0 --checkpoint-every 0"
    watched = ["--tensorboard"] if find_spec("tensorboard") else []
    return command(text, folder / "interrupted", *flags.split(), *watched)


def interrupted(run: runs.Run) -> None:
    """As if it had died after the last checkpoint."""
    (run.path / "DONE").unlink()
    run.keep([row for row in run.rows() if row["step"] <= 2])


def launch(folder: Path, text: Path) -> None:
    """MEASURED, then all scenarios, then the command with wrong input and the command that SIGINT at torchrun interrupts after some steps.

    What one process began stands in "back fsdp" and "back ddp"; how torchrun ended is in "code", what the commands said in "stderr".
    """
    fields = SCENARIOS | {name: some for name, (some, _) in REFUSED.items()}
    configs = {name: few(text, folder / name, **some) for name, some in fields.items()}
    for kind in ("fsdp", "ddp"):
        config = replace(configs[f"moved {kind}"], runs_dir=folder / f"back {kind}")
        interrupted(pretrain.main(config))
        configs[f"back {kind}"] = config
    commands = [command(text, folder / "wrong", "--sequences", "3"), interrupted_command(text, folder)]
    (folder / "work.pickle").write_bytes(pickle.dumps((MEASURED, configs, commands)))
    with (folder / "stderr").open("wb") as told:
        process = subprocess.Popen(torchrun("tests.experiments.two_processes", str(folder)), cwd=ROOT, env=ENVIRONMENT, stderr=told)
    deadline = time.monotonic() + 500
    try:
        while not any(row["step"] >= 3 for path in (folder / "interrupted").glob("*") for row in runs.read_rows(path)):
            assert time.monotonic() < deadline and process.poll() is None, (folder / "stderr").read_text(encoding="utf-8")
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        (folder / "code").write_text(str(process.wait(60)), encoding="utf-8")
    finally:
        process.kill()
