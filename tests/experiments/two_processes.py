"""Started by ``torchrun``: measure and train every pickled configuration in one process group; what it raises, or else what it ends with, becomes
a file. Then the pickled commands are run, of which the last is this process's own."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
from pathlib import Path

import torch

from estimators import processes
from experiments import cli, memory, pretrain
from experiments.training import cost, parallel
from experiments.training.trainer import Trainer


def digest(trainer: Trainer) -> str:
    """Of every V in use, which must be equal to the last bit everywhere, and of the whole weights."""
    handle = trainer.method.handle
    drawn = [layer.basis() for layer in handle.layers.values()] if handle else []
    whole = [parallel.plain(p.detach()) for p in trainer.model.parameters()]
    return " ".join(hashlib.sha256(b"".join(t.float().numpy().tobytes() for t in some)).hexdigest() for some in (drawn, whole))


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    cost.SIZE = 128  # the machine's rate, that of small products here, is measured by every run
    measured, configs, commands = pickle.loads((folder / "work.pickle").read_bytes())
    with parallel.joined(torch.device("cpu")):
        for name, fields in measured.items():
            memory.main(memory.Config(model="9m", world_size=2, sequences=8, length=32, measure=True, quiet=True, device="cpu",
                                      runs_dir=folder / f"memory {name}", **fields))  # fmt: skip
        for name, config in configs.items():
            try:
                run = pretrain.opened(config)
                trainer = Trainer(config, run)
                trainer.train()
                (folder / f"{name}.{processes.rank()}.digest").write_text(digest(trainer), encoding="utf-8")
            except Exception as error:
                (folder / f"{name}.{processes.rank()}.error").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
                processes.barrier()
        wrong, last = commands
        (folder / f"wrong.{processes.rank()}.code").write_text(str(cli.main(wrong)), encoding="utf-8")
        processes.barrier()
        return cli.main(last)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(Path(sys.argv[1])))
