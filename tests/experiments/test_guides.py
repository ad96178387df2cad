"""The guides are true: links lead somewhere, commands are accepted, scripts run, and what is generated comes from the registries.

Their examples (``>>>``) run as doctests.
"""

from __future__ import annotations

import html
import re
import runpy
import shlex
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from estimators import LAWS
from experiments import cli, runs
from experiments.arguments import configuration
from experiments.pages import front, guides, references, reproduce
from experiments.training.methods import METHODS
from optimizers import OPTIMIZERS, ZEROTH_ORDER
from tests.experiments.launch import ENVIRONMENT, ROOT

GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, ROOT / "experiments" / "results" / "README.md"]
LONGEST = 220  # lines of the front page
NAMES = {
    "RUN...": ".",
    "RUNDIR": ".",
    "FOLDER": ".",
    "QUESTION": "validate",
    "PRESET": "smoke",
    "FILE.jsonl": "tests/experiments/dolly.jsonl",
}


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", text))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    assert links or page.name == "CONTRIBUTING.md"
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, place = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not place or place in anchors(target.read_text(encoding="utf-8")), link


def test_every_guide_is_reached_from_the_front_page() -> None:
    front_page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(front_page.splitlines()) <= LONGEST
    for guide in (ROOT / "docs").glob("*.md"):
        assert f"docs/{guide.name})" in front_page
        assert "(../README.md)" in guide.read_text(encoding="utf-8")


def commands() -> list[str]:
    """Every command of this project that a guide shows, without prompt and comment; a module's own examples too."""
    texts = [page.read_text(encoding="utf-8") for page in GUIDES]
    texts += [import_module(f"experiments.{cli.MODULES.get(question, question)}").__doc__ or "" for question in cli.QUESTIONS]
    texts += [cli.USAGE]
    lines = [line.strip() for text in texts for line in re.findall(r"(?m)^ {2,}((?:lowrank|torchrun) .*)$", text)]
    lines += [line for page in GUIDES for line in re.findall(r"`((?:lowrank|torchrun) [^`]* [^`]*)`", page.read_text(encoding="utf-8"))]
    return list(dict.fromkeys(re.split(r" {2,}| #| \||>|…", line)[0].strip() for line in lines))


