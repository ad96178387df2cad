"""``lowrank pretrain``: every method, law, optimizer and precision trains; what one step does; what a run leaves behind."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from estimators import LAWS
from experiments import cli, pretrain, runs
from experiments.text import tokens
from experiments.training import models
from experiments.training.trainer import Trainer

FEW: dict[str, Any] = {"sequences": 2, "length": 16, "steps": 4, "refresh_every": 2, "lr": 1e-2, "eval_tokens": 256, "quiet": True}
FEW |= {"measure_every": 0, "checkpoint_every": 0, "save_model": False}


def few(data: Path, runs_dir: Path, **fields: Any) -> pretrain.Config:
    return pretrain.Config(**{**FEW, "data": str(data), "runs_dir": runs_dir, **fields})


def losses(run: runs.Run, kind: str = "train") -> list[float]:
    return [row["loss"] for row in run.rows() if row["kind"] == kind]


@pytest.fixture
def train(text: Path, tmp_path: Path) -> Callable[..., runs.Run]:
    return lambda **fields: pretrain.main(few(text, tmp_path, **fields))


@pytest.fixture
def trainer(text: Path, tmp_path: Path) -> Callable[..., Trainer]:
    def make(**fields: Any) -> Trainer:
        config = few(text, tmp_path, **fields)
        return Trainer(config, pretrain.opened(config))

    return make


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchao compiles its update, which takes half a minute and changes nothing here."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


# what trains


@pytest.mark.parametrize("law", LAWS)
def test_every_law_trains_and_is_measured(law: str, train: Callable[..., runs.Run]) -> None:
    run = train(law=law, steps=5, measure_every=2)
    seen = losses(run)
    assert len(seen) == 5 and seen[0] == pytest.approx(math.log(2560), abs=0.3) and losses(run, "eval")[0] < seen[0] - 1.5
    live = [row for row in run.rows() if row["kind"] == "live"]
    assert [row["step"] for row in live if row["layer"] == "all"] == [1, 3, 5] and len(live) == 3 * 29
    assert all(math.isfinite(row[name]) for row in live for name in ("signal", "noise", "predicted", "realised"))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "adamw8bit"])
@pytest.mark.parametrize("method", ["lowrank", "adamw", "lora", "relora"])
def test_every_method_trains_with_every_optimizer(method: str, optimizer: str, train: Callable[..., runs.Run]) -> None:
    run = train(method=method, optimizer=optimizer, lr=0.3 if optimizer == "sgd" else 1e-2, steps=6, refresh_every=4)
    assert losses(run)[0] == pytest.approx(7.7919, abs=1e-3)  # all begin with the same function and the same batch
    assert losses(run, "eval")[0] < losses(run)[0] - 1
    end = run.rows()[-1]
    trained = run.read("facts.json")["trained_parameters"]
    a_number = {"adamw": (8, 8), "sgd": (4, 4), "muon": (4, 8), "adamw8bit": (2, 2.5)}[optimizer]  # bytes of state
    assert a_number[0] * trained <= end["state_bytes"] <= a_number[1] * trained + 8192 or (method, optimizer) == ("lowrank", "muon")


@pytest.mark.parametrize(
    "method, precision, lift",
    [
        *((method, precision, "master") for method in ("lowrank", "adamw", "lora", "relora") for precision in ("bf16", "bf16_weights")),
        ("lowrank", "bf16_weights", "stochastic"),
        ("lowrank", "bf16_weights", "nearest"),
    ],
)
def test_precisions(method: str, precision: str, lift: str, train: Callable[..., runs.Run]) -> None:
    run = train(method=method, precision=precision, lift=lift, steps=6, refresh_every=4, save_model=True, lift_every=3)
    assert losses(run)[0] == pytest.approx(7.79, abs=0.02) and losses(run, "eval")[0] < 6.5
    dtypes = {tensor.dtype for tensor in load_file(run.path / "model" / "model.safetensors").values()}
    assert dtypes == {torch.float32 if precision == "bf16" else torch.bfloat16}


def test_autocast_products_are_in_bfloat16(trainer: Callable[..., Trainer]) -> None:
    seen = []
    made = trainer(precision="bf16")
    made.model.get_submodule("model.layers.0.mlp.down_proj").register_forward_hook(lambda *call: seen.append(call[2].dtype))
    made._step()
    assert seen == [torch.bfloat16] and {p.dtype for p in made.model.parameters()} == {torch.float32}


# one step


def gradients(made: Trainer, steps: int = 1) -> list[list[Tensor]]:
    """What the optimizers are given at each of their steps, matrices first."""
    given: list[list[Tensor]] = []
    for optimizer in made.optimizers:
        optimizer.register_step_pre_hook(
            lambda o, *_: given.append([p.grad.clone() for group in o.param_groups for p in group["params"] if p.grad is not None])
        )
    for _ in range(steps):
        made._step()
    return given


@pytest.mark.parametrize("method", ["lowrank", "adamw", "lora"])
def test_accumulation_changes_rounding_only_and_steps_once(method: str, trainer: Callable[..., Trainer]) -> None:
    found = []
    for accumulate in (1, 2, 4):
        made = trainer(method=method, accumulate=accumulate, sequences=4, clip=0.0)
        made.model.double()
        found.append(gradients(made, 3))
        assert len(found[-1]) == 3  # one optimizer step a batch, none in between
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            for a, b in zip(one, two, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * float(a.norm()) + 1e-12)  # RMSNorm computes in float32


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("method", ["lowrank", "lora"])
def test_clipping_scales_all_that_is_trained_together(method: str, optimizer: str, trainer: Callable[..., Trainer]) -> None:
    def flat(**fields: Any) -> tuple[Tensor, int]:
        made = trainer(method=method, optimizer=optimizer, **fields)
        given = [g.flatten() for part in gradients(made) for g in part]
        return torch.cat(given), sum(p.numel() for p in made.method.matrices())

    free, matrices = flat(clip=0.0)
    clipped, _ = flat(clip=0.25)
    norm = float(free.double().norm())
    assert norm > 0.5 and float(free[:matrices].norm()) > 0.1 * norm  # both parts count
    torch.testing.assert_close(clipped, free * (0.25 / norm), rtol=1e-4, atol=1e-9)
    assert torch.equal(flat(clip=10 * norm)[0], free)


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(trainer: Callable[..., Trainer]) -> None:
    made = trainer(steps=10, warmup=0.4, final_lr=0.2, lr=1e-2, optimizer="muon")
    rows, used = [], []
    for _ in range(10):
        rows.append(made._step()["lr"])
        used.append([group["lr"] for optimizer in made.optimizers for group in optimizer.param_groups])
    warm = [0.25, 0.5, 0.75, 1.0]
    cosine = [0.2 + 0.8 * (1 + math.cos(math.pi * share / 6)) / 2 for share in range(6)]
    assert rows == pytest.approx([1e-2 * factor for factor in warm + cosine], rel=1e-12)
    assert used == [[lr, lr] for lr in rows]


def test_weights_decay_by_the_rate_of_the_step(trainer: Callable[..., Trainer]) -> None:
    """SGD without a gradient in the way: the layers' W + BVᵀ differ by the decay of W only."""
    ends = []
    for decay in (0.0, 0.1):
        made = trainer(optimizer="sgd", weight_decay=decay, steps=1, warmup=0.0)
        name = "model.layers.0.mlp.up_proj"
        start = made.model.get_submodule(name).weight.detach().clone()  # pyright: ignore
        made._step()
        ends.append((made.model.get_submodule(name).weight.detach(), start))  # pyright: ignore
    (plain, start), (decayed, _) = ends
    torch.testing.assert_close(plain - decayed, 1e-2 * 0.1 * start, rtol=0, atol=1e-7)


