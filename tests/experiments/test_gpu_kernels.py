"""Times of the kernels, on a CPU and small: every kernel is run, rows that are there stay, and the table is made of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from estimators.kernels.cholesky import Factor, Orthonormal
from estimators.kernels.launch import INTERPRETED
from experiments.benching.limits import Limits
from experiments.gpu import kernel_cases, kernels
from experiments.gpu.kernel_cases import CASES, SMALL
from experiments.pages import kernels as page

CPU = torch.device("cpu")
if not INTERPRETED:
    pytest.skip("kernels run on a CPU with TRITON_INTERPRET=1 only", allow_module_level=True)


def quick(patch: pytest.MonkeyPatch) -> None:
    """One call a round, nothing compiled."""
    patch.setattr("torch.compile", lambda function, **_: function)
    patch.setattr(kernels, "SAMPLE", 0.0)
    patch.setattr(kernels.limits, "limits", lambda _: Limits(gemm=1e9, gemm16=2e9, copy=1e9, normals=1e9))


@pytest.fixture(autouse=True)
def always_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of the whole small plan."""
    out = tmp_path_factory.mktemp("kernels") / "kernels.json"
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        assert kernels.main(["--out", str(out), "--device", "cpu", "--repeats", "5"]) == 0
    return out


def test_every_kernel_has_its_rows(finished: Path) -> None:
    rows = json.loads(finished.read_text())
    assert [row["case"] for row in rows] == [case.name for case in SMALL]
    assert {row["status"] for row in rows} == {"done"}, rows
    for row in rows:
        times = [row[f"{name}_{value}"] for name in ("kernel", "plain", "compiled") for value in ("q1", "seconds", "q3")]
        assert all(time > 0 for time in times) and times[0] <= times[1] <= times[2]
        assert row["floor"] >= row["bytes"] / row["bandwidth"] and row["of_floor"] == pytest.approx(row["floor"] / row["kernel_seconds"])
        assert row["holds"] == (row["ratio"] < 1 and row.get("today_ratio", 0) < 1) and row["repeats"] == 5
        assert {"git_sha", "code_sha256", "device", "torch", "triton", "difference"} <= set(row)
        assert row["device"].startswith("cpu") and (row["fp32_flops"], row["bf16_flops"], row["bandwidth"]) == (1e9, 2e9, 1e9)
        assert ("today_seconds" in row) == row["kernel"].startswith(("sketch", "lift", "cholesky_qr"))


def test_what_is_there_is_not_measured_again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads(finished.read_text())
    out = tmp_path / "kernels.json"
    out.write_text(json.dumps([*rows[1:], rows[0] | {"status": "failed", "error": "E: x"}]))
    measured = []

    def row(case: kernel_cases.Case, *_: Any) -> dict[str, Any]:
        measured.append(case.name)
        raise RuntimeError("no")

    monkeypatch.setattr(kernels, "measured", row)
    found = kernels.work(out, SMALL, CPU)
    assert measured == [SMALL[0].name] and len(found) == len(rows)
    assert found[-1]["error"] == "RuntimeError: no" and json.loads(out.read_text()) == found
    assert kernels.work(tmp_path / "none.json", SMALL, CPU, minutes=0.0) == []


def test_a_kernel_that_differs_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in SMALL if case.kernel == "hadamard")
    monkeypatch.setattr(kernel_cases.hadamard, "plain", lambda X: X)
    with pytest.raises(ValueError, match=r"the kernel differs from its plain version by"):
        kernels.measured(case, CPU, {}, 5)


IDLE: dict[str, tuple[Any, str, Any]] = {  # kernel → where it is, and one that does nothing
    "sketch": (kernel_cases.sketch, "sketch", lambda X, law, key: X[:, : law.rank]),  # noqa: ARG005
    "hadamard": (kernel_cases.hadamard, "transform", lambda X: X),
    "lift": (kernel_cases.rounding_lift, "lift", lambda W, *_: W),
    "cholesky": (kernel_cases.cholesky, "factor", lambda A: Factor(A, A, torch.zeros(len(A)))),
    "cholesky_qr": (kernel_cases.cholesky, "cholesky_qr", lambda Z: Orthonormal(Z, Z.mT @ Z, torch.zeros(len(Z)))),
}


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_a_kernel_that_does_nothing_has_no_time(case: kernel_cases.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*IDLE[case.kernel.split()[0]])
    monkeypatch.setattr(kernels, "rounds", lambda *_: pytest.fail("timed"))
    with pytest.raises(ValueError, match=r"differs from its plain version"):
        kernels.measured(case, CPU, {}, 5)


