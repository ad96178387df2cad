"""What is committed of the notebooks: they are as their sources say, executed from top to bottom without an error, with figures, in time."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import jupytext
import pytest

from experiments.pages import notebooks
from experiments.publish import committed

FOLDER = Path(__file__).parents[2] / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
LIMIT = 180  # seconds at full size on two cores


def executed(source: Path) -> Any:
    return jupytext.read(source.with_suffix(".ipynb"))


def test_every_source_has_its_notebook() -> None:
    assert SOURCES and {path.stem for path in SOURCES} == {path.stem for path in FOLDER.glob("*.ipynb")}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_what_its_source_says(source: Path) -> None:
    cells = lambda notebook: [(cell.cell_type, cell.source) for cell in notebook.cells]  # noqa: E731
    assert cells(executed(source)) == cells(jupytext.read(source)), "make notebooks executes the sources again"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_was_executed_whole(source: Path) -> None:
    code = [cell for cell in executed(source).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    told = [cell.metadata["execution"] for cell in code]
    begun, ended = (datetime.fromisoformat(at) for at in (told[0]["iopub.execute_input"], told[-1]["shell.execute_reply"]))
    assert (ended - begun).total_seconds() < LIMIT


def test_a_size_is_whole_unless_asked_to_be_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebooks, "SMOKE", False)
    assert notebooks.size(1000, 10) == 1000
    monkeypatch.setattr(notebooks, "SMOKE", True)
    assert notebooks.size(1000, 10) == 10


def test_committed_rows_are_read_by_name_and_a_wrong_name_says_which_there_are() -> None:
    assert set(committed("compare/tiny-final").seed) == {0, 1, 2}
    with pytest.raises(FileNotFoundError, match="compare/tiny-final"):
        committed("compare/large-final")
