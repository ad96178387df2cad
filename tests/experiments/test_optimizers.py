"""`lowrank optimizers`: state as the formula says, promises held and a false one refused, and what reaches terminal, report, CSV and README."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from estimators import measure_estimates
from experiments import bench, cli, optimizers, publish, report, runs
from experiments.pages import optimizers as page
from experiments.validation import replicas
from experiments.validation.travelling import FIRST, HOOKS, travelling
from optimizers import OPTIMIZERS
from theory import haar_stiefel, optimizer_state


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> runs.Run:
    config = optimizers.Config(draws=128, period=4, shape=(48, 64), rank=12, runs_dir=tmp_path_factory.mktemp("runs"), quiet=True)
    return optimizers.main(config)


def rows(run: runs.Run, kind: str) -> dict[str, dict[str, float]]:
    return {row["method"]: row for row in run.rows() if row["kind"] == kind}


def test_state_is_counted_and_promises_hold(run: runs.Run) -> None:
    states = rows(run, "state")
    assert list(states) == ["adamw", *OPTIMIZERS, *HOOKS] and set(states) == set(optimizer_state.FORMULAS)
    assert all(row["state_bytes"] == row["predicted_bytes"] for row in states.values())
    paths = rows(run, "path")
    promises = rows(run, "promise")
    assert {name for name, row in paths.items() if row["claim"] is not None} == set(promises) == set(optimizers.CLAIMS)
    assert all(row["holds"] for row in promises.values())
    for name in ("galore", "fira"):  # biased, and not by chance
        assert paths[name]["bias2"] > 8 * paths[name]["bias2_error"] > 0
    updates = rows(run, "update")
    assert updates["adamw"]["cosine_with_adamw"] == pytest.approx(1) and updates["adamw"]["length_over_adamw"] == pytest.approx(1)
    assert all(abs(row["cosine_with_gradient"]) <= 1 + 5 * row["cosine_with_gradient_error"] for row in updates.values())


def test_a_promise_that_is_false_does_not_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(optimizers.CLAIMS, "galore", lambda _: 1.0)
    config = optimizers.Config(draws=128, period=4, runs_dir=tmp_path, quiet=True)
    source = replicas.gaussian(config.m, config.n, config.noise, config.seed)
    path = optimizers._path(config, "galore", source, optimizers._measured(config, "galore", source))
    row = optimizers._promise([path])
    assert not row["holds"] and row["resolution"] < 0.1
    few = optimizers._promise([path | {"alignment": 1.0, "bias2": 0.0, "alignment_error": 0.2}])
    assert abs(few["z"]) < 5 and not few["holds"]  # met, by a measurement that could not have seen it missed


def test_statistics_of_updates_are_not_those_of_their_noise() -> None:
    """Of sixteen noisy means with a known one: length, cosines and noise come out right, where the plain mean would say otherwise."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    source = replicas.Source("known", g, lambda *_: g)
    other = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    true, plain, third = g + 0.5 * other, 2 * other, g - other
    noise = 3.0

    def pair(mean: torch.Tensor) -> replicas.Pair:
        draw = lambda size, generator: mean + noise * torch.randn(size, 6, 8, generator=generator, dtype=g.dtype)  # noqa: E731
        measured = measure_estimates(draw, g, 256, generator=generator)
        return replicas.Pair(measured, measured)

    found = [optimizers._update("x", source, pair(true), pair(plain), pair(third)) for _ in range(60)]
    cosine = lambda a, b: float((a * b).sum() / (a.norm() * b.norm()))  # noqa: E731
    expected = {
        "cosine_with_gradient": cosine(true, g),
        "cosine_with_adamw": cosine(true, plain),
        "cosine_with_muon": cosine(true, third),
        "length_over_adamw": float(true.norm() / plain.norm()),
        "noise_over_mean": noise * 48**0.5 / float(true.norm()),
    }
    for key, value in expected.items():
        values = np.array([row[key] for row in found])
        error = values.std(ddof=1) / len(values) ** 0.5
        assert abs(values.mean() - value) < 5 * error + 0.01 * value, key
        assert np.mean([row[f"{key}_error"] for row in found]) == pytest.approx(values.std(ddof=1), rel=0.35), key


def test_a_quarter_has_its_turn_whatever_the_size_of_the_matrix() -> None:
    source = replicas.gaussian(256, 1024, 1.0, 0)  # of which two fill the budget
    one = replicas.Replicas(OPTIMIZERS["lisa"], 8, 0.25, 2, 0)
    measured = replicas.measure(one, source, 64)
    assert measured.path.alignment.value == pytest.approx(0.25, abs=0.01)
    with pytest.raises(ValueError, match="4 or a multiple are needed"):
        replicas.run(one, source, 2, torch.Generator())


