"""README, guides and results say what the committed results say. (Examples run as doctests; links and commands: test_guides.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from estimators import LAWS
from experiments.pages import comparisons, figures_scale, markers, ranking, readme
from experiments.publish import committed_kinds


@pytest.mark.parametrize("document", readme.DOCUMENTS)
def test_the_tables_are_the_committed_ones(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert markers.updated(text, readme.DOCUMENTS[document]) == text, "run `make readme`"


def test_the_figure_is_of_the_committed_comparisons() -> None:
    """To the numbers it shows: another version of matplotlib may draw them otherwise."""
    figure = figures_scale.scale()
    drawn = (readme.RESULTS / "compare" / figures_scale.FIGURE).read_text(encoding="utf-8")
    labels = [text.get_text() for ax in figure.axes for text in [*ax.get_xticklabels(), *ax.texts] if text.get_text()]
    assert all(f">{label}<" in drawn for label in labels)
    committed = {f"tiny{end}" for end in ("", "-rank", "-period", "-constant") if (readme.RESULTS / "compare" / f"tiny{end}.json").exists()}
    assert drawn.count("not yet run") == figures_scale.svg(figure).count("not yet run") == 4 - len(committed)


@pytest.mark.parametrize("name", comparisons.COSTED)
def test_the_fronts_are_of_the_committed_costs(name: str) -> None:
    figure, file = figures_scale.pareto(name), readme.RESULTS / "compare" / f"{name}-pareto.svg"
    assert (figure is not None) == file.exists()
    if figure is not None:
        labels = {text.get_text() for ax in figure.axes for text in ax.texts}
        assert labels and all(f">{label}<" in file.read_text(encoding="utf-8") for label in labels)


def test_the_figure_of_ranks_is_of_the_committed_run() -> None:
    kinds = committed_kinds(f"ranks/{ranking.COMMITTED}", ranking.KINDS)
    drawn = (readme.RESULTS / "ranks" / ranking.FIGURE).read_text(encoding="utf-8")
    figure = ranking.drawn(kinds)
    labels = {line for text in figure.axes[-1].get_yticklabels() for line in text.get_text().split("\n")}
    labels |= {ax.get_title() for ax in figure.axes}
    assert labels and all(f">{label}<" in drawn for label in labels)
    assert ranking.markdown("tiny", readme.RESULTS / "nowhere") == "not yet run"


def test_a_comparison_without_results_is_not_yet_run(tmp_path: Path) -> None:
    assert comparisons.differences("tiny", tmp_path) == "not yet run"


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
        markers.updated("nothing here", {"laws": readme.law_table})


def test_nothing_names_a_machine() -> None:
    root = Path(readme.README).parent
    for path in [
        *root.glob("*.md"),
        *(root / "docs").iterdir(),
        *(root / "experiments").rglob("*.json"),
        *(root / "experiments").rglob("*.py"),
    ]:
        assert not re.search(r"(/root/|/home/|/tmp/|/work/)", path.read_text(encoding="utf-8")), path
