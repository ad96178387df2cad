"""Pre-train a LLaMA with a low-rank gradient estimator, or with one of the baselines it is compared with.

    lowrank pretrain tiny --law haar_stiefel --rank 16 --steps 60 --lr 1e-3 --seed 11 --checkpoint-every 10
    lowrank pretrain tiny --method adamw
    lowrank pretrain 60m --law spectral --rank 0.25 --precision bf16
    lowrank pretrain tiny --tensorboard                # then: tensorboard --logdir runs
    torchrun --nproc-per-node 8 -m experiments.pretrain 350m --shard fsdp

The same command continues an interrupted run, with any number of processes; with one on a CPU it then ends in the very weights that an
uninterrupted one reaches.
"""

from __future__ import annotations

import sys

from experiments import allowed, runs
from experiments.training import parallel, tensorboard
from experiments.training.config import PRESETS, Config

__all__ = ["PRESETS", "Config", "main", "opened"]


def main(config: Config) -> runs.Run:
    """Train, or continue to train, and return the finished run directory.

    Raises ``runs.Stopped`` on interruption, on too many steps without a finite gradient, and when a checkpoint cannot be written.
    """
    from experiments.training.trainer import Trainer

    if config.ranks is not None:
        allowed.ranks(config.ranks)  # refused before there is a directory
    with parallel.joined(runs.device(config.device)):
        run = opened(config)
        with tensorboard.followed(run, config.tensorboard) as followed:
            runs.trained(followed, lambda: Trainer(config, followed))
        return run


def opened(config: Config) -> runs.Run:
    """The run directory of this configuration, begun if it is new."""
    named = {"lowrank": config.law, "tokens": f"tokens-{config.law}"}.get(config.method, config.method)
    return runs.start("pretrain", f"{config.model}-{named}", config)


if __name__ == "__main__":
    from experiments import cli

    sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
