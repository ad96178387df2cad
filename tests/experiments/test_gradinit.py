"""Scales before training: exact optima of quadratics, the norm that may not grow, and what a run makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments import pretrain, runs
from experiments.training import gradinit, models
from experiments.training.gradinit import FirstStep, scales
from experiments.training.trainer import Trainer
from tests.experiments.test_pretrain import few
from tests.experiments.test_pretrain import trainer as trainer

ETA, RATE = 0.05, 0.005


def batches() -> Iterator[Tensor]:
    return (torch.zeros(2, 1) for _ in itertools.count())


def matrix(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def found(loss: Callable[[Mapping[str, Tensor]], Tensor], weights: dict[str, Tensor], first: FirstStep, **more: Any) -> dict[str, float]:
    return scales(lambda w, _: loss(w), weights, batches(), first, rounds=600, rate=RATE, **more)[0]


def test_the_best_scale_of_a_quadratic_under_a_sign_step(generator: torch.Generator) -> None:
    """L = ½‖W − 2W₀‖² at αW₀, α < 2: the step goes to αW₀ + η sign(W₀), best at α = 2 − η‖W₀‖₁/‖W₀‖². Vectors keep their values."""
    W, v = matrix(generator, 5, 7), matrix(generator, 3)
    loss = lambda w: 0.5 * (w["W"] - 2 * W).square().sum() + 0 * w["v"].sum()  # noqa: E731
    scale = found(loss, {"W": W, "v": v}, FirstStep({"W": ETA, "v": ETA}, {}))
    assert scale.keys() == {"W"} and scale["W"] == pytest.approx(2 - ETA * float(W.abs().sum() / W.square().sum()), abs=RATE)


def test_a_step_in_a_subspace_is_lifted(generator: torch.Generator) -> None:
    """L as above; the step goes to αW₀ + η sign(W₀V)Vᵀ, best at α = 2 − η‖W₀V‖₁/‖W₀‖²."""
    W, V = matrix(generator, 5, 7), 0.3 * matrix(generator, 7, 2)
    loss = lambda w: 0.5 * (w["W"] - 2 * W).square().sum()  # noqa: E731
    scale = found(loss, {"W": W}, FirstStep({"W": ETA}, {"W": V}))
    assert scale["W"] == pytest.approx(2 - ETA * float((W @ V).abs().sum() / W.square().sum()), abs=RATE)


def test_the_best_scale_under_gradient_descent_needs_the_second_derivative() -> None:
    """L = ½ Σ hᵢ(wᵢ − tᵢ)² at w = α(1, 1): the step leaves (1 − ηhᵢ)(α − tᵢ). At ηh₂ = 1 it solves the second entry from everywhere, and α = t₁ is
    best; without the second derivative of L the objective would be seen to pull α to t₂ as well."""
    h = torch.tensor([[1.0, 1.0 / ETA]], dtype=torch.float64)
    T = torch.tensor([[2.0, 0.5]], dtype=torch.float64)
    loss = lambda w: 0.5 * (h * (w["W"] - T).square()).sum()  # noqa: E731
    for signs, best in ((False, True), (True, False)):
        scale = found(loss, {"W": torch.ones(1, 2, dtype=torch.float64)}, FirstStep({"W": ETA}, {}, signs), gamma=1e9)
        assert (scale["W"] == pytest.approx(2.0, abs=RATE)) == best


@pytest.mark.parametrize("signs", [True, False])
def test_the_norm_of_the_gradient_may_not_grow(signs: bool, generator: torch.Generator) -> None:
    """L = −½‖W‖² falls for ever with α, and so does its gradient grow: α stays where the norm is γ times what it was."""
    W = matrix(generator, 4, 6)
    loss = lambda w: -0.5 * w["W"].square().sum()  # noqa: E731
    for gamma in (1.0, 1.5, 0.5):
        scale = found(loss, {"W": W}, FirstStep({"W": ETA}, {}, signs), gamma=gamma)
        assert scale["W"] == pytest.approx(gamma, abs=2 * RATE)
    assert found(loss, {"W": W}, FirstStep({"W": ETA}, {}, signs), gamma=1e-9)["W"] == gradinit.FLOOR


def test_what_it_says_of_itself_is_on_new_batches(generator: torch.Generator) -> None:
    W = matrix(generator, 4, 6)
    asked: list[int] = []

    def numbered() -> Iterator[Tensor]:
        for i in itertools.count():
            yield torch.full((2, 1), float(i), dtype=torch.float64)

    def loss(w: Mapping[str, Tensor], batch: Tensor) -> Tensor:
        asked.append(int(batch.max()))
        return 0.5 * (w["W"] - (2 + 0.01 * batch.mean()) * W).square().sum()

    scale, told = scales(loss, {"W": W}, numbered(), FirstStep({"W": ETA}, {}), rounds=20, rate=RATE)
    last = asked.index(21)
    assert set(asked[:last]) <= set(range(21)) and set(asked[last:]) == set(range(21, 21 + 2 * gradinit.FRESH))
    step = lambda a, i: (a * W + ETA * W.sign() - (2 + 0.01 * (i + 1)) * W).square().sum() / 2  # noqa: E731
    gains = [float(step(scale["W"], i) - step(1.0, i)) for i in range(21, 21 + 2 * gradinit.FRESH, 2)]
    assert told["after"] - told["before"] == pytest.approx(sum(gains) / len(gains), rel=1e-9)
    assert told["standard_error"] == pytest.approx(float(torch.tensor(gains).double().std() / len(gains) ** 0.5), rel=1e-5)


# in a run


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradinit, "ROUNDS", 3)
    monkeypatch.setattr(gradinit, "FRESH", 2)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "fields", [{}, {"method": "adamw"}, {"optimizer": "sgd", "lr": 1e-2}, {"method": "compact"}, {"law": "spectral"}], ids=str
)
def test_a_run_begins_from_scaled_matrices(fields: dict[str, Any], trainer: Callable[..., Trainer]) -> None:
    made = trainer(init="gradinit", **fields)
    recorded = made.run.read("init.json")
    plain = dict(models.build("tiny", 0).named_parameters())
    assert recorded["scales"].keys() == {name for name, p in plain.items() if p.ndim == 2}
    assert len(set(recorded["scales"].values())) > 5 and all(0.9 < scale < 1.1 for scale in recorded["scales"].values())
    for name, p in plain.items():
        assert torch.equal(made.model.get_parameter(name), p * recorded["scales"].get(name, 1.0))
    assert torch.equal(made.batches.next(), trainer(**fields).batches.next())  # the data order is that of a plain run


@pytest.mark.usefixtures("short")
def test_scales_are_found_once(trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    first = trainer(init="gradinit")
    monkeypatch.setattr(gradinit, "scales", lambda *_: pytest.fail("found again"))
    again = trainer(init="gradinit")
    assert all(torch.equal(p, again.model.get_parameter(name)) for name, p in first.model.named_parameters())


def test_what_has_another_first_step_is_refused(text: Path, tmp_path: Path) -> None:
    for fields in ({"method": "lora"}, {"method": "galore"}, {"optimizer": "muon"}):
        config = few(text, tmp_path, init="gradinit", **fields)
        with pytest.raises(runs.WrongInput, match="init=gradinit knows the first step of adamw, lowrank and compact"):
            pretrain.main(config)
    assert not list(tmp_path.glob("pretrain-*"))
    with pytest.raises(ValueError, match="unknown init 'best', known are plain, gradinit"):
        few(text, tmp_path, init="best")
