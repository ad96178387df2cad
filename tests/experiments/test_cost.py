"""Operations, rates and bytes against hand counts."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments import pretrain
from experiments.training import cost, models
from experiments.training.methods import METHODS
from experiments.training.schedule import warmup_cosine
from experiments.training.trainer import Trainer
from tests.experiments.test_pretrain import few

CPU = torch.device("cpu")


def test_operations_of_a_token() -> None:
    """6 for each weight that multiplies, the head included and the embedding not; 12·h·T a layer for attention."""
    matrices = 4 * (4 * 128 * 128 + 3 * 128 * 352) + 128 * 2560
    assert cost.Cost(models.build("tiny", 0), 64, CPU, torch.float32).flops_per_token == 6 * matrices + 12 * 4 * 128 * 64


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_counted_as_the_same_model(method: str, text: Path, tmp_path: Path) -> None:
    config = few(text, tmp_path, method=method)
    made = Trainer(config, pretrain.opened(config))
    assert made.cost.flops_per_token == cost.Cost(models.build("tiny", 0), 16, CPU, torch.float32).flops_per_token


def test_utilisation_is_of_the_machines_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    made = cost.Cost(models.build("tiny", 0), 64, CPU, torch.float32)
    monkeypatch.setattr(cost, "SIZE", 128)
    assert made.rate == made.rate > 1e8  # measured once
    made._rate = 1e9
    assert made.utilisation(tokens=500, seconds=2.0) == pytest.approx(made.flops_per_token * 500 / 2.0 / 1e9)
    assert made.summary(2.5, 1000, 0.5).startswith("loss 2.500, 2,000 tokens/s, MFU ")
    assert made.summary("nan", 1000, 0.5).startswith("loss nan, ")


def test_bytes_of_optimizer_states(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchao.optim import AdamW8bit

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    sizes = []
    for build in (torch.optim.AdamW, AdamW8bit):
        weight = nn.Parameter(torch.zeros(64, 128))
        optimizer = build([weight], lr=1e-3)
        weight.grad = torch.ones(64, 128)
        optimizer.step()
        sizes.append(cost.state_bytes([optimizer]))
    assert sizes[0] == 2 * 4 * 64 * 128 + 4  # two moments, the step
    blocks = 64 * 128 // 256
    assert sizes[1] == 2 * (64 * 128 + 4 * blocks + 4 * 256) + 4  # codes, scales, the table of 256 values
    assert cost.peak_bytes(CPU) > 2**26


def test_the_schedule_is_a_function_of_the_step() -> None:
    factors = [warmup_cosine(step, 100, 0.1, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0 and factors[55] == pytest.approx(0.55) and factors[99] == pytest.approx(0.1, abs=1e-3)
    assert all(a > b for a, b in pairwise(factors[10:]))
    assert warmup_cosine(0, 5, 0.0, 0.5) == 1.0 and warmup_cosine(4, 5, 1.0) == 1.0
    assert warmup_cosine(3, 6, 0.0, 0.0) == pytest.approx(0.5) and math.isclose(warmup_cosine(0, 1), 1.0)
