"""Training with compressed inputs: every law on the tokens, the same start and a lower loss, steps that are skipped, samples that are remembered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from estimators import LAWS, WTACRS, LawOnFeatures, LawOnTokens, VeLoRA
from experiments import cli, pretrain, runs
from experiments.finetuning import tuner
from experiments.finetuning.config import Tuning
from experiments.training import models
from experiments.training.methods import METHODS, Compressed
from experiments.training.trainer import Trainer
from tests.experiments.test_finetune_training import config as config  # a fixture
from tests.experiments.test_pretrain import losses
from tests.experiments.test_pretrain import train as train
from tests.experiments.test_pretrain import trainer as trainer

RULES = ("tokens", "rad", "wta_crs", "velora")


@pytest.mark.parametrize("law", LAWS)
def test_every_law_trains_on_tokens(law: str, train: Callable[..., runs.Run]) -> None:
    run = train(method="tokens", law=law, rank=0.5, steps=5)
    assert losses(run)[0] == pytest.approx(7.7919, abs=1e-3)  # all begin with the same function and the same batch
    assert losses(run, "eval")[0] < losses(run)[0] - 1.5
    assert run.path.name.startswith(f"pretrain-tiny-tokens-{law}")


@pytest.mark.parametrize("method", ["rad", "wta_crs", "velora", "compact"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_rule_trains(method: str, precision: str, train: Callable[..., runs.Run]) -> None:
    run = train(method=method, rank=0.5, steps=5, precision=precision)
    assert losses(run)[0] == pytest.approx(7.7919, abs=1e-2) and losses(run, "eval")[0] < losses(run)[0] - 1.5


def test_the_command(text: Path, tmp_path: Path) -> None:
    fields = f"--data {text} --runs-dir {tmp_path} --sequences 2 --length 16 --quiet".split()
    assert cli.main(["pretrain", "tiny", "--method", "tokens", "--law", "coordinate", "--steps", "3", *fields]) == 0
    assert cli.main(["pretrain", "tiny", "--method", "tokens", "--law", "normal", *fields]) == 2


def test_ranks_are_of_tokens_of_features_and_of_groups() -> None:
    made: dict[str, Compressed] = {}
    for name in RULES:
        method = METHODS[name](models.build("tiny", 0), pretrain.Config(method=name, rank=0.3, law="gaussian"))
        assert isinstance(method, Compressed)
        made[name] = method
    keepers = {name: {layer.in_features: layer.keeper for layer in method.compression.layers.values()} for name, method in made.items()}
    tokens, rad, wta, velora = (keepers[name] for name in RULES)
    assert str(tokens[128]) == "LawOnTokens(Gaussian, rank=0.3)" and str(rad[352]) == "LawOnFeatures(Rademacher, rank=0.3)"
    assert isinstance(tokens[128], LawOnTokens) and isinstance(rad[128], LawOnFeatures) and isinstance(wta[128], WTACRS)
    assert isinstance(velora[128], VeLoRA) and velora[128].count(128) == 32  # 38 rounded down to a divisor
    assert isinstance(velora[352], VeLoRA) and velora[352].count(352) == 88
    assert [made[name].compression.unbiased for name in RULES] == [True, True, True, False]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", RULES)
def test_a_step_without_a_finite_gradient_leaves_no_trace(
    method: str, wrong: float, trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of one token is not finite, which may be one that no layer keeps."""
    made = trainer(method=method, rank=0.1, steps=4)
    made.method.visit(torch.arange(2))
    made._step()
    before = [state.clone() for state in made.model.state_dict().values()]
    original = Trainer._loss

    def loss(self: Trainer, ids: Tensor) -> Tensor:
        def spoil(D: Tensor) -> Tensor:
            D = D.clone()
            D[0, 3, 0] = wrong
            return D

        hook = self.model.model.layers[3].register_forward_hook(lambda _, __, out: out.register_hook(spoil) and None)  # pyright: ignore
        value = original(self, ids)
        hook.remove()
        return value

    monkeypatch.setattr(Trainer, "_loss", loss)
    made.method.visit(torch.arange(2))
    row = made._step()
    assert row["kind"] == "skip" and made.skipped == 1 and made.method.steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, made.model.state_dict().values(), strict=True))
    assert isinstance(made.method, Compressed)
    for layer in made.method.compression.layers.values():
        assert all(bool(value.isfinite().all()) for value in layer.keeper.state_dict().values())
    monkeypatch.setattr(Trainer, "_loss", original)
    assert made._step()["kind"] == "train"


def test_fine_tuning_says_which_samples_it_shows(config: Callable[..., Tuning]) -> None:
    one = config(method="wta_crs", sequences=4)
    run = tuner.Tuner(one, tuner.opened(one))
    shown = {place for _ in range(3) for place in (run._places(), run.advance())[0]}
    method = run.way.method  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(method, Compressed)
    tables = [layer.keeper.table for layer in method.compression.layers.values() if isinstance(layer.keeper, WTACRS)]
    assert len(tables) == len(method.compression.layers) and all(set(table) == shown for table in tables) and len(shown) == 12
    lengths = {len(row) for row in tables[0].values()}
    assert max(lengths) <= 16 and any(bool((row > 0).all()) for row in tables[0].values())


def test_as_many_rows_as_tokens_give_the_gradient_itself() -> None:
    """In float64, of all parameters of the model."""
    ids = torch.randint(0, 2560, (2, 12), generator=torch.Generator().manual_seed(0))

    def gradients(**fields: Any) -> list[Tensor]:
        model: Any = models.build("tiny", 0).double()
        METHODS[fields["method"]](model, pretrain.Config(**fields))
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters()]

    full = gradients(method="adamw")
    for fields in ({"method": "tokens", "law": "coordinate"}, {"method": "tokens", "law": "haar_stiefel"}, {"method": "wta_crs"}):
        for ours, plain in zip(gradients(rank=1000, **fields), full, strict=True):
            torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10)
