"""Live measurement: unbiased for the gradient of the data, exact for the law, and without influence on training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import theory
from estimators import LAWS, Conversion, convert
from experiments import pretrain
from experiments.training.live import Live
from experiments.training.trainer import Trainer
from tests.experiments.test_pretrain import few, losses
from tests.monte_carlo import assert_mean
from theory import mse

N, M, R, ROWS = 12, 16, 3, 40


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(N, M, bias=False), nn.Tanh(), nn.Linear(M, 10, bias=False)).double()


def inputs_and_deltas() -> tuple[Tensor, Tensor]:
    """X and Δ of one layer with a decaying spectrum; the second half of the rows is like the first, so that most is signal."""
    g = torch.Generator().manual_seed(3)
    X = torch.randn(ROWS // 2, N, generator=g, dtype=torch.float64) * torch.logspace(0, -1.5, N, dtype=torch.float64)
    D = torch.randn(ROWS // 2, M, generator=g, dtype=torch.float64) / ROWS
    other = X + 0.1 * X.abs() * torch.randn(X.shape, generator=g, dtype=torch.float64)
    return torch.cat([X, other]), torch.cat([D, D])


def halves(X: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    A, B = (2 * D[part].mT @ X[part] for part in (slice(0, ROWS // 2), slice(ROWS // 2, ROWS)))
    return A, B


def fitted(law: str, **options: Any) -> tuple[Live, Conversion]:
    """A conversion of one layer whose fitted laws know an earlier gradient."""
    model = nn.Sequential(nn.Linear(N, M, bias=False)).double()
    handle = convert(model, law=law, rank=R, state="keep", refresh_every=10**6, **options)
    target = 3 * torch.randn(N, M, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for step in range(2):
        data = torch.randn(32, N, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * torch.logspace(0, -1, N).double()
        (model(data) - data @ target).square().mean().backward()
        handle.step()
    return Live(handle, 2, 1), handle


def look(live: Live, X: Tensor, D: Tensor) -> dict[str, Any]:
    """The row of the only layer."""
    live._look("0", X, D)
    return live.rows()[0]


def parameters(law: Any) -> dict[str, Any]:
    """The keywords that theory takes for a fitted or sparse law."""
    known = {
        name: getattr(law, name) for name in ("basis", "sigma", "tail", "floor", "replacement") if getattr(law, name, None) is not None
    }
    return {name: v.double().numpy() if isinstance(v, Tensor) else v for name, v in known.items()}


CASES = [(law, c) for law in LAWS for c in (1.0, 0.5)]


@pytest.mark.parametrize("law, c", CASES)
def test_predicted_is_the_error_that_theory_states(law: str, c: float) -> None:
    """On the two halves of a given batch: S = (AᵀA + BᵀB)/2 and gᵀg in the place of (AᵀB + BᵀA)/2."""
    live, handle = fitted(law, c=c)
    X, D = inputs_and_deltas()
    row = look(live, X, D)
    A, B = (half.numpy() for half in halves(X, D))
    signal, second = (A.T @ B + B.T @ A) / 2, (A.T @ A + B.T @ B) / 2
    used = handle.law_of("0")
    given = parameters(used)
    if used.stem == "truncated" and "basis" not in given:
        given["basis"] = np.eye(N, R)
    moments = theory.moments(used.stem, N, R, c, **given)
    assert row["predicted"] == pytest.approx(mse.ipa(moments, second - signal, signal).total, rel=1e-4)
    step = mse.ipa(moments, (second - signal) / 2, signal).total  # the gradient of both halves has half the noise
    assert row["predicted_step"] == pytest.approx(step, rel=1e-4)
    assert row["signal"] == pytest.approx(np.trace(signal), rel=1e-5) and row["noise"] == pytest.approx(np.trace(second - signal), rel=1e-4)
    assert row["tokens"] == ROWS // 2 and row["noise_scale_tokens"] == pytest.approx(ROWS // 2 * row["noise"] / row["signal"])


@pytest.mark.parametrize(
    "law, c", [("haar_stiefel", 1.0), ("haar_stiefel", 0.5), ("spectral", 1.0), ("coordinate_replacement", 1.0), ("dct", 2.0)]
)
def test_realised_is_predicted_on_average_over_draws(law: str, c: float, generator: torch.Generator) -> None:
    live, handle = fitted(law, c=c)
    X, D = inputs_and_deltas()
    predicted = look(live, X, D)["predicted"]

    def draw(size: int, unused: torch.Generator) -> Tensor:
        del unused  # a draw is keyed
        values = []
        for _draw in range(size):
            handle.redraw()
            values.append(look(live, X, D)["realised"])
        return torch.tensor(values, dtype=torch.float64)

    assert_mean(draw, predicted, draws=1000, resolution=0.5 * predicted, generator=generator)


@pytest.mark.parametrize("law", ["top_svd", "fixed_basis"])
def test_realised_is_predicted_where_nothing_is_random(law: str) -> None:
    row = look(fitted(law, c=0.7)[0], *inputs_and_deltas())
    assert row["realised"] == pytest.approx(row["predicted"], rel=1e-4)


@pytest.mark.parametrize("law", LAWS)
def test_captured_is_the_energy_inside_the_span(law: str) -> None:
    live, handle = fitted(law)
    X, D = inputs_and_deltas()
    A, B = halves(X, D)
    for _ in range(8):
        handle.redraw()
        V = handle.layers["0"].basis()
        P = V @ torch.linalg.pinv(V, rtol=1e-6)
        expected = ((A @ P).square().sum() + (B @ P).square().sum()) / (A.square().sum() + B.square().sum())
        assert look(live, X, D)["captured"] == pytest.approx(float(expected), rel=1e-4)
    if law == "coordinate_replacement":  # 8 draws of 3 among 12: one holds a coordinate twice
        draws = []
        for _ in range(30):
            handle.redraw()
            chosen = handle.layers["0"].basis().abs().sum(1).nonzero().flatten()
            expected = (A[:, chosen].square().sum() + B[:, chosen].square().sum()) / (A.square().sum() + B.square().sum())
            assert look(live, X, D)["captured"] == pytest.approx(float(expected), rel=1e-4)
            draws.append(len(chosen))
        assert min(draws) < R


def test_signal_and_noise_are_those_of_the_data(generator: torch.Generator) -> None:
    """The loss divided by 4. Batches of 8 rows drawn with replacement from 60: ‖g‖² of all 60, and the variance of a mean of 4."""
    g = torch.Generator().manual_seed(1)
    X = torch.randn(60, N, generator=g, dtype=torch.float64) + 1.0
    T = torch.randn(60, 10, generator=g, dtype=torch.float64) + 1.0
    plain = network()
    each = []
    for i in range(60):
        plain.zero_grad()
        (plain(X[i : i + 1]) - T[i : i + 1]).square().mean().backward()
        each.append([p.grad.clone() for p in plain.parameters() if p.grad is not None])
    expected = []
    for gradients in zip(*each):
        all_of_it = torch.stack(gradients)
        mean = all_of_it.mean(0)
        expected += [float(mean.square().sum()), float((all_of_it - mean).square().sum()) / 60 / 4]
    expected += [expected[0] + expected[2], expected[1] + expected[3]]
    model = network()
    live = Live(convert(model, rank=R), 8, 4)

    def draw(size: int, generator: torch.Generator) -> Tensor:
        values = []
        for _ in range(size):
            rows = torch.randint(60, (8,), generator=generator)
            live.arm()
            ((model(X[rows]) - T[rows]).square().mean() / 4).backward()
            found = {row["layer"]: row for row in live.rows()}
            values.append([found[layer][name] for layer in ("0", "2", "all") for name in ("signal", "noise")])
        return torch.tensor(values, dtype=torch.float64)

    assert_mean(lambda size, g: draw(size, g) / torch.tensor(expected), torch.ones(6), draws=800, resolution=0.2, generator=generator)
    assert live.rows() == []  # only the pass that was armed


# in training


def live_rows(made: Trainer, steps: int = 1) -> list[dict[str, Any]]:
    made.seconds = 1.0  # ``train`` counts them
    return [row for _ in range(steps) for row in made._rows(made._step()) if row["kind"] == "live"]


@pytest.fixture
def trainer(text: Path, tmp_path: Path) -> Callable[..., Trainer]:
    def make(**fields: Any) -> Trainer:
        config = few(text, tmp_path, **{"measure_every": 1, **fields})
        return Trainer(config, pretrain.opened(config))

    return make


@pytest.mark.parametrize("law", ["haar_stiefel", "spectral"])
def test_measuring_does_not_touch_the_training(law: str, text: Path, tmp_path: Path) -> None:
    with_it, without = (pretrain.main(few(text, tmp_path, law=law, steps=5, measure_every=every)) for every in (1, 0))
    assert losses(with_it) == losses(without) and losses(with_it, "eval") == losses(without, "eval")
    assert not any(row["kind"] == "live" for row in without.rows())


def test_rows_of_a_training_run(trainer: Callable[..., Trainer]) -> None:
    made = trainer(measure_every=2, sequences=4)
    rows = live_rows(made, 3)
    assert [row["step"] for row in rows] == [1] * 29 + [3] * 29
    layers, total = rows[:28], rows[28]
    assert total["layer"] == "all" and {row["layer"] for row in layers} == set(made.method.handle.layers)  # pyright: ignore
    for name in ("signal", "noise", "predicted", "realised"):
        assert total[name] == pytest.approx(sum(row[name] for row in layers), rel=1e-9)
    second = [row["signal"] + row["noise"] for row in layers]
    assert total["captured"] == pytest.approx(np.average([row["captured"] for row in layers], weights=second))
    assert all(0 <= row["captured"] <= 1 and row["tokens"] == 30 for row in layers)
    assert total["captured"] == pytest.approx(0.25, abs=0.15)  # r/n of a direction chosen blindly
    assert made.live is not None and rows[-1]["cost_share"] == pytest.approx(made.live.seconds, abs=1e-5)


def test_the_share_of_time_is_recorded(text: Path, tmp_path: Path) -> None:
    run = pretrain.main(few(text, tmp_path, measure_every=1))
    rows = [row for row in run.rows() if row["kind"] == "live"]
    assert all(0 < row["cost_share"] < 1 for row in rows) and 0 < run.rows()[-1]["measuring_share"] < 1
    assert run.rows()[-1]["measuring_share"] == pytest.approx(rows[-1]["cost_share"], abs=1e-4)


def test_micro_batches_are_measured_as_undivided(trainer: Callable[..., Trainer]) -> None:
    whole, part = live_rows(trainer(sequences=2)), live_rows(trainer(sequences=6, accumulate=3))
    for a, b in zip(whole, part, strict=True):
        assert [b[name] for name in ("signal", "noise", "predicted", "realised", "captured")] == pytest.approx(
            [a[name] for name in ("signal", "noise", "predicted", "realised", "captured")], rel=1e-3, abs=1e-9
        )
        assert a["tokens"] == b["tokens"] == 15


def test_half_precision_and_gradients_that_are_not_finite(trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = live_rows(trainer())[-1]
    for precision in ("bf16", "bf16_weights"):
        row = live_rows(trainer(precision=precision))[-1]
        assert row["signal"] == pytest.approx(plain["signal"], rel=0.1) and row["predicted"] == pytest.approx(plain["predicted"], rel=0.1)
    loss = Trainer._loss
    monkeypatch.setattr(Trainer, "_loss", lambda self, ids: loss(self, ids) * float("nan"))
    rows = live_rows(trainer(seed=1))
    assert len(rows) == 29 and json.dumps(rows) and rows[-1]["noise_scale_tokens"] is None
