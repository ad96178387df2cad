"""The methods: which parameters they train, that they begin and end as the same function, and what happens between."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from estimators import CompressedLinear, LowRankLinear, keyed
from experiments import pretrain, runs
from experiments.training import models
from experiments.training.methods import METHODS, Lora, LowRank, Method, Projected, ReLora
from experiments.training.methods.lora import REWARM
from experiments.training.trainer import Trainer
from optimizers import Int8Linear
from tests.experiments.test_pretrain import few

IDS = torch.randint(0, 2560, (2, 12), generator=torch.Generator().manual_seed(0))


def made(method: str, **fields: Any) -> tuple[nn.Module, Method]:
    model = models.build("tiny", 0)
    return model, METHODS[method](model, pretrain.Config(method=method, **fields))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def base_of(layer: Any) -> Tensor:
    return layer.get_base_layer().weight


def advance(model: nn.Module, method: Method, steps: int, optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    if optimizer is None and isinstance(method, Projected):
        optimizer = method.updates(pretrain.Config(method=next(name for name, kind in METHODS.items() if type(method) is kind), lr=1e-3))
    optimizer = optimizer or torch.optim.AdamW([*method.matrices(), *method.others()], lr=1e-3, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        method.after_step(optimizer, 1.0)
    return optimizer


@pytest.mark.parametrize("name", METHODS)
def test_matrices_and_others_are_all_that_is_trained(name: str) -> None:
    model, method = made(name)
    matrices, others = method.matrices(), method.others()
    mine, rest = {id(p) for p in matrices}, {id(p) for p in others}
    assert len(mine) == len(matrices) and len(rest) == len(others) and not mine & rest
    assert mine | rest == {id(p) for p in model.parameters() if p.requires_grad}
    named = {id(p): name for name, p in model.named_parameters()}
    kinds = {"lowrank": ("B",), "compact": ("B",), "lora": ("lora_A", "lora_B")}.get(name.removeprefix("re"), ("weight",))
    assert all(any(kind in named[id(p)].split(".") for kind in kinds) for p in matrices)
    assert len(matrices) == 28 * len(kinds) and all(".layers." in named[id(p)] and "layernorm" not in named[id(p)] for p in matrices)
    plain = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    norms = {f"model.layers.{i}.{norm}.weight" for i in range(4) for norm in ("input_layernorm", "post_attention_layernorm")}
    assert {named[i] for i in rest} == plain | norms  # trained in full by all


@pytest.mark.parametrize("name", METHODS)
def test_all_begin_and_end_as_the_same_function(name: str) -> None:
    start = logits(models.build("tiny", 0))
    model, method = made(name, refresh_every=3, lift_every=3)
    codes = any(isinstance(layer, Int8Linear) for layer in model.modules())
    torch.testing.assert_close(logits(model), start, rtol=0, atol=2e-2 if codes else 1e-5)  # 8-bit codes of weights
    advance(model, method, 5)
    trained = logits(model)
    assert float((trained - start).abs().max()) > 1e-2
    end = method.finalize()
    assert end is model and list(model.state_dict()) == list(models.build("tiny", 0).state_dict())
    assert all(type(layer) is nn.Linear for layer in model.modules() if isinstance(layer, nn.Linear))
    assert not any(isinstance(layer, LowRankLinear | CompressedLinear) for layer in model.modules()) and all(
        p.requires_grad for p in model.parameters()
    )
    torch.testing.assert_close(logits(model), trained, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", METHODS)
def test_the_global_generator_is_left_alone(name: str) -> None:
    before = torch.get_rng_state()
    model, method = made(name, refresh_every=1)
    advance(model, method, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_low_rank_is_convert_with_the_fields_of_the_configuration() -> None:
    model, method = made("lowrank", rank=8, law="spectral", keep=3.0, seed=4, c=0.5, refresh_every=7, basis_every=2, store=False)
    assert isinstance(method, LowRank) and method.handle is method.conversion
    handle = method.conversion
    assert (handle.seed, handle.refresh_every, handle.basis_every, handle.store) == (4, 7, 2, False)
    assert handle.fitting.keep == 3.0 and handle.fitting.c == 0.5 and {layer.rank for layer in handle.layers.values()} == {8}
    assert set(METHODS["lowrank"].needs) <= set(vars(pretrain.Config())) and "lm_head.weight" in method.left_alone
    advance(model, method, 2)
    assert handle.steps == method.steps == 2 and method.state_dict()["handle"]["draws"] == 1


def test_policies_reach_the_conversion() -> None:
    _, method = made("lowrank", second_moment="random", state="keep")
    assert isinstance(method, LowRank) and (method.conversion.transport.policy, method.conversion.transport.second) == ("keep", "random")


# coupled steps


def weights(name: str, text: Path, folder: Path, **fields: Any) -> dict[str, Tensor]:
    """At the end of four steps."""
    config = few(text, folder, method=name, save_model=True, **fields)
    run = pretrain.main(config)
    return load_file(run.path / "model" / "model.safetensors")


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def test_a_coupled_run_is_the_plain_one_where_every_step_is_lifted(text: Path, tmp_path: Path) -> None:
    """B is zero before every step: there is nothing to correct. Lifted more rarely, it is another run."""
    common: dict[str, Any] = {"steps": 6, "refresh_every": 6}
    every = [weights("lowrank", text, tmp_path, coupled=coupled, **common) for coupled in (0.0, 10.0)]
    rare = [weights("lowrank", text, tmp_path, coupled=coupled, lift_every=6, **common) for coupled in (0.0, 10.0)]
    assert same(*every) and not same(*rare)
    lora = [weights("lora", text, tmp_path, coupled=coupled, **common) for coupled in (0.0, 10.0)]
    assert not same(*lora)


@pytest.mark.parametrize("name", ["lowrank", "compact", "lora", "relora"])
def test_pairs_are_the_factors_of_the_moving_part(name: str) -> None:
    """What the model adds to its weights is X·Aᵀ (times LoRA's scale), and X is a parameter that is trained."""
    _, method = made(name, rank=4, lora_scale=1.0, lift_every=5)
    trained = {p.data_ptr() for p in method.matrices()}
    pairs = method.pairs()
    assert len(pairs) == 28 and {X.data_ptr() for X, _ in pairs} <= trained
    with torch.no_grad():
        for i, (X, A) in enumerate(pairs):
            X.copy_(torch.randn(X.shape, generator=torch.Generator().manual_seed(i)))
            assert A.requires_grad == name.endswith("lora") and (A.data_ptr() in trained) == name.endswith("lora")
    added = [(X @ A.mT).detach() for X, A in pairs]
    finished = method.finalize()
    plain = models.build("tiny", 0).state_dict()
    matrices = [key for key in plain if key.endswith("proj.weight")]
    for key, change in zip(matrices, added, strict=True):
        torch.testing.assert_close(finished.state_dict()[key], plain[key] + change, rtol=1e-5, atol=1e-5)


# LoRA


def test_lora_is_W_plus_scaled_BA() -> None:
    model, method = made("lora", rank=0.25, lora_scale=3.0, seed=5)
    assert isinstance(method, Lora)
    base = models.build("tiny", 0).state_dict()
    adapters = method.adapters()
    assert len(adapters) == 28
    for name, layer in adapters.items():
        A, B = (cast(nn.Linear, factor["default"]).weight.detach() for factor in (layer.lora_A, layer.lora_B))
        n, m = A.shape[1], B.shape[0]
        assert A.shape == (n // 4, n) and B.shape == (m, n // 4) and layer.scaling["default"] == pytest.approx(3.0)
        assert float(A.abs().max()) <= n**-0.5 and float(A.std()) == pytest.approx((3 * n) ** -0.5, rel=0.05) and not B.any()
        assert not base_of(layer).requires_grad and torch.equal(base_of(layer), base[f"{name}.weight"])
    same, other = (METHODS["lora"](models.build("tiny", 0), pretrain.Config(method="lora", seed=seed)) for seed in (5, 6))
    assert all(torch.equal(a, b) for a, b in zip(method.matrices(), same.matrices(), strict=True))
    assert not torch.equal(method.matrices()[0], other.matrices()[0])
    advance(model, method, 2)
    name, layer = next(iter(adapters.items()))
    A, B = (cast(nn.Linear, factor["default"]).weight.detach() for factor in (layer.lora_A, layer.lora_B))
    method.finalize()
    torch.testing.assert_close(model.get_submodule(name).weight.detach(), base[f"{name}.weight"] + 3 * B @ A, rtol=0, atol=1e-6)  # pyright: ignore


# ReLoRA


def test_a_restart_keeps_the_function_and_forgets_the_rest() -> None:
    model, method = made("relora", rank=16, refresh_every=3, seed=9)
    assert isinstance(method, ReLora)
    optimizer = advance(model, method, 2)
    optimizer.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    before, weights = logits(model), {name: base_of(layer).clone() for name, layer in method.adapters().items()}
    embedding = optimizer.state[method.others()[0]]["exp_avg"].clone()
    assert all(bool(optimizer.state[p]["exp_avg_sq"].any()) for p in method.matrices())
    method.after_step(optimizer, 1.0)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    for name, layer in method.adapters().items():
        A, B = (cast(nn.Linear, factor["default"]).weight for factor in (layer.lora_A, layer.lora_B))
        expected = torch.empty_like(A)
        nn.init.kaiming_uniform_(expected, a=math.sqrt(5), generator=keyed.generator(9, f"{name}.relora", 3))
        assert torch.equal(A, expected) and not B.any() and not layer.merged
        assert not torch.equal(base_of(layer), weights[name])
    moments = torch.cat([optimizer.state[p][key].flatten() for p in method.matrices() for key in ("exp_avg", "exp_avg_sq")])
    count, share = len(moments), float((moments != 0).double().mean())
    assert share == pytest.approx(0.001, abs=5 * (0.001 / count) ** 0.5) and share > 0  # 99.9 % pruned, within 5 standard errors
    assert torch.equal(optimizer.state[method.others()[0]]["exp_avg"], embedding)  # the others keep theirs
    advance(model, method, 3, optimizer)
    assert method.steps == 6 and len(method.adapters()) == 28


def test_the_learning_rate_comes_back_after_a_restart_only() -> None:
    _, method = made("relora", refresh_every=8)
    assert [method.lr_factor(step) for step in range(12)] == pytest.approx([1] * 8 + [0.25, 0.5, 0.75, 1])
    _, longer = made("relora", refresh_every=1000)
    assert longer.lr_factor(1000) == pytest.approx(1 / REWARM) and longer.lr_factor(1000 + REWARM) == 1.0
    _, shortest = made("relora", refresh_every=1)
    assert [shortest.lr_factor(step) for step in range(3)] == [1.0, 1.0, 1.0]
    for other in ("lowrank", "adamw", "lora"):
        assert {made(other)[1].lr_factor(step) for step in (0, 200, 201)} == {1.0}


def test_a_skipped_step_delays_restart_and_rewarming_together(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer._loss
    monkeypatch.setattr(Trainer, "_loss", lambda self, ids: original(self, ids) * (float("nan") if self.step == 1 else 1.0))
    config = few(text, tmp_path, method="relora", refresh_every=4, steps=8, warmup=0.0, final_lr=1.0)
    trainer = Trainer(config, pretrain.opened(config))
    rates = []
    for _ in range(8):
        trainer._step()
        rates.append((trainer.optimizers[0].param_groups[0]["lr"] / 1e-2, trainer.method.steps))
    assert [steps for _, steps in rates] == [1, 1, 2, 3, 4, 5, 6, 7]
    assert [rate for rate, _ in rates] == pytest.approx([1, 1, 1, 1, 1, 0.5, 1, 1])  # the restart was after the fifth


@pytest.mark.parametrize("name", ["lora", "relora", "lowrank"])
def test_nothing_to_adapt_is_said(name: str) -> None:
    with pytest.raises(ValueError, match=r"no layer of LlamaForCausalLM can be (adapted|converted)"):
        made(name, rank=128)
    assert issubclass(runs.WrongInput, ValueError)
