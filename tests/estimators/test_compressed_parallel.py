"""Two processes with compressed inputs against one that sees the whole batch, and against the draws of each."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import Once
from tests.estimators.two_processes import X, gradients, made
from tests.experiments.launch import ENVIRONMENT, ROOT, torchrun


@pytest.fixture(scope="module")
def two(once: Once) -> dict[tuple[str, str], list[Tensor]]:
    def launch(folder: Path) -> None:
        subprocess.run(torchrun("tests.estimators.two_processes", str(folder)), cwd=ROOT, env=ENVIRONMENT, check=True, timeout=100)

    return torch.load(once("compressed", launch) / "gradients.pt")


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
@pytest.mark.parametrize("rule", ["features", "every token", "velora", "errors"])
def test_two_processes_are_one(rule: str, how: str, two: dict[tuple[str, str], list[Tensor]]) -> None:
    """V on the features is the same in both, so the mean of two halves is the estimate of the batch; so is what is not drawn, or is exact.
    Directions of errors are those of all."""
    for ours, whole in zip(two[rule, how], gradients(made(rule), X), strict=True):
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_each_process_draws_among_its_own_tokens(
    how: str, two: dict[tuple[str, str], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = []
    for rank in range(2):
        model = made("tokens")
        with monkeypatch.context() as patch:
            patch.setattr("estimators.processes.rank", lambda rank=rank: rank)
            both.append(gradients(model, X[4 * rank : 4 * rank + 4]))
    for ours, one, other in zip(two["tokens", how], *both, strict=True):
        torch.testing.assert_close(ours, (one + other) / 2, rtol=0, atol=1e-12)
    assert not torch.allclose(both[0][0], both[1][0])
