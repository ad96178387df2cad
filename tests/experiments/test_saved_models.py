"""The model folder of a training is a folder of transformers: what it loads to is the trained model to the last bit, whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from experiments import pretrain
from experiments.finetuning import pretrained, tuner
from experiments.finetuning.config import KNOWN, Tuning
from experiments.finetuning.objectives import Objective
from experiments.training import models
from experiments.training.trainer import Trainer
from tests.experiments.test_labelled import DOLLY
from tests.experiments.test_pretrain import few

HEADS = {
    "classifier": transformers.AutoModelForSequenceClassification,
    "prompt": transformers.AutoModelForMaskedLM,
    "response": transformers.AutoModelForCausalLM,
}


def loads_to(trained: Any, kind: Any, folder: Path, names: list[str], inputs: dict[str, Tensor]) -> None:
    """``names``: of the state before training."""
    again, told = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert type(again) is type(trained) and not any(told.values()), told
    mine, theirs = trained.state_dict(), again.state_dict()
    assert list(theirs) == list(mine) == names
    assert all(torch.equal(theirs[key], mine[key]) and theirs[key].dtype == mine[key].dtype for key in mine)
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs).logits, trained.eval()(**inputs).logits)


@pytest.mark.parametrize(
    "fields",
    [
        *({"method": method} for method in ("adamw", "lora", "relora", "tokens", "compact", "galore", "q_galore", "lisa", "gradlite")),
        {"law": "spectral"},
        {"lift_every": 3, "refresh_every": 6},  # after four steps the last is not lifted yet
        {"precision": "bf16_weights"},
        {"precision": "bf16_weights", "lift_every": 3, "refresh_every": 6, "lift": "stochastic"},
        {"precision": "bf16_weights", "method": "galore", "lift": "stochastic"},
        {"checkpoint_activations": True, "law": "gaussian", "store": False},
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_pre_trained(fields: dict[str, Any], text: Path, tmp_path: Path) -> None:
    """On more tokens than were trained on: what belongs to late positions is part of the function too."""
    config = few(text, tmp_path, save_model=True, rank=8, **fields)
    run = pretrain.opened(config)
    trainer = Trainer(config, run)
    trainer.train()
    ids = torch.randint(2560, (2, 300), generator=torch.Generator().manual_seed(0))
    names = list(models.build("tiny", 0).state_dict())
    loads_to(trainer.model, transformers.LlamaForCausalLM, run.path / "model", names, {"input_ids": ids})


def tuned(config: Tuning) -> tuple[Objective, Path]:
    run = tuner.opened(config)
    made = tuner.Tuner(config, run)
    made.train()
    return made.objective, run.path / "model"


@pytest.fixture
def config(bert: Path, folder: Path, tmp_path: Path) -> Callable[..., Tuning]:
    few: dict[str, Any] = {"k": 4, "tests": 4, "length": 16, "steps": 3, "sequences": 4, "rank": 4, "refresh_every": 2, "lr": 1e-3}
    common: dict[str, Any] = {"model": str(bert), "task": str(folder), "save_model": True, "quiet": True, "runs_dir": tmp_path}
    return lambda **fields: Tuning(**{**few, **common, **fields})


def questions(model: Any) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(8, model.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("method", KNOWN)
def test_fine_tuned(method: str, config: Callable[..., Tuning], bert: Path) -> None:
    objective, path = tuned(config(method=method))
    names = list(pretrained.load(str(bert), "classifier", 2, 0)[0].state_dict())
    loads_to(objective.model, HEADS["classifier"], path, names, questions(objective.model))


@pytest.mark.parametrize(("head", "precision"), [("prompt", "fp32"), ("response", "fp32"), ("response", "bf16_weights")])
def test_other_questions(head: Any, precision: str, bert: Path, llama: Path, config: Callable[..., Tuning]) -> None:
    place = llama if head == "response" else bert
    fields = {"task": str(DOLLY), "length": 32} if head == "response" else {}
    objective, path = tuned(config(model=str(place), head=head, method="lowrank", precision=precision, **fields))
    names = list(pretrained.load(str(place), head, 2, 0)[0].state_dict())
    loads_to(objective.model, HEADS[head], path, names, questions(objective.model))


def test_the_folder_has_the_tokenizer_and_can_be_fine_tuned_again(config: Callable[..., Tuning]) -> None:
    """With the head that was trained, where there are as many labels."""
    objective, path = tuned(config(method="lowrank"))
    said = "w1 w2 was great"
    assert transformers.AutoTokenizer.from_pretrained(path)(said)["input_ids"] == objective.tokenizer(said)["input_ids"]
    again, _ = tuner.asked(config(model=str(path), method="adamw"))
    mine, theirs = objective.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
