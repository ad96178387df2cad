"""README, guides and results say what the committed results say. (Examples run as doctests; links and commands: test_guides.)"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest

from estimators import LAWS
from estimators.transport import SECONDS
from experiments.pages import comparisons, figures_ranking, figures_scale, markers, plan, ranking, readme, redraws, scaling, stalling
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


def test_the_figure_of_second_moments_is_of_the_committed_rows() -> None:
    figure, file = figures_scale.second_moment(), readme.RESULTS / "compare" / redraws.FIGURE
    assert (figure is not None) == file.exists()
    if figure is not None:
        labels = {text.get_text() for ax in figure.axes for text in ax.get_xticklabels()}
        assert labels == set(SECONDS) and all(f">{label}<" in file.read_text(encoding="utf-8") for label in labels)


def test_rows_of_spikes_by_hand(tmp_path: Path) -> None:
    """Two seeds with two redraws each: the error of the mean is that of the seeds' means together."""
    common = {"kind": "spike", "window": 5, "spikes": 2, "midways": 2, "midway": 0.1, "midway_error": 0.0}
    spike = [{"label": f"haar_stiefel {N}", "seed": s, "spike": x, "spike_error": e, **common} for N, s, x, e in (
        ("zero", 0, 1.0, 0.3), ("zero", 1, 2.0, 0.4), ("keep", 0, 3.0, 0.0), ("keep", 1, 3.0, 0.0))]  # fmt: skip
    final = [{"label": row["label"], "method": "lowrank", "law": "haar_stiefel", "lr": 0.01, "c": 0.25, "lora_scale": None, "seed": row["seed"],
              "loss": 5.0 + row["seed"], "state_bytes": 1, "touched_share": 0.5} for row in spike]  # fmt: skip
    trial = [{"label": row["label"], "chosen": True, "at_edge": False} for row in spike]
    pair = {"reference": "haar_stiefel zero", "difference": 1.5, "low": 1.0, "high": 2.0}
    paired = [{"label": "haar_stiefel keep", **pair}]
    rows = {"spike": spike, "final": final, "trial": trial, "paired": paired, "spike_paired": paired}
    kinds = {name: pd.DataFrame(some) for name, some in rows.items()}
    zero, keep = redraws.merged(kinds)
    assert (zero["spike"], zero["spike error"], zero["redraws"]) == (1.5, pytest.approx(0.25), 4) and zero["loss"] == 5.5
    assert (keep["spike difference"], keep["spike low"], keep["loss high"]) == (1.5, 1.0, 2.0) and math.isnan(zero["spike difference"])
    for name, frame in kinds.items():
        (tmp_path / "compare").mkdir(exist_ok=True)
        frame.to_csv(tmp_path / "compare" / f"second-moment-{name}.csv", index=False)
    config = {
        "model": "tiny",
        "law": ["haar_stiefel"],
        "steps": 9,
        "sequences": 2,
        "length": 3,
        "rank": [0.25],
        "refresh_every": [4],
        "state": "reset",
    }
    config |= {"seed": [0, 1], "lr": [0.1], "tune_steps": 1, "spike_steps": 5}
    told = {"config": config, "environment": {"device": "cpu"}}
    (tmp_path / "compare" / "second-moment.json").write_text(json.dumps(told), encoding="utf-8")
    text = redraws.spikes("second-moment", tmp_path)
    assert "4 redraws in all" in text and "| `keep` | 0.01 | 3.000 ± 0.000 | 0.100 ± 0.000 | +1.500 [+1.000, +2.000] |" in text
    assert redraws.spikes("second-moment-carried", tmp_path) == redraws.initial("initial-scale", tmp_path) == "not yet run"


def test_the_sparse_code_dies_and_lives_as_the_sentence_says() -> None:
    plain, lives = stalling.path(0.0), stalling.path(stalling.THRESHOLD)
    died, grew = (int(word.split(" ")[0]) for word in re.findall(r"from step (\d+ on)", stalling.markdown()))
    assert (
        plain.x[died] == 0 < plain.x[died - 1]
        and lives.x[grew - 1] == pytest.approx(stalling.START[0])
        and lives.x[grew] > lives.x[grew - 1]
    )
    assert plain.loss.iloc[-1] == 0.5 > 2 * lives.loss.iloc[-1]


def test_the_figure_of_plans_is_of_the_committed_rows() -> None:
    figure, file = plan.drawn(), readme.RESULTS / "plan" / plan.FIGURE
    assert (figure is not None) == file.exists()
    if figure is not None:
        labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]  # pyright: ignore[reportOptionalMemberAccess]
        assert len(labels) == 4 and all(f">{label}<" in file.read_text(encoding="utf-8") for label in labels)


@pytest.mark.parametrize("name", scaling.NAMES)
def test_the_figure_of_a_scaling_law_is_of_its_committed_rows(name: str) -> None:
    figure, file = scaling.figure_of(name), readme.RESULTS / "scaling" / f"{name}.svg"
    assert (figure is not None) == file.exists()
    if figure is not None:
        drawn = file.read_text(encoding="utf-8")
        labels = [ax.get_title() for ax in figure.axes] + [
            line for text in figure.axes[-1].get_xticklabels() for line in text.get_text().split("\n")
        ]
        assert all(f">{label}<" in drawn for label in [*labels, "extrapolated"])


def test_the_figure_of_ranks_is_of_the_committed_run() -> None:
    kinds = committed_kinds(f"ranks/{ranking.COMMITTED}", ranking.KINDS)
    drawn = (readme.RESULTS / "ranks" / figures_ranking.FIGURE).read_text(encoding="utf-8")
    figure = figures_ranking.drawn(kinds)
    titled = {ax.get_title(): ax for ax in figure.axes}
    compared = titled["Loss minus uniform, paired, 95 %"].get_yticklabels()
    labels = titled.keys() | {line for text in compared for line in text.get_text().split("\n")}
    assert len(titled) == 6 and compared and all(f">{label}<" in drawn for label in labels)
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