def test_activation_checkpointing_and_lifting_change_rounding_only(train: Callable[..., runs.Run]) -> None:
    few_steps = {"steps": 4, "refresh_every": 3, "seed": 4}
    plain = train(**few_steps)
    for fields in ({"checkpoint_activations": True}, {"lift_every": 3}, {"lift_every": 2, "store": False}):
        run = train(**few_steps, **fields)
        assert losses(run) + losses(run, "eval") == pytest.approx(losses(plain) + losses(plain, "eval"), abs=1e-4), fields
    spectral = losses(train(**few_steps, law="spectral", checkpoint_activations=True))
    assert spectral == pytest.approx(losses(train(**few_steps, law="spectral")), abs=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_compiled_training_is_the_same(train: Callable[..., runs.Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the tracer alone: generating code takes a minute and is not ours. Steps that form full gradients are in it as well."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    fields = {"law": "spectral", "steps": 6, "refresh_every": 3, "lift_every": 2}
    assert losses(train(**fields, compile=True)) == pytest.approx(losses(train(**fields)), abs=1e-4)


# evaluation


def plain_loss(model: nn.Module, text: Path, sequences: int = 16, length: int = 16) -> float:
    ids = torch.from_numpy(tokens.open_tokens(text).held_out[: sequences * length].astype("int64")).view(-1, length)
    with torch.no_grad():
        logits = model.eval()(input_ids=ids[:, :-1]).logits
    return float(nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()))


def test_all_are_evaluated_on_the_same_held_out_tokens(trainer: Callable[..., Trainer], text: Path) -> None:
    expected = plain_loss(models.build("tiny", 3), text)
    for fields in ({"method": "lowrank"}, {"method": "adamw"}, {"method": "lora"}, {"sequences": 8, "accumulate": 4, "method": "relora"}):
        made = trainer(**fields, seed=3)
        row = made._evaluate()
        assert row["loss"] == pytest.approx(expected, abs=1e-5) and row["tokens"] == 16 * 15 and row["perplexity"] > 1
        assert made.model.training


@pytest.mark.parametrize("method", ["lowrank", "adamw", "lora", "relora"])
def test_the_saved_model_is_plain_and_has_the_loss_that_was_reported(method: str, train: Callable[..., runs.Run], text: Path) -> None:
    run = train(method=method, steps=5, refresh_every=3, lift_every=3, save_model=True, eval_every=2)
    model = LlamaForCausalLM.from_pretrained(run.path / "model")
    assert set(model.state_dict()) == set(models.build("tiny", 0).state_dict())
    evaluations = [row for row in run.rows() if row["kind"] == "eval"]
    assert [row["step"] for row in evaluations] == [2, 4, 5]
    assert plain_loss(model, text) == pytest.approx(evaluations[-1]["loss"], abs=1e-5)


# what a run leaves


def test_rows_facts_and_a_run_that_is_done(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"pretrain tiny --data {text} --runs-dir {tmp_path} --steps 4 --sequences 2 --length 16 --eval-tokens 256 --eval-every 2"
    assert cli.main(command.split()) == 0
    shown = capsys.readouterr().out
    assert "1,459,328 weights" in shown and "held-out loss" in shown and "perplexity" in shown
    (path,) = tmp_path.glob("pretrain-tiny-haar_stiefel-*")
    rows = runs.load(path).rows()
    assert [row["kind"] for row in rows if row["kind"] != "live"] == ["train", "train", "eval", "train", "train", "eval", "end"]
    train = [row for row in rows if row["kind"] == "train"]
    assert [(row["step"], row["tokens"]) for row in train] == [(1, 32), (2, 64), (3, 96), (4, 128)]
    assert all({"loss", "grad_norm", "lr", "seconds"} <= set(row) for row in train)
    assert train[0]["seconds"] <= train[-1]["seconds"]
    frame = runs.load(path).frame("eval")
    assert list(frame.step) == [2, 4] and list(frame.loss) == losses(runs.load(path), "eval")
    end = rows[-1]
    assert (end["step"], end["skipped"]) == (4, 0) and end["epochs"] == pytest.approx(8 / (len(tokens.open_tokens(text).training) // 16))
    assert all(end[name] > 0 for name in ("tokens_per_second", "model_flops_utilisation", "peak_bytes", "state_bytes", "measuring_share"))
    facts = json.loads((path / "facts.json").read_text())
    assert facts["tokens_sha256"] == tokens.open_tokens(text).sha256 and facts["vocabulary"] == 300 and facts["data"] == ["few.jsonl"]
    assert facts["parameters"] == 1_459_328 and facts["left_alone"]["lm_head.weight"] == "not targeted"
    before = (path / "metrics.jsonl").stat().st_mtime_ns
    assert cli.main(command.split()) == 0 and (path / "metrics.jsonl").stat().st_mtime_ns == before  # found, not computed again
