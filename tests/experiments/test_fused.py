"""Training whose updates lie inside the backward pass: the same run as without, resumed and skipped like it, and where it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import pretrain, runs
from experiments.training.trainer import Trainer
from tests.experiments.test_pretrain import few, losses
from tests.experiments.test_pretrain import train as train  # a fixture
from tests.experiments.test_pretrain import trainer as trainer

METHODS = ("lomo", "adalomo", "galore", "gradlite", "lisa")


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_run_without(method: str, text: Path, tmp_path: Path) -> None:
    """To the last bit without clipping; with it up to the rounding of a norm that is added up in another order.

    GradLite then takes plain steps: directions of its basis that hold nothing but rounding are magnified by Adam, and a clip of 1 + 1e-6 times the
    size moves the fourth loss by 1e-3."""
    for clip in (0.0, 0.5):
        fields: dict[str, Any] = {"method": method, "rank": 8, "steps": 4, "refresh_every": 2, "clip": clip}
        fields |= {"inner": "sgd"} if clip and method == "gradlite" else {}
        plain = pretrain.main(few(text, tmp_path / f"plain {clip}", **fields))
        fused = pretrain.main(few(text, tmp_path / f"fused {clip}", fused=True, **fields))
        if clip:
            assert losses(fused) == pytest.approx(losses(plain), rel=1e-5)
            norms = [[row["grad_norm"] for row in run.rows() if row["kind"] == "train"] for run in (fused, plain)]
            assert norms[0] == pytest.approx(norms[1], rel=1e-3) and max(norms[1]) > clip
        else:
            assert losses(fused) == losses(plain) and losses(fused, "eval") == losses(plain, "eval")


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_skipped_named_and_counted(clip: float, trainer: Callable[..., Trainer]) -> None:
    """With two passes nothing changes; with one what came before it has: the last layers. Then training goes on."""
    made = trainer(method="lomo", fused=True, clip=clip, steps=8)
    made._step()
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    middle = made.model.get_parameter("model.layers.1.mlp.down_proj.weight")
    handle = middle.register_hook(lambda G: G * float("nan"))
    row = made._step()
    handle.remove()
    assert row["kind"] == "skip" and "model.layers.1.mlp.down_proj.weight is NaN" in row["where"] and made.skipped == 1
    changed = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    first = {name for name in before if name.startswith(("model.embed", "model.layers.0."))}
    assert not changed & (first | {"model.layers.1.mlp.down_proj.weight"}) and bool(changed) is (clip == 0)
    assert all(p.grad is None for p in made.model.parameters())
    assert made._step()["kind"] == "train" and made.skipped == 1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"method": "adamw"}, "fused updates are for the optimizers of `lowrank optimizers`; method=adamw has torch's"),
        ({"method": "lowrank"}, "method=lowrank has torch's"),
        ({"method": "lomo", "accumulate": 2, "sequences": 4}, "while gradients accumulate they are held for all layers"),
        ({"method": "galore", "rank": 8, "accumulate": 2, "sequences": 4}, "accumulate=2, clip_total=1.0"),
    ],
)
def test_what_cannot_be_fused_is_said(fields: dict[str, Any], message: str, trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(runs.WrongInput, match=message):
        trainer(fused=True, **fields)


def test_accumulation_without_clipping_is_fused_where_the_method_allows(text: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"method": "galore", "rank": 8, "steps": 3, "clip": 0.0, "accumulate": 2, "sequences": 4}
    plain, fused = (pretrain.main(few(text, tmp_path / str(how), fused=how, **fields)) for how in (False, True))
    assert losses(fused) == losses(plain)