def test_a_step_of_replicas_is_a_step_of_one() -> None:
    """The update that is measured of a replica is the one that the optimizer makes of its gradients alone."""
    source = replicas.gaussian(24, 32, 1.0, 0)
    one = replicas.Replicas(OPTIMIZERS["galore"], 6, 0.25, 3, 0)
    paths, updates = replicas.run(one, source, 3, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    gradients = torch.stack([source.draw(3, generator) for _ in range(3)])
    p = torch.nn.Parameter(torch.zeros_like(source.g))
    optimizer = OPTIMIZERS["galore"]([p], replicas.LR, rank=6, every=3)
    before = p.detach().clone()
    for t in range(3):
        before = p.detach().clone()
        p.grad = gradients[t, 2]
        optimizer.step()
    torch.testing.assert_close((before - p.detach()) / replicas.LR, updates[2], rtol=0, atol=1e-9)
    V = optimizer.state[p]["V"]
    torch.testing.assert_close(paths[2], V @ (V.mT @ gradients[2, 2]), rtol=0, atol=1e-12)


def test_matrices_beyond_a_bucket_do_not_wait_for_each_other() -> None:
    """12 MB of them, which DDP would send in several parts."""
    parameters = [torch.nn.Parameter(torch.zeros(256, 512)) for _ in range(24)]
    with travelling("powersgd", parameters, 8, 0) as give:
        for _ in range(FIRST + 2):
            assert give(torch.ones(24, 256, 512)) >= 0
    assert all(p.grad is not None and int(torch.linalg.matrix_rank(p.grad)) == 1 for p in parameters)


@pytest.mark.parametrize("hook", HOOKS)
def test_what_arrives_through_a_hook(hook: str) -> None:
    """PowerSGD's first steps are the gradient; then G, or with feedback v = G + e, is split exactly into what arrives and what is kept."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(24, 32, dtype=torch.float64)) for _ in range(3)]
    given = torch.randn(8, 3, 24, 32, generator=generator, dtype=torch.float64)
    arrived, kept = [], 0
    with travelling(hook, parameters, 6, 5) as give:
        for G in given:
            kept = give(G)
            arrived.append(torch.stack([p.grad for p in parameters if p.grad is not None]))
    compressed = arrived[FIRST:] if hook == "powersgd" else arrived
    for X in compressed:
        assert int(torch.linalg.matrix_rank(X[0])) == 6
    assert hook != "powersgd" or torch.equal(torch.stack(arrived[:FIRST]), given[:FIRST])
    numbers = {"powersgd": 24 * 32 + (24 + 32) * 6, "law_hook": 0, "law_hook_feedback": 24 * 32}
    assert kept == 3 * 8 * numbers[hook]
    with travelling(hook, parameters, 6, 5) as give:  # a new group, and the same draws
        for G, X in zip(given, arrived, strict=True):
            give(G)
            assert torch.equal(torch.stack([p.grad for p in parameters if p.grad is not None]), X)


def test_the_hook_has_the_error_of_its_law() -> None:
    """E‖Ĝ − g‖² = (n/r)·E‖G‖² − ‖g‖² for Haar–Stiefel at c = 1 on the smaller side n."""
    source = replicas.gaussian(24, 32, 1.0, 0)
    measured = replicas.measure(replicas.Replicas(optimizers.AdamW, 6, 0.25, 2, 0, "law_hook"), source, 2048)
    signal = float(source.g.square().sum())
    assert measured.path.mse is not None
    exact = float(haar_stiefel.second_moment(np.eye(24), 6).trace()) / 24 * 2 * signal - signal
    assert (
        abs(measured.path.mse.value - exact) < 5 * measured.path.mse.standard_error and 8 * measured.path.mse.standard_error < 0.1 * exact
    )


def test_it_is_shown_reported_and_published(run: runs.Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = ["--runs-dir", str(run.path.parent), *["--draws", "128", "--period", "4", "--shape", "48", "64", "--rank", "12", "--quiet"]]
    assert cli.main(["optimizers", *again]) == 0
    shown = capsys.readouterr().out
    assert "2403.03507" in shown and "spectral_adam" in shown and "mr + 2nr + mn" in shown
    html = report.main(report.Config(run=(run.path,), out=tmp_path / "report.html")).read_text(encoding="utf-8")
    assert (
        "Optimizers whose state lives in a frame" in html
        and f"{len(optimizers.CLAIMS)} of {len(optimizers.CLAIMS)}" in html
        and "deliberately differs" in html
    )
    publish.main(publish.Config(run=(run.path,), out=tmp_path / "results"))
    assert len(pd.read_csv(tmp_path / "results" / "optimizers" / "24x32-update.csv")) == len(optimizers.ALL)
    written = page.markdown(tmp_path / "results")
    assert written.count("| galore |") == 2 and page.markdown(tmp_path) == "not yet run"


def test_every_method_names_its_paper_and_its_differences() -> None:
    assert all(page.paper(name) for name in OPTIMIZERS)
    for name in ("galore", "golore", "flora", "fira", "apollo", "frugal", "ldadam", "plumage"):
        assert len(page.differences(name)) > 60, name


def test_the_committed_checks_are_of_every_method() -> None:
    told = page.checks()
    assert set(told) == set(OPTIMIZERS)
    for name, ways in told.items():
        assert {"a", "b"} <= set(ways), name
        assert all(passed == tests for passed, tests in (count.split("/") for count in ways.values())), name


def test_updates_are_timed_beside_their_products(tmp_path: Path) -> None:
    config = bench.Config(model="tiny", group=("optimizer",), rank=0.25, sequences=2, length=32, repeats=5, runs_dir=tmp_path, quiet=True)
    found = [row for row in bench.main(config).rows() if row["kind"] == "optimizer"]
    assert [row["name"] for row in found if row["over"] == "two products"] == list(OPTIMIZERS)
    alone = {row["name"]: row for row in found if row["over"] == "two products"}
    assert all(row["amortised"] >= row["seconds"] > 0 for row in alone.values())
    assert {name for name, row in alone.items() if row["refresh"] is None} == {
        "ldadam",
        "foam",
        "dct_adamw",
        "muon",
        "trion",
        "dion",
        "mofasgd",
        "lomo",
        "adalomo",
        "gradlite",
    }
    assert alone["galore"]["period"] == 200 and alone["galore"]["refresh"] > alone["golore"]["refresh"]
    refreshes = [row for row in found if row["name"] == "galore refresh"]
    assert refreshes and all(row["energy"] > 0.9 and row["seconds"] > 0 for row in refreshes)