def test_no_agreement_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in SMALL if case.kernel == "cholesky")
    monkeypatch.setattr(kernel_cases.cholesky, "factor", lambda A: Factor(A, A * float("nan"), torch.zeros(len(A))))
    with pytest.raises(ValueError, match="by nan"):
        kernels.measured(case, CPU, {}, 5)


def test_a_wrong_rounding_of_the_lift_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """To nearest instead of stochastically: only operands with bits below bfloat16 show it."""
    case = next(case for case in SMALL if case.kernel == "lift")
    monkeypatch.setattr(kernel_cases.rounding_lift, "lift", lambda W, B, V, _: W.copy_(W.float() + B.float() @ V.float().mT))
    with pytest.raises(ValueError, match=r"differs from its plain version"):
        kernels.measured(case, CPU, {}, 5)


@pytest.mark.parametrize(("compiled", "today", "holds"), [(2.0, 2.0, True), (2.0, 0.5, False), (0.5, 2.0, False), (2.0, None, True)])
def test_a_kernel_holds_that_is_below_everything(
    compiled: float, today: float | None, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {"kernel": [1.0] * 5, "plain": [3.0] * 5, "compiled": [compiled] * 5} | ({} if today is None else {"today": [today] * 5})
    monkeypatch.setattr(kernels, "rounds", lambda *_: times)
    row = kernels.measured(SMALL[0], CPU, kernels.machine(CPU), 5)
    assert row["holds"] is holds and row.get("today_ratio") == (None if today is None else 1 / today)


def test_the_floor_of_an_orthonormal_factor_is_one_pass() -> None:
    case = next(case for case in SMALL if case.kernel == "cholesky_qr")
    batch, n, r = (case.shape[name] for name in ("batch", "n", "r"))
    found = case.make(case, CPU).cost
    assert found.products == batch * 2 * n * r * r and found.others == kernel_cases.cholesky.cost(batch, r).others
    assert found.bytes == 4 * batch * (2 * n * r + r * (r + 1) // 2)


def test_the_plan_has_every_kernel_early_and_every_shape_once() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) == 12 + 4 + 6 + 3
    assert [case.kernel.split()[0] for case in CASES[:4]] == ["sketch", "hadamard", "lift", "cholesky"]
    assert "cholesky batch=168 r=64 float32" in names and "lift m=2048 n=5461 r=256 bfloat16" in names
    assert {case.shape["r"] / case.shape["n"] for case in CASES if case.kernel.startswith("sketch")} == {1 / 8}


def test_the_table(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert page.markdown(tmp_path) == "not yet run"
    assert kernels.main(["--out", str(finished), "--publish"]) == 2 and "no rows of a CUDA device" in capsys.readouterr().err
    rows = [row | {"device": "A device"} for row in json.loads(finished.read_text())]
    rows[1] = {"case": rows[1]["case"], "kernel": "hadamard", "dtype": "bfloat16", "T": 40, "n": 16, "status": "failed", "error": "E: x"}
    out, file = tmp_path / "kernels.json", tmp_path / "gpu" / "kernels.csv"
    out.write_text(json.dumps(rows))
    monkeypatch.setattr(kernels, "FILE", file)
    assert kernels.main(["--out", str(out), "--publish"]) == 0
    with file.open(newline="") as source:
        assert [row["status"] for row in csv.DictReader(source)].count("failed") == 1
    text = page.markdown(tmp_path)
    assert text.startswith("Device: A device; a copy moves") and text.count("\n| `") == len(rows)
    assert "| `hadamard` | 40 × 16 | bfloat16 | failed |" in text and len({line.count("|") for line in text.splitlines()[2:]}) == 1


def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    for arguments, said in (
        (["--repeats", "4"], "at least 5"),
        (["--device", "nowhere"], "cannot be used"),
        (["--out", str(other), "--publish"], "no rows of"),
    ):
        assert kernels.main(arguments) == 2
        assert said in capsys.readouterr().err
    other.write_text("[1]")
    assert kernels.main(["--out", str(other), "--device", "cpu"]) == 2
