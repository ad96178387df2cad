"""How each committed result is made again: the command, with flags for defaults that have changed since, how long it took, and on what."""

from __future__ import annotations

import json
import os
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd

from experiments import runs
from experiments.arguments import configuration
from experiments.cli import MODULES, QUESTIONS
from experiments.publish import RESULTS, committed_kinds

LATER = {"lowrank demo": {"validate": "--model tiny", "dynamics": ""}}  # what of the tour is a question of its own
RENAMED = {"optimizers": "optimizer"}  # a group of the bench
FILLED_IN = ("data_sha256", "ranks_sha256")  # by the command itself
UNSAID = {"--quiet": 0, "--workers": 1}  # flags that change no number, and how many values they have


def records(results: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """``question/label`` → its provenance, for every committed run of a question."""
    found = {
        file.relative_to(results).with_suffix("").as_posix(): json.loads(file.read_text(encoding="utf-8"))
        for file in sorted(results.glob("*/*.json"))
    }
    return {name: told for name, told in found.items() if "config" in told}


def command(told: dict[str, Any]) -> str:
    """The command of a provenance, as it has to be typed today."""
    question, config = _question(told), told["config"]
    words = _words(question, told)
    module: Any = import_module(f"experiments.{MODULES.get(question, question)}")
    size = told["environment"].get("processes", 1)
    with mock.patch.dict(os.environ, {"WORLD_SIZE": str(size)}):  # as torchrun sets it
        now = runs.plain(configuration(question, module, words))
    known = {name: _renamed(value) for name, value in config.items() if name in now and name not in (*runs.NOT_IDENTITY, *FILLED_IN)}
    words += [word for name, value in known.items() if now[name] != value for word in _flag(name, value)]
    if size > 1:
        return shlex.join(["torchrun", "--nproc-per-node", str(size), "-m", f"experiments.{MODULES.get(question, question)}", *words])
    return shlex.join(["lowrank", *question.split(), *words])


def _question(told: dict[str, Any]) -> str:
    """Its name on the command line; a question in two words shares its first with another."""
    name, said = told["config"]["question"], told["environment"]["command"].split()
    return next((longer for longer in MODULES if said[1:3] == longer.split()), name)


def _words(question: str, told: dict[str, Any]) -> list[str]:
    """What followed the question, without what changes no number; of a continued run the last command."""
    said = told["environment"].get("continued", told["environment"])["command"]
    if said in LATER:
        return LATER[said][question].split()
    program, *words = shlex.split(said)
    if program in ("lowrank", "cli.py"):  # a module that torchrun started has no question in its command
        words = words[len(question.split()) :]
    for flag, values in UNSAID.items():
        if flag in words:
            place = words.index(flag)
            words = words[:place] + words[place + 1 + values :]
    return words


def _renamed(value: Any) -> Any:
    return [RENAMED.get(one, one) for one in value] if isinstance(value, list) else value


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]


def seconds(name: str, told: dict[str, Any], results: Path = RESULTS) -> tuple[float, str]:
    """(how long it took, as known from what), NaN where nothing says it. Of trainings that a run's rows time one by one, which other runs may have
    made already: their sum, those of the learning rates at the pace of the others. Of another run that was continued: its last part, at least."""
    environment = told["environment"]
    recorded = environment.get("continued", environment).get("seconds")
    frames = committed_kinds(name, ("final", "tested", "point", "trial"), results)
    whole = next((frames[kind] for kind in ("final", "tested", "point") if kind in frames), pd.DataFrame())
    if "seconds" not in whole:
        return (float("nan"), "") if recorded is None else (float(recorded), ", its last part" if "continued" in environment else "")
    total = float(whole.seconds.sum())
    if "trial" in frames:
        by = [name for name in ("task", "label") if name in whole and name in frames["trial"]]
        pace = whole.assign(pace=whole.seconds / whole.steps).groupby(by).pace.mean()
        total += float((frames["trial"].groupby(by).steps.sum() * pace).sum())
    return total, " of training"


def duration(value: float) -> str:
    """Seconds in words.

    >>> duration(40), duration(1000), duration(9000)
    ('40 s', '17 min', '2.5 h')
    """
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def markdown(results: Path = RESULTS) -> str:
    """One row a committed run, by question."""
    lines: list[str] = []
    found = records(results)
    for question in QUESTIONS:
        rows = {name: told for name, told in found.items() if _question(told) == question}
        if not rows:
            continue
        lines += [
            "" if lines else None,
            f"### `lowrank {question}`",
            "",
            "| result | command | took | device | commit |",
            "|---|---|---|---|---|",
        ]
        for name, told in rows.items():
            environment = told["environment"].get("continued", told["environment"])
            took, how = seconds(name, told, results)
            known = "not recorded" if took != took else duration(took) + how
            changed = " with changes" if environment["git_dirty"] else ""
            lines.append(f"| `{name}` | `{command(told)}` | {known} | {environment['device']} | {environment['git_sha'][:7]}{changed} |")
    return "\n".join(line for line in lines if line is not None)
