"""The optimizers of optimizers/ in the training loop, in the Hugging Face Trainer, and where they refuse to run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from experiments import memory, pretrain, report, runs
from experiments.pages import figures
from experiments.training import models
from experiments.training.methods import METHODS, Projected
from experiments.training.trainer import Trainer
from optimizers import OPTIMIZERS, GaLore, Int8Linear, quantized, split_parameters
from tests.experiments.test_pretrain import few, losses
from tests.experiments.test_pretrain import train as train  # a fixture
from tests.experiments.test_pretrain import trainer as trainer
from theory import optimizer_state


@pytest.mark.parametrize("method", OPTIMIZERS)
def test_every_method_trains(method: str, trainer: Callable[..., Trainer]) -> None:
    """Steps on one batch lower its loss, and the states are as large as the formula says."""
    made = trainer(method=method, rank=16 if method != "frugal" else 0.25, steps=8, sequences=2, refresh_every=3)
    ids = made.batches.next()
    optimizer: Any = made.optimizers[0]
    assert type(optimizer) is OPTIMIZERS[method]
    seen = []
    for _ in range(8):
        loss = made._loss(ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(float(loss))
    assert seen[-1] < seen[0] - 0.3
    matrices = made.method.matrices()
    if method not in ("frugal", "lisa", "owlore", "badam"):  # where some have no turn

        def of(p: torch.nn.Parameter) -> float:
            share = float(optimizer.state[p]["rest"]) if method == "gum" else None
            return optimizer_state.state_bytes(method, p.shape[0], p.shape[1], 16, share)

        held = sum(v.numel() * v.element_size() for p in matrices for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))
        assert held == sum(map(of, matrices))


RESUMED: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ("galore", "flora", "ldadam", "apollo", "frugal", "spectral_adam", "q_galore", "lisa", "gum", "dion")),
    *((name, {}) for name in ("online_subspace", "adalomo", "gradlite_law")),
    *(("gradlite", {"residual": precision}) for precision in ("fp32", "bf16", "8bit")),
    ("gradlite", {"feedback": "ef21", "inner": "sgd"}),
    ("gradlite", {"fused": True, "checkpoint_activations": True}),
    ("lomo", {"fused": True}),
]


@pytest.mark.parametrize(("method", "more"), RESUMED, ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(method: str, more: dict[str, Any], text: Path, tmp_path: Path) -> None:
    """What is kept of gradients that were left out is part of a checkpoint, in its own precision."""
    fields: dict[str, Any] = {
        "method": method,
        "rank": 8,
        "steps": 6,
        "checkpoint_every": 3,
        "refresh_every": 2,
        "keep_checkpoints": 9,
        **more,
    }
    whole = pretrain.main(few(text, tmp_path / "whole", **fields))
    run = pretrain.main(few(text, tmp_path / "parts", **fields))
    (run.path / "DONE").unlink()
    run.keep([row for row in run.rows() if row["step"] <= 3])
    again = pretrain.main(few(text, tmp_path / "parts", **fields))
    assert losses(again) == losses(whole) and losses(again, "eval") == losses(whole, "eval")


def test_weights_in_codes(text: Path, tmp_path: Path) -> None:
    """Q-GaLore's blocks have them, embeddings and head do not; a plain model of the same numbers comes out."""
    run = pretrain.main(few(text, tmp_path, method="q_galore", rank=8, steps=3, save_model=True))
    exported = transformers.LlamaForCausalLM.from_pretrained(run.path / "model")

    def in_steps(p: torch.Tensor) -> bool:
        """Differences between the numbers of a group are whole multiples of the smallest."""
        gaps = [group.unique().diff() for group in p.detach().reshape(-1, quantized.GROUP)[:20]]
        return all(float((gap / gap.min() - (gap / gap.min()).round()).abs().max()) < 0.02 for gap in gaps)

    matrices = {name: p for name, p in exported.named_parameters() if p.ndim == 2}
    assert [name for name, p in matrices.items() if in_steps(p)] == [name for name in matrices if ".layers." in name]
    made = METHODS["q_galore"](models.build("tiny", 0), few(text, tmp_path, method="q_galore", rank=8))
    assert len(made.matrices()) == len(matrices) - 2
    assert all(type(made.model.get_submodule(name.removesuffix(".weight"))) is Int8Linear for name in matrices if ".layers." in name)


