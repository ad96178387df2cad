"""The command in a process of its own, forked by a server that has imported everything: that takes longer than all that small runs do."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

import experiments.training.trainer  # noqa: F401  what `lowrank pretrain` imports
from experiments import cli


def _command(arguments: Sequence[str], told: Path) -> None:
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    sys.exit(cli.main(arguments))


def started(arguments: Sequence[str], told: Path) -> ForkServerProcess:
    """``lowrank`` with these arguments, running; its standard error is the file ``told``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_command, args=(arguments, told))
    process.start()
    return process
