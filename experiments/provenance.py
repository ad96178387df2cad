"""Where a number comes from: what it depends on besides its configuration."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from estimators import processes


def environment() -> dict[str, Any]:
    """What a number depends on besides its configuration: code version, library versions, device, command line.

    $LOWRANK_COMMIT names the commit of a copy that is not the repository itself. Outside a repository ``git_sha`` is empty, and ``installed`` says
    what is there instead; a repository that this file only lies in, as in a project's virtual environment, is another's.
    """
    named = os.environ.get("LOWRANK_COMMIT", "")
    ours = not named and bool(_git("ls-files", Path(__file__).name))
    sha = named or (_git("rev-parse", "HEAD") if ours else "")
    release = next((found.version for found in metadata.distributions(name="lowrank-gradients")), None)
    installed = f"lowrank-gradients {release}" if release else "a copy of the source"
    return {
        "git_sha": sha,
        "git_dirty": ours and bool(_git("status", "--porcelain")),
        **({} if sha else {"installed": f"{installed}, outside a repository"}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
        "processes": processes.size(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _git(*arguments: str) -> str:
    here = Path(__file__).resolve().parent
    try:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
