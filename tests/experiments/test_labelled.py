"""Labelled texts: what is drawn, what nobody trains on, the hub's schemas, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from experiments.finetuning import instructions
from experiments.runs import WrongInput
from experiments.text import labelled, tasks

DOLLY = Path(__file__).parent / "dolly.jsonl"
HUB: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {  # a row of each task as the hub has it, and the values of its label field
    "sst2": ({"idx": 0, "sentence": "a fine film", "label": 1}, (0, 1)),
    "sst5": ({"text": "a fine film", "label": 4, "label_text": "very positive"}, (0, 1, 2, 3, 4)),
    "snli": ({"premise": "A man sleeps.", "hypothesis": "A man is awake.", "label": 2}, (0, 1, 2)),
    "mnli": ({"premise": "A man sleeps.", "hypothesis": "A man is awake.", "label": 2, "idx": 0}, (0, 1, 2)),
    "rte": ({"sentence1": "A man sleeps.", "sentence2": "A man is awake.", "label": 1, "idx": 0}, (0, 1)),
    "trec": ({"text": "Who wrote it ?", "coarse_label": 3, "fine_label": 4}, (0, 1, 2, 3, 4, 5)),
}


def written(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> Path:
    folder.mkdir(exist_ok=True)
    for part, some in rows.items():
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return folder


def hub(folder: Path, name: str, each: int = 6) -> Path:
    """``each`` rows a label in both splits, with texts of their own."""
    row, values = HUB[name]
    source: Any = tasks.TASKS[name].examples
    rows = [row | {source.text: f"{row[source.text]} {part} {value} {i}", source.label: value}
            for part in ("train", "test") for value in values for i in range(each)]  # fmt: skip
    return written(folder, {"train": rows[: len(rows) // 2], "test": rows[len(rows) // 2 :]})


def own(folder: Path, train: list[tuple[str, Any]], test: list[tuple[str, Any]]) -> Path:
    return written(folder, {part: [{"text": t, "label": y} for t, y in some] for part, some in (("train", train), ("test", test))})


MANY = [(f"text {i} of {y}", y) for y in ("no", "yes") for i in range(8)]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "_PACKAGED", {})


@pytest.mark.parametrize(("name", "classes"), [("rotten-tomatoes", 2), ("imdb", 2), ("r8", 8)])
def test_embedded_sources(name: str, classes: int) -> None:
    task = labelled.find(name)
    one, other = labelled.split(task, 16, 13, 500), labelled.split(task, 16, 21, 500)
    for part in (one.training, one.validation):
        assert Counter(example.label for example in part) == dict.fromkeys(range(classes), 16)
    assert one.test == other.test and len(one.test) == 500 and {e.label for e in one.test} == set(range(classes))
    drawn = [{example.text for example in part} for part in (one.training, one.validation, one.test)]
    assert sum(map(len, drawn)) == len(set().union(*drawn)), "a text is on one side only"
    assert one.training != other.training and labelled.split(task, 16, 13, 500) == one
    assert len(labelled.split(task, 16, 13, 10**6).test) > 500


def test_reviews_are_labelled_as_they_read() -> None:
    split = labelled.split(labelled.find("rotten-tomatoes"), 1800, 0, 1000)
    share = lambda word, label: sum(word in e.text for e in split.training if e.label == label)  # noqa: E731
    assert share("bad", 0) > 2 * share("bad", 1) and share("enjoyable", 1) > 2 * share("enjoyable", 0)


@pytest.mark.parametrize("name", HUB)
def test_hub_tasks_in_their_own_schema(name: str, tmp_path: Path) -> None:
    folder, task = hub(tmp_path / name, name), labelled.find(name)
    split = labelled.split(task, 3, 13, 1000, folder)
    assert len(split.training) == len(split.validation) == 3 * len(task.labels) and len(split.test) == 6 * len(task.labels)
    assert (split.training[0].pair is not None) == ("{pair}" in task.template)
    assert len(task.words) == len(task.labels) == len(set(task.words))
    said = task.template.format(text=split.test[0].text, pair=split.test[0].pair, mask="?")
    assert split.test[0].text in said and (split.test[0].pair or "") in said


def test_the_hub_is_asked_for_the_published_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(repository: str, configuration: str | None, split: str, revision: str | None) -> list[dict[str, Any]]:
        assert revision is None
        asked.append((repository, configuration, split))
        return [{"premise": f"p {split} {i}", "hypothesis": "h", "label": i % 4 - 1} for i in range(40)]

    monkeypatch.setattr("datasets.load_dataset", load)
    split = labelled.split(labelled.find("snli"), 2, 0, 100)
    assert asked == [("stanfordnlp/snli", None, "train"), ("stanfordnlp/snli", None, "test")]
    assert len(split.test) == 30, "rows without a gold label are left out"


def test_without_a_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", load)
    with pytest.raises(WrongInput, match=r"nyu-mll/glue cannot be read \(no route\); without a network --folder names one with"):
        labelled.split(labelled.find("rte"), 2, 0, 100)
    with pytest.raises(WrongInput, match="dolly-15k cannot be read"):
        instructions.read("dolly")


def test_duplicates_and_texts_of_the_test_set_are_dropped(tmp_path: Path) -> None:
    folder = own(tmp_path / "twice", [*MANY, *MANY, ("shared", "yes")], [("shared", "yes"), ("shared", "yes"), ("other", "no")])
    split = labelled.split(labelled.find(str(folder)), 4, 0, 100)
    assert sorted(e.text for e in split.training + split.validation) == sorted(t for t, _ in MANY)
    assert [e.text for e in split.test] == ["shared", "other"]


@pytest.mark.parametrize(
    ("train", "test", "k", "message"),
    [
        (MANY, [("a", "yes")], 5, "the class 'no' has 8 examples, k=5 needs 10"),
        ([*MANY, (" ", "no")], [("a", "yes")], 2, "the text of example 17 is empty"),
        (MANY, [("a", "perhaps")], 2, "test.jsonl, line 1: unknown label 'perhaps', known are no, yes"),
        (MANY[:8], [("a", "no")], 2, "has 1 label, a classification needs at least 2"),
    ],
)
def test_what_cannot_be_drawn_is_refused(train: Any, test: Any, k: int, message: str, tmp_path: Path) -> None:
    folder = own(tmp_path / "own", train, test)
    with pytest.raises(WrongInput, match=message):
        labelled.split(labelled.find(str(folder)), k, 0, 100)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 1: not JSON"), ("[]", "line 1: not an object"), ('{"sentence": "x"}', "row 1: no field 'label'"),
     ('{"sentence": "x", "label": 7}', "row 1: unknown label 7, known are 0, 1"), ('{"sentence": null, "label": 1}', "row 1: None is not a text")],
)  # fmt: skip
def test_damaged_files_are_named(line: str, message: str, tmp_path: Path) -> None:
    folder = hub(tmp_path / "sst2", "sst2")
    (folder / "train.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(WrongInput, match=message):
        labelled.split(labelled.find("sst2"), 1, 0, 10, folder)


def test_folders_of_one_name_are_not_each_other(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        own(tmp_path / place / "data", [(f"{place} {text}", y) for text, y in MANY], [(f"{place} test", "no")])
    tests = [labelled.split(labelled.find(str(tmp_path / place / "data")), 2, 0, 10).test for place in ("a", "b")]
    assert [test[0].text for test in tests] == ["a test", "b test"]


def test_every_line_break_but_one_may_stand_in_a_text(tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text('{"prompt": "a\u2028b\u0085c", "response": "d"}\n', encoding="utf-8")
    assert instructions.read(str(tmp_path / "odd.jsonl"))[0].prompt == "a\u2028b\u0085c"
    (tmp_path / "odd.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WrongInput, match="is not UTF-8 text after line 0"):
        instructions.read(str(tmp_path / "odd.jsonl"))


def test_places_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match="there is no task 'sst3'"):
        labelled.find("sst3")
    with pytest.raises(WrongInput, match=r"train\.jsonl cannot be read: No such file"):
        labelled.split(labelled.find("sst2"), 1, 0, 10, tmp_path)
    with pytest.raises(WrongInput, match="is read from a package"):
        labelled.split(labelled.find("r8"), 1, 0, 10, tmp_path)


# instructions


def test_instructions_in_dollys_schema() -> None:
    pairs = instructions.read(str(DOLLY))
    assert len(pairs) == 30
    assert pairs[0].prompt == "### Instruction:\nWhat is the difference between a simile and a metaphor?\n\n### Response:\n"
    assert "\n\n### Context:\nThe ferry left" in pairs[2].prompt and pairs[2].response == "The crossing took 45 minutes."
    split = instructions.split(str(DOLLY), 8, 13, 100)
    sides = [set(part) for part in (split.training, split.validation, split.test)]
    assert [len(side) for side in sides[:2]] == [8, 8] and len(set().union(*sides)) == sum(map(len, sides))
    assert instructions.split(str(DOLLY), 8, 21, 100).test == split.test


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"instruction": "a", "response": " "}], "row 1: an empty response"),
        ([{"prompt": "a", "response": "b"}, {"prompt": "", "response": "b"}], "row 2: an empty instruction"),
        ([{"instruction": "a", "output": "b"}], "row 1: needs 'instruction' and 'response'"),
        ([{"prompt": "a", "response": "b"}], "k=4 needs 8"),
    ],
)
def test_instructions_that_are_refused(rows: list[dict[str, str]], message: str, tmp_path: Path) -> None:
    written(tmp_path, {"own": rows})
    with pytest.raises(WrongInput, match=message):
        instructions.split(str(tmp_path / "own.jsonl"), 4, 0, 10)
    with pytest.raises(WrongInput, match=r"'dolly' or a \.jsonl file"):
        instructions.read("alpaca")
