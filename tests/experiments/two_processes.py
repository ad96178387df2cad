"""Started by ``torchrun``: train every pickled configuration in one process group; what it raises, or else what it ends with, becomes a file."""

from __future__ import annotations

import hashlib
import os
import pickle
import sys
from pathlib import Path

import torch

from estimators import processes
from experiments import pretrain
from experiments.training import parallel
from experiments.training.trainer import Trainer


def digest(trainer: Trainer) -> str:
    """Of every V in use, which must be equal to the last bit everywhere, and of the whole weights."""
    handle = trainer.method.handle
    drawn = [layer.basis() for layer in handle.layers.values()] if handle else []
    whole = [parallel.plain(p.detach()) for p in trainer.model.parameters()]
    return " ".join(hashlib.sha256(b"".join(t.float().numpy().tobytes() for t in some)).hexdigest() for some in (drawn, whole))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with parallel.joined(torch.device("cpu")):
        for name, config in pickle.loads((folder / "configs.pickle").read_bytes()).items():
            try:
                run = pretrain.opened(config)
                trainer = Trainer(config, run)
                trainer.train()
                (folder / f"{name}.{processes.rank()}.digest").write_text(digest(trainer), encoding="utf-8")
            except Exception as error:
                (folder / f"{name}.{processes.rank()}.error").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
                processes.barrier()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
