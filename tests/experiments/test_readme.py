"""The README says what the committed results say. (Its example runs as a doctest.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from estimators import LAWS
from experiments import readme


def test_the_law_table_is_the_committed_one() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.updated(text) == text, "run `make readme`"


def test_every_law_and_file_is_there() -> None:
    table = readme.law_table()
    for name, law in LAWS.items():
        assert f"| `{name}` |" in table and f"`{law.stem}.py`" in table
    assert set(readme.FORMULAS) == set(LAWS)


def test_exact_and_measured_agree_in_the_table() -> None:
    rows = re.findall(r"\| ([\d.]+) \| ([\d.]+) ± ([\d.]+) \|$", readme.law_table(), flags=re.MULTILINE)
    assert len(rows) == len(LAWS)
    for exact, measured, error in rows:
        assert abs(float(exact) - float(measured)) < 5 * float(error) + 0.01


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="no markers"):
        readme.updated("nothing here")


def test_nothing_names_a_machine() -> None:
    root = Path(readme.README).parent
    for path in [*root.glob("*.md"), *(root / "experiments").rglob("*.json"), *(root / "experiments").rglob("*.py")]:
        assert not re.search(r"(/root/|/home/|/tmp/|/work/)", path.read_text(encoding="utf-8")), path