@pytest.mark.parametrize("command", commands())
def test_commands_are_accepted(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the question that they ask, up to its work."""
    words = [NAMES.get(word, word) for word in shlex.split(command)]
    if "--tensorboard" in words:
        pytest.importorskip("tensorboard")
    if words[0] == "torchrun":
        monkeypatch.setenv("WORLD_SIZE", words[words.index("--nproc-per-node") + 1])
        module = words[words.index("-m") + 1] if "-m" in words else ""
        assert module or words[-1] in scripts(), command
        words = ["lowrank", module.removeprefix("experiments."), *words[words.index("-m") + 2 :]] if module else ["lowrank", "--help"]
    _, first, *rest = words
    if first.startswith("-"):
        assert cli.main([first]) == 0
        return
    question = f"{first} {rest[0]}" if rest and f"{first} {rest[0]}" in cli.QUESTIONS else first
    assert question in cli.QUESTIONS
    rest = rest[len(question.split()) - 1 :]
    module = import_module(f"experiments.{cli.MODULES.get(question, question)}")
    asked = configuration(question, module, [word for word in rest if word != cli.JSON])
    assert (asked is None) == bool({"-h", "--help"} & set(rest))


def scripts() -> dict[str, str]:
    """File name → text, of the blocks that a guide starts with ``# NAME.py``."""
    blocks = [block for page in GUIDES for block in re.findall(r"(?ms)^```python\n(# \S+\.py.*?)^```", page.read_text(encoding="utf-8"))]
    return {re.match(r"# (\S+\.py)", block)[1]: block for block in blocks}  # pyright: ignore[reportOptionalSubscript]


def test_every_block_of_code_runs() -> None:
    """As a doctest, or as a script below."""
    for page in GUIDES:
        for block in re.findall(r"(?ms)^```python\n(.*?)^```", page.read_text(encoding="utf-8")):
            assert block.startswith(">>> ") or block in scripts().values(), (page, block)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> float:
    """Loss of the first script when one process runs it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    name, text = next(iter(scripts().items()))
    (tmp_path / name).write_text(text, encoding="utf-8")
    with torch.random.fork_rng():
        runpy.run_path(str(tmp_path / name))
    return _loss(capsys.readouterr().out, processes=1)


def test_scripts_train_in_two_processes_as_in_one(tmp_path: Path, alone: float) -> None:
    """Started as a user starts them: V is the same in both, and the mean gradient that of the whole batch."""
    assert alone < 0.6  # of about one in the beginning
    assert len(scripts()) == 2
    for name, text in scripts().items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / name)]
        environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        assert abs(_loss(done.stdout, processes=2) - alone) <= 1.5e-4, name  # the last digit that is printed


def _loss(told: str, processes: int) -> float:
    found = re.search(rf"loss ([\d.]+) after 20 steps by {processes} processes", told)
    assert found, told
    return float(found[1])


def test_the_registries_are_in_the_tables() -> None:
    methods, laws, files, questions = guides.methods(), guides.laws(), guides.files(), guides.questions()
    for name in (*METHODS, *ZEROTH_ORDER, *guides.BETWEEN_TASKS):
        assert f"`{name}`" in methods or name.startswith("gradlite_")
    assert all(f"`{name}`" in laws for name in LAWS)
    assert all(f"`{name}`" in files for name in (*OPTIMIZERS, *ZEROTH_ORDER))
    assert all(f"| `lowrank {name}` |" in questions for name in cli.QUESTIONS)
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(notebooks/{notebook.name})" in guides.notebooks()


def test_what_is_cited_has_a_title_and_every_title_is_cited() -> None:
    assert set(references.cited()) == set(references.TITLES), "experiments/pages/references.py lists titles"
    page = references.markdown()
    assert all(any(name in text for text in references.sources().values()) for name in references.OLDER)
    assert all(f"| {name} |" in page for name in references.OLDER)
    assert all(f"abs/{number})" in page for number in references.TITLES)
    assert {*guides.IN_THE_LAYER.values(), *guides.BETWEEN_TASKS.values()} <= set(references.TITLES)


RECORDS = reproduce.records()


@pytest.fixture(scope="module")
def listed() -> str:
    """The page that lists them."""
    return reproduce.markdown()


@pytest.mark.parametrize("name", RECORDS)
def test_a_committed_result_is_asked_for_by_its_command(name: str, listed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typed today, it means the very configuration of the result."""
    committed, command = RECORDS[name]["config"], reproduce.command(RECORDS[name])
    assert f"`{command}`" in listed
    program, *words = shlex.split(command)
    monkeypatch.setenv("WORLD_SIZE", words[1] if program == "torchrun" else "1")
    words = [words[3].removeprefix("experiments."), *words[4:]] if program == "torchrun" else words
    question = " ".join(words[:2]) if " ".join(words[:2]) in cli.QUESTIONS else words[0]
    module: Any = import_module(f"experiments.{cli.MODULES.get(question, question)}")
    typed = runs.plain(configuration(question, module, words[len(question.split()) :]))
    differing = {key for key, value in committed.items() if key in typed and typed[key] != value} - set(runs.NOT_IDENTITY)
    assert differing <= {*reproduce.FILLED_IN, "group"}  # a group of the bench was renamed


def test_what_a_result_took(tmp_path: Path) -> None:
    told = {"environment": {"seconds": 12.0}}
    assert reproduce.seconds("a/b", told) == (12.0, "")
    assert reproduce.seconds("a/b", {"environment": {"continued": {"seconds": 3.0}}}) == (3.0, ", its last part")
    assert str(reproduce.seconds("a/b", {"environment": {}}, tmp_path)[0]) == "nan"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b-final.csv").write_text("label,steps,seconds\nx,10,5\nx,10,15\n")
    (tmp_path / "a" / "b-trial.csv").write_text("label,steps\nx,2\nx,2\n")
    assert reproduce.seconds("a/b", {"environment": {}}, tmp_path) == (24.0, " of training")
    assert reproduce.seconds("a/b", told, tmp_path) == (24.0, " of training")  # some may have been made before
    (tmp_path / "a" / "b-final.csv").write_text("task,label,steps,seconds\ny,x,10,5\nz,x,10,15\n")
    (tmp_path / "a" / "b-trial.csv").write_text("task,label,steps\ny,x,2\ny,x,2\n")
    assert reproduce.seconds("a/b", told, tmp_path) == (22.0, " of training")  # each task at its own pace


def test_the_picture_is_of_the_committed_results() -> None:
    figure = front.drawn()
    shown = front.FILE.read_text(encoding="utf-8")
    above, below, right = figure.axes
    legend = above.get_legend()
    assert legend is not None
    texts = [
        text.get_text() for text in (*legend.get_texts(), *below.get_xticklabels(), *right.get_yticklabels(), above.title, right.title)
    ]
    places = [shown.find(f">{html.escape(text)}<") for text in texts]
    assert len(texts) > 2 * len(LAWS) and -1 not in places
    order = [shown.rfind(f">{label.get_text()}<") for label in right.get_yticklabels() if label.get_text() not in LAWS]
    assert order == sorted(order)  # of the losses
    again = front.svg(figure)
    drawn = lambda text: len(re.findall("<use ", text))  # noqa: E731
    assert drawn(again) == drawn(shown) and "fill: #ffffff" in shown  # a white card, also where the page is dark
