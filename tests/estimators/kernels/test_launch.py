"""Kernels are optional: without Triton everything else works, and what cannot run says why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from estimators.kernels import launch
from tests.estimators.kernels.device import DEVICE

ROOT = Path(__file__).parents[3]


def test_without_triton_and_without_its_interpreter(tmp_path: Path) -> None:
    """Plain versions need no Triton and a kernel names the extra; every kernel compiles for a CUDA device that is not there."""
    variables = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-m", "tests.estimators.kernels.compiled"], check=True, cwd=ROOT, env=variables, timeout=300)


def test_tensors_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    X = torch.zeros(2, device=DEVICE)
    with pytest.raises(ValueError, match=r"f: Y is on meta; kernels run on CUDA devices, or on a CPU with TRITON_INTERPRET=1"):
        launch.check("f", {"X": X, "Y": X.to("meta")}, (torch.float32,))
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"f: X is on cpu; kernels run on CUDA devices"):
        launch.check("f", {"X": X.cpu()}, (torch.float32,))


def test_nothing_but_the_timing_uses_a_kernel() -> None:
    """None has a measured gain yet; whoever uses one names it here, with the row of the table that says so."""
    users = {
        path.relative_to(ROOT).as_posix()
        for package in ("estimators", "optimizers", "experiments")
        for path in (ROOT / package).rglob("*.py")
        if "estimators.kernels" in path.read_text(encoding="utf-8") and path.parent.name != "kernels"
    }
    assert users == {"experiments/gpu/kernel_cases.py", "experiments/gpu/kernels.py"}


def test_powers_of_two() -> None:
    assert [launch.power_of_two(size) for size in (1, 2, 3, 4, 5, 64, 65)] == [1, 2, 4, 4, 8, 64, 128]