def test_what_is_not_projected_is_trained_alike_by_all(trainer: Callable[..., Trainer]) -> None:
    """Also by Q-GaLore, whose own states have 8 bits: AdamW's in float32, unless all states are to have 8."""
    for optimizer, kept in (("adamw", {torch.float32}), ("adamw8bit", {torch.uint8, torch.float32})):
        for method in ("galore", "q_galore"):
            made = trainer(method=method, rank=16, optimizer=optimizer)
            made._step()
            state = made.optimizers[0].state
            large = [p for p in made.method.others() if p.numel() > 4096]
            assert large and {v.dtype for p in large for v in state[p].values() if isinstance(v, torch.Tensor)} == kept


def test_fields_reach_the_optimizer(trainer: Callable[..., Trainer]) -> None:
    made = trainer(method="galore", rank=8, alpha=0.7, variant="reference-code", refresh_every=5, other_lr=1e-4, lr=2e-2, weight_decay=0.1)
    matrices, others = made.optimizers[0].param_groups
    expected = {"rank": 8, "scale": 0.7, "variant": "reference-code", "every": 5, "betas": (0.9, 0.95), "weight_decay": 0.1}
    assert {key: matrices[key] for key in expected} == expected
    assert others["rank"] is None and all(".layers." in name for name in matrices["param_names"])
    made._step()
    assert others["lr"] / matrices["lr"] == pytest.approx(1e-4 / 2e-2)
    assert METHODS["dct_adamw"].needs == ("rank", "variant")  # its default is a new frame at every step
    assert METHODS["apollo_mini"].needs == ("refresh_every", "alpha", "variant") and METHODS["ldadam"].needs == ("rank",)
    assert isinstance(made.method, Projected) and 0 < made.method.touched_share < 1


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"optimizer": "sgd"}, "method=galore has its own update; --optimizer adamw8bit keeps its states in 8 bits"),
        ({"precision": "bf16_weights"}, "use --lift stochastic or --lift nearest"),
        ({"variant": "code"}, "unknown variant 'code', known are paper, reference-code"),
    ],
)
def test_what_cannot_be_done_is_said(fields: dict[str, Any], message: str, trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(ValueError, match=message):  # by the configuration, or where the training begins as WrongInput
        trainer(method="galore", rank=8, **fields)


def test_8_bit_states_and_bf16_weights(trainer: Callable[..., Trainer]) -> None:
    made = trainer(method="galore", rank=64, optimizer="adamw8bit", precision="bf16_weights", lift="stochastic", steps=3)
    made.train()
    states = [state for p, state in made.optimizers[0].state.items() if p.ndim == 2]
    assert all(state["exp_avg"].dtype == torch.uint8 for state in states)


def test_fields_that_came_later_do_not_rename_earlier_runs() -> None:
    assert "alpha" not in runs.identity(pretrain.Config()) and runs.identity(pretrain.Config(alpha=0.5))["alpha"] == 0.5


class Sentences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Sixteen sequences of eight tokens."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 64, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def hugging_face(folder: Path, steps: int, resume: bool = False) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    optimizer = GaLore(split_parameters(model, rank=8, others={"lr": 1e-3}), lr=1e-2, every=3)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=2, save_steps=3, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, max_grad_norm=1.0, lr_scheduler_type="constant_with_warmup", warmup_steps=2,
    )  # fmt: skip
    schedule = transformers.get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=2)
    trainer = transformers.Trainer(model, arguments, train_dataset=Sentences(), optimizers=(optimizer, schedule))  # pyright: ignore[reportArgumentType]
    trainer.train(resume_from_checkpoint=resume or None)
    assert trainer.optimizer is not None
    return model, [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    """Accumulation, clipping, a schedule, checkpoints; a resumed run ends where the uninterrupted one does."""
    model, seen = hugging_face(tmp_path / "whole", 6)
    assert seen[-1] < seen[0]
    hugging_face(tmp_path / "parts", 3)
    resumed, _ = hugging_face(tmp_path / "parts", 6, resume=True)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def test_runs_of_every_method_have_a_colour_and_a_report(text: Path, tmp_path: Path) -> None:
    everyone = [*figures.PALETTE, *figures.TAKE_TURNS]
    assert len({(figures.colour(name), figures.marker(name)) for name in everyone}) == len(everyone)
    run = pretrain.main(few(text, tmp_path, method="galore", rank=8))
    memory_run = memory.main(memory.Config(runs_dir=tmp_path))
    page = report.main(report.Config(run=(run.path, memory_run.path), out=tmp_path / "report.html")).read_text(encoding="utf-8")
    assert "Training: pretrain-tiny-galore" in page and "Predicted peak of a step" in page
