"""The machine's limits, the groups that are held against them in small, what makes a regression, and operations by hand."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from estimators import LAWS
from experiments import bench, cli, publish, report, runs
from experiments.benching import growth, measuring, regressions, sampling
from experiments.benching import limits as limiting
from experiments.benching import start as starting
from experiments.benching.limits import Limits
from experiments.gpu import cells
from experiments.pages import benches, summary
from experiments.training import models
from theory import operations

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


def test_limits_add_up() -> None:
    machine = Limits(gemm=4.0, gemm16=8.0, copy=2.0, normals=5.0)
    assert machine.seconds(operations=8, normals=10) == 2 + 2
    assert machine.seconds(operations=8, dtype=torch.bfloat16) == 1
    assert machine.row()["gemm_per_second"] == 4.0 and machine.row()["kind"] == "machine"


def test_limits_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fastest round; a copy reads and writes."""
    times = iter([0.5] * 6 + [0.25] + [0.5] * 6 + [0.125])
    monkeypatch.setattr(limiting, "timed", lambda *_: next(times))
    monkeypatch.setattr(limiting, "NUMBERS", {"cpu": 1000})
    monkeypatch.setattr(limiting.cost, "matmul_rate", lambda _, dtype: 7.0 if dtype == torch.float32 else 9.0)
    assert limiting.limits(CPU) == Limits(gemm=7.0, gemm16=9.0, copy=2 * 4 * 1000 / 0.25, normals=1000 / 0.125)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    """Primitives in sizes that take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "SHAPES", ((128, 16),))
        patch.setattr(measuring, "DRAWS", 200)
        for name, value in {"TOKENS": 32, "WIDTH": 64, "RANKS": (8, 16), "WIDTHS": (32, 64), "BLOCKS": (1, 2), "PERIODS": (1, 2)}.items():
            patch.setattr(growth, name, value)
        folder = tmp_path_factory.mktemp("bench")
        return bench.main(bench.Config(group=("sampling", "measure", "growth"), sampled="tiny", repeats=5, runs_dir=folder, quiet=True))


def test_every_law_is_drawn_and_measured_with_its_share(small: runs.Run) -> None:
    rows = small.rows()
    assert rows[0]["kind"] == "machine"
    for kind, times in (("sampling", 2), ("measure", 1)):  # one matrix, and all of a model
        mine = [
            row for row in rows if row["kind"] == kind and row["name"] in LAWS and row["over"] in ("torch.linalg.qr", "a loop over draws")
        ]
        assert sorted(row["name"] for row in mine) == sorted(list(LAWS) * times)
        shared = {row["name"] for row in mine if "share" in row}
        assert shared == ({"gaussian", "haar_stiefel"} if kind == "sampling" else set(LAWS))
        assert all(row["share"] == pytest.approx(row["floor_seconds"] / row["seconds"]) for row in mine if "share" in row)
        assert all(0 < row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"] for row in mine)
    (own,) = (row for row in rows if row.get("over") == "its floor, measured")
    assert own["holds"] == (own["ratio"] <= sampling.FLOOR_LIMIT) and own["ratio_q1"] <= own["ratio"] <= own["ratio_q3"]
    assert {row["name"] for row in rows if row.get("over") == "XV with V stored"} == {"dct", "hadamard"}
    assert all(row["kept_bytes"] == 4 * 128 + 8 * 16 and row["V_bytes"] == 4 * 128 * 16 for row in rows if "kept_bytes" in row)
    numbers = {row["numbers"] for row in rows if "numbers" in row}
    assert numbers == {4 * (6 * 128 * 16 + 352 * 44)}


def test_growth_starts_at_one_and_predicts_operations(small: runs.Run) -> None:
    rows = {(row["name"], row["value"]): row for row in small.rows() if row["kind"] == "growth"}
    assert set(rows) == {("r", 8), ("r", 16), ("n", 32), ("n", 64), ("blocks", 1), ("blocks", 2), ("K", 1), ("K", 2)}
    for name in ("r", "n", "blocks", "K"):
        first = next(row for (one, _), row in rows.items() if one == name)
        assert first["ratio"] == first["predicted"] == 1
    assert rows["r", 16]["predicted"] == pytest.approx(
        (operations.low_rank(32, 64, 64, 16) + operations.lift(64, 64, 16))
        / (operations.low_rank(32, 64, 64, 8) + operations.lift(64, 64, 8))
    )
    assert all(row["repeats"] == 5 and row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"] for row in rows.values())
    assert rows["n", 64]["predicted"] > 3.9 and rows["K", 2]["predicted"] < 1


def test_it_is_shown_reported_and_published(small: runs.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert summary.show(small) == int(any(not row["holds"] for row in small.rows() if "holds" in row))
    shown = capsys.readouterr().out
    assert "torch.linalg.qr" in shown and "of the limit" in shown
    page = report.main(report.Config(run=(small.path,), out=tmp_path / "report.html")).read_text(encoding="utf-8")
    assert page.count("<svg") == 2 and "Drawing V" in page
    written = {path.name for path in publish.main(publish.Config(run=(small.path,), out=tmp_path / "results"))}
    assert {f"60m-{kind}.csv" for kind in ("machine", "sampling", "measure", "growth")} <= written


def test_a_run_that_was_cut_short_keeps_its_groups(small: runs.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = small.rows()
    small.path.joinpath("DONE").unlink()
    small.keep([row for row in before if row["kind"] != "measure"])
    monkeypatch.setattr(measuring, "DRAWS", 200)
    monkeypatch.setattr(sampling, "sampling", lambda *_: pytest.fail("measured again"))
    config = bench.Config(**{**{k: v for k, v in small.config.items() if k not in ("question", "kind")}, "runs_dir": small.path.parent, "quiet": True,
                             "group": tuple(small.config["group"]), "law": tuple(small.config["law"])})  # fmt: skip
    run = bench.main(config)
    assert [row["kind"] for row in run.rows()].count("machine") == 2
    assert [row for row in run.rows() if row["kind"] == "sampling"] == [row for row in before if row["kind"] == "sampling"]


def test_start_up_is_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(starting.subprocess, "run", lambda command, **_: told.append(command[-1]))
    imported, helped = starting.start(bench.Config(repeats=5))
    assert told[:3] == ["import torch", "import estimators", "from experiments.cli import main; main(['--help'])"] and len(told) == 18
    assert imported["name"] == "import estimators" and helped["holds"] and helped["seconds_target"] == 1.0


def test_the_map_of_questions_needs_no_torch() -> None:
    """Which is what makes it quick."""
    code = "import sys; from experiments.cli import main; main([]); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, timeout=60).returncode == 0


# regressions


def row(ratio: float, spread: float = 0.02, **more: Any) -> dict[str, Any]:
    return {"kind": "layer", "name": "a", "over": "b", "ratio": ratio, "ratio_q1": ratio - spread, "ratio_q3": ratio + spread} | more


@pytest.mark.parametrize(
    ("old", "new", "slower"),
    [
        (row(1.0), row(1.2), True),
        (row(1.0), row(1.0), False),
        (row(1.2), row(1.0), False),
        (row(1.0, 0.2), row(1.3, 0.2), False),  # within the noise
        (row(1.0, 0.001), row(1.01, 0.001), False),  # beyond it, and nothing
        (row(1.0, name="c"), row(1.2), False),  # another measurement
        (row(1.0, shape="8x8"), row(1.2, shape="4x4"), False),
        ({"kind": "memory", "name": "a", "ratio": 0.2}, {"kind": "memory", "name": "a", "ratio": 0.24}, True),  # a count has no spread
        ({"kind": "memory", "name": "a", "ratio": 0.2}, {"kind": "memory", "name": "a", "ratio": 0.2}, False),
        (row(math.nan), row(1.2), False),
        (
            {"kind": "optimizer", "name": "a", "ratio": 1.0},
            {"kind": "optimizer", "name": "a", "ratio": 1.2},
            False,
        ),  # a time of unknown spread
    ],
)
def test_a_regression_is_beyond_the_noise_of_both(old: dict[str, Any], new: dict[str, Any], slower: bool) -> None:
    found = regressions.found([old], [new])
    assert bool(found) is slower
    if slower:
        assert found[0]["kind"] == "regression" and found[0]["slower"] == pytest.approx(1.2) and found[0]["holds"] is False


def test_what_is_compared_with_is_a_bench(small: runs.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = bench.Config(sampled="tiny")
    assert regressions.load(small.path, config) == json.loads((small.path / "bench.json").read_text(encoding="utf-8"))["rows"]
    assert regressions.load(small.path / "bench.json", config) == regressions.load(small.path, config)
    texts = (
        "[1]",
        '{"rows": [1, 2]}',
        '{"rows": "abc"}',
        '{"rows": [{"ratio": "x"}], "config": {}}',
        '{"rows": [{"shape": [1]}], "config": {}}',
    )
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.json").write_text(text)
    for path in (tmp_path, tmp_path / "none", *tmp_path.glob("*.json")):
        assert cli.main(["bench", "--compare", str(path), "--runs-dir", str(tmp_path / "runs")]) == 2
        said = capsys.readouterr().err
        assert "not the bench.json" in said and said.count("\n") == 1
    assert cli.main(["bench", "--model", "tiny", "--compare", str(small.path), "--runs-dir", str(tmp_path / "runs")]) == 2
    assert "that bench had model='60m', this one has 'tiny'" in capsys.readouterr().err
    told = json.loads((small.path / "bench.json").read_text(encoding="utf-8"))
    (tmp_path / "gpu.json").write_text(json.dumps(told | {"environment": {"device": "another"}}))
    with pytest.raises(runs.WrongInput, match="that bench had device='another'"):
        regressions.load(tmp_path / "gpu.json", config)
    assert not (tmp_path / "runs").exists()


# operations


def test_operations_by_hand() -> None:
    T, m, n, r = 2, 3, 5, 2
    products = [(T, n, m), (T, m, n), (m, T, n)]  # XWᵀ, ΔW, ΔᵀX
    assert operations.dense(T, m, n) == sum(2 * a * b * c for a, b, c in products)
    kept = [(T, n, m), (T, m, n), (T, n, r), (m, T, r)]  # XWᵀ, ΔW, XV, Δᵀ(XV)
    assert operations.low_rank(T, m, n, r) == sum(2 * a * b * c for a, b, c in kept)
    inside = [(T, r, m), (T, m, r), (T, r, n)]  # (XV)Bᵀ, ΔB, (ΔB)Vᵀ
    assert operations.low_rank(T, m, n, r, inside=True) - operations.low_rank(T, m, n, r) == sum(2 * a * b * c for a, b, c in inside)


def test_operations_of_a_step_are_those_that_utilisation_counts() -> None:
    """6 a matrix weight and token and attention, as experiments/gpu/cells.py has them, norms left out."""
    preset = models.PRESETS["tiny"]
    h, f, blocks, vocabulary = (preset[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"))
    norms = 6 * (2 * blocks + 1) * h
    assert operations.step(7, h, f, blocks, vocabulary, 64, None) == 7 * (cells.flops_per_token("tiny", 64) - norms)
    step = lambda ratio, lift_every=1: operations.step(1024, h, f, blocks, vocabulary, 64, ratio, lift_every)  # noqa: E731
    assert step(0.125) < step(0.125, lift_every=10**9) < step(None)


def test_the_page_shows_what_was_published(small: runs.Run, tmp_path: Path) -> None:
    assert benches.primitives(tmp_path) == "not yet run"
    publish.main(publish.Config(run=(small.path,), out=tmp_path))
    for file in (tmp_path / "bench").iterdir():
        file.rename(file.with_name(file.name.replace("60m", "60m-primitives")))
    text = benches.primitives(tmp_path)
    assert "GFLOP/s" in text and "| sampling | `haar_stiefel` | 128x16 | torch.linalg.qr |" in text
    assert "| r | 8: 1.00 (1.00), 16:" in text
