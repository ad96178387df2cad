"""Configurations and environments on the report: what differs between the runs of a page, and of each run everything, folded."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from experiments import runs
from experiments.pages.page import Link, details_block, table

EVERYWHERE = (
    "git_sha",
    "git_dirty",
    "python",
    "torch",
    "device",
    "processes",
)  # of an environment; its command says what the configuration does


def differing(loaded: Sequence[runs.Run], links: Sequence[Link]) -> str:
    """The fields in which environments differ, of all runs; and those of the configurations, of the runs of one question each."""
    text = _environments([_environment(run) for run in loaded], links)
    for question in dict.fromkeys(run.config["question"] for run in loaded):
        mine = [(run, link) for run, link in zip(loaded, links, strict=True) if run.config["question"] == question]
        if len(mine) > 1:
            text += f"<h3>Configurations of {html.escape(question)}</h3>"
            fields = differences([identity(run) for run, _ in mine])
            alike = f"<p>The {len(mine)} runs have one configuration.</p>"
            text += _side_by_side(fields, [link for _, link in mine]) if fields else alike
    return text


def identity(run: runs.Run) -> dict[str, Any]:
    """The fields that decide results; of those that came later, an older run has the value that it was made with."""
    return {name: value for name, value in {**runs.LATER, **run.config}.items() if name not in runs.NOT_IDENTITY}


def differences(configurations: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """field → its value in each, as text, of the fields whose values are not all the same.

    >>> differences([{"law": "gaussian", "rank": 4, "seed": 0}, {"law": "dct", "rank": 4}])
    {'law': ['gaussian', 'dct'], 'seed': ['0', '']}
    """
    names = dict.fromkeys(name for configuration in configurations for name in configuration)
    told = {name: [said(configuration[name]) if name in configuration else "" for configuration in configurations] for name in names}
    return {name: values for name, values in told.items() if len(set(values)) > 1}


def said(value: Any) -> str:
    """A value as it stands in a configuration: exact, and neither good nor bad."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(said, value))
    return "none" if value is None else str(value)


def whole(run: runs.Run) -> str:
    """Everything about one run, folded."""
    told = {**run.config, **run.read("env.json")}
    pairs = [{"field": key, "value": said(value)} for key, value in told.items() if key not in runs.NOT_IDENTITY]
    return details_block("Configuration and environment", table(pairs))


def _environment(run: runs.Run) -> dict[str, str]:
    """Of the code its commit in short; a run that was continued elsewhere has been in both places."""
    first = run.read("env.json")
    both = [first, first["continued"]] if "continued" in first else [first]
    told = {name: ", then ".join(dict.fromkeys(said(one.get(name)) for one in both)) for name in EVERYWHERE}
    commits = [one["git_sha"][:7] + (" with changes" if one["git_dirty"] else "") for one in both]
    return {"commit": ", then ".join(dict.fromkeys(commits))} | {k: v for k, v in told.items() if not k.startswith("git_")}


def _environments(environments: Sequence[dict[str, str]], links: Sequence[Link]) -> str:
    fields = differences(environments)
    alike = "; ".join(f"{name} {value}" for name, value in environments[0].items() if name not in fields)
    text = f"<p>In common: {html.escape(alike)}.</p>" if alike else ""
    return text + (f"<h3>Environments</h3>{_side_by_side(fields, links)}" if fields else "")


def _side_by_side(fields: dict[str, list[str]], links: Sequence[Link]) -> str:
    """The longer side goes down: a field a row for few runs, a run a row for many."""
    if len(links) >= len(fields):
        return table([{"run": link} | {name: values[place] for name, values in fields.items()} for place, link in enumerate(links)])
    return table([{"field": name} | {link.text: value for link, value in zip(links, values)} for name, values in fields.items()])
