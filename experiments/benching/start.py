"""Seconds until the command answers, and until the package is imported, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import torch

from experiments.training.timing import pairs

if TYPE_CHECKING:
    from experiments.bench import Config

IMPORT_LIMIT = 2.5  # of ``import estimators`` over ``import torch``
HELP_LIMIT = 1.0  # seconds of ``lowrank --help``


def start(config: Config) -> list[dict[str, Any]]:
    """``lowrank --help`` and ``import estimators`` over ``import torch``; processes of before have left the files in memory."""

    def run(code: str) -> None:
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=300)

    calls = {
        "import estimators": lambda: run("import estimators"),
        "lowrank --help": lambda: run("from experiments.cli import main; main(['--help'])"),
    }
    imported, helped = pairs(lambda: run("import torch"), calls, torch.device("cpu"), config.repeats)[1:]
    imported |= {"target": IMPORT_LIMIT, "holds": imported["ratio"] <= IMPORT_LIMIT}
    helped |= {"seconds_target": HELP_LIMIT, "holds": helped["seconds"] <= HELP_LIMIT}
    return [row | {"over": "import torch"} for row in (imported, helped)]
