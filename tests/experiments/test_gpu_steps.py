"""The table of whole steps, small and on a CPU: every contender, the search for the largest batch, going on, and what decides a target."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from estimators import LAWS
from experiments import runs
from experiments.gpu import steps, steps_rows, steps_table
from experiments.gpu.steps import Settings

SMALL = Settings(
    models=("tiny",), contenders=("adamw", "haar_stiefel", "galore", "lora"), sequences=2, length=16, largest=3, repeats=5,
    precision="fp32", compile=False, device="cpu",
)  # fmt: skip


@pytest.mark.parametrize("start", [1, 5, 16, 64])
@pytest.mark.parametrize("room", [0, 1, 2, 3, 7, 31, 33, 100, 500, 1000])
def test_the_largest_batch_is_found_to_three_percent_or_one(room: int, start: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= room

    low, high = steps_rows.largest(fits, 512, start)
    assert low <= room and (high is None) == (room >= 512) and (high or 512) <= max(low + 1, 1.03 * low, 512 * (high is None))
    assert high is None or room < high
    assert low == 512 if high is None else (low in asked or not low) and high in asked
    assert min(asked) >= 1 and max(asked) <= 512 and len(set(asked)) == len(asked) <= 16


def test_cells_are_measured_once_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "steps.jsonl"
    assert steps.work(SMALL, out, minutes=-1) == []
    rows = steps.work(SMALL, out, minutes=9)
    assert [(row["model"], row["batch"], row["contender"]) for row in rows] == steps.plan(SMALL)
    assert all(row["status"] == "done" and row["seconds"] > 0 and row["utilisation"] > 0 for row in rows), rows
    assert all(
        {"device", "git_sha", "code_sha256", "torch", "precision", "rank", "length", "took", "peak_bytes"} <= set(row) for row in rows
    )
    large = [row for row in rows if row["batch"] == "largest"]
    assert {row["sequences"] for row in rows if row["batch"] == "equal"} == {2} and {row["sequences"] for row in large} == {3}
    assert all(row["bound"] is None and row["seconds_q1"] <= row["seconds"] <= row["seconds_q3"] for row in large)
    work = {row["utilisation"] * row["seconds"] * row["gemm_per_second"] / row["sequences"] for row in rows}
    assert max(work) == pytest.approx(min(work)), "a contender is paid for parameters of its own"
    everything = [json.loads(line) for line in out.read_text().splitlines()]
    assert steps_rows.measured(everything) == rows and {row["status"] for row in everything if row["batch"] == "probe"} == {"fits"}
    monkeypatch.setattr(steps, "at_equal_batch", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(steps, "at_largest_batch", lambda *_: pytest.fail("measured again"))
    assert steps.work(SMALL, out, minutes=9) == rows
    with pytest.raises(runs.WrongInput, match="rows of length 16, this is 32"):
        steps.work(replace(SMALL, length=32), out, minutes=9)


def test_every_compiled_cell_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo gives up on code after 8 compilations, and what runs then is not compiled, without a word."""
    compiled: list[int] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(len(list(module.graph.nodes)))
        return module.forward

    real, equal = torch.compile, steps.at_equal_batch
    cells: dict[str, int] = {}

    def counted(call: steps.Call, model: str, name: str) -> dict[str, Any]:
        before = len(compiled)
        found = equal(call, model, name)
        cells[name] = len(compiled) - before
        return found

    monkeypatch.setattr(torch, "compile", lambda module: real(module, backend=backend))
    monkeypatch.setattr(steps, "at_equal_batch", counted)
    monkeypatch.setattr(steps, "at_largest_batch", lambda *_: {})
    monkeypatch.setattr(steps.cost, "matmul_rate", lambda *_: 1e9)
    methods = {
        f"{method} {i}": method for i in range(3) for method in ("adamw", "galore", "lora")
    }  # a law is checked by jaxtyping here, which Dynamo cannot follow
    monkeypatch.setattr(steps, "CONTENDERS", {name: {"method": method} for name, method in ({"adamw": "adamw"} | methods).items()})
    names = tuple(steps.CONTENDERS)
    before = torch._dynamo.config.fail_on_recompile_limit_hit  # pyright: ignore[reportAttributeAccessIssue]
    rows = steps.work(replace(SMALL, contenders=names, compile=True, repeats=1), tmp_path / "steps.jsonl", minutes=9)
    assert {row["status"] for row in rows} == {"done"}, rows
    assert set(cells) == set(names), cells
    assert all(cells[name] >= 1 + name.startswith("lora") for name in names), cells  # its peer, of other layers, as well
    assert torch._dynamo.config.fail_on_recompile_limit_hit == before  # pyright: ignore[reportAttributeAccessIssue]


def test_what_does_not_fit_or_is_not_installed_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(steps, "prepared", full)
    rows = steps.work(SMALL, tmp_path / "steps.jsonl", minutes=9)
    assert {row["error"] for row in rows} == {"OutOfMemoryError: CUDA out of memory.", "OutOfMemoryError: not one sequence fits"}
    pd.DataFrame(rows).to_csv(tmp_path / "steps.csv", index=False)
    assert "not one sequence fits" in steps_table.table(tmp_path / "steps.csv")


class Idle:
    """In the place of a stepper."""

    def step(self) -> None:
        pass


def test_full_adamw_is_built_once_for_all_where_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def prepared(_: Settings, model: str, name: str, sequences: int) -> Idle:  # noqa: ARG001
        built.append(name)
        if name == "galore" and built.count("galore") == 1:  # not beside another; alone it does, and then full AdamW does
            raise torch.OutOfMemoryError("full")
        if name == "adamw" and built[-2:-1] == ["lora"]:
            raise torch.OutOfMemoryError("full")
        if name == "lora" and built.count("lora") == 1:
            raise torch.OutOfMemoryError("full")
        return Idle()

    monkeypatch.setattr(steps, "prepared", prepared)
    monkeypatch.setattr(steps, "at_largest_batch", lambda *_: {})
    rows = steps.work(SMALL, tmp_path / "steps.jsonl", minutes=9)
    assert built == ["adamw", "haar_stiefel", "galore", "galore", "adamw", "lora", "lora", "adamw"]
    assert [row["error"] for row in rows if row["status"] == "failed"] == ["OutOfMemoryError: it fits, but not beside full AdamW: full"]


def test_what_failed_is_tried_again_last_and_a_cut_line_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, asked = tmp_path / "steps.jsonl", []

    def measure(_: Any, model: str, name: str) -> dict[str, Any]:  # noqa: ARG001
        asked.append(name)
        if len(asked) in (1, 3):
            raise RuntimeError("no kernel\nimage")
        if len(asked) == 4:
            raise KeyboardInterrupt
        return {"seconds": 1.0}

    monkeypatch.setattr(steps, "at_equal_batch", measure)
    monkeypatch.setattr(steps, "at_largest_batch", lambda *_: {})
    with pytest.raises(KeyboardInterrupt):
        steps.work(SMALL, out, minutes=9)
    assert asked == ["adamw", "haar_stiefel", "galore", "lora"]
    with out.open("a", encoding="utf-8") as file:
        file.write('{"model": "ti')
    rows = steps.work(SMALL, out, minutes=9)
    assert asked[4:] == ["lora", "adamw", "galore"]
    assert len(rows) == len(steps.plan(SMALL)) and {row["status"] for row in rows} == {"done"}
    assert steps_rows.measured(steps_rows.read(out)) == rows
    assert [json.loads(line)["status"] for line in out.read_text().splitlines()].count("failed") == 2
    for text in ("notes\n", "[1]\n", '{"model": "a"}\n', 'x\n{"model'):
        out.write_text(text)
        assert steps.main(["--out", str(out), "--device", "cpu"]) == 2 and out.read_text() == text


def test_a_search_goes_on_and_begins_nothing_without_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, out = replace(SMALL, contenders=("adamw",), largest=64), tmp_path / "steps.jsonl"
    rows: list[dict[str, Any]] = []
    clock, asked = [0.0], []

    def prepared(_: Settings, model: str, name: str, sequences: int) -> Idle:  # noqa: ARG001
        asked.append(sequences)
        clock[0] += 100
        if sequences > 21:
            raise torch.OutOfMemoryError
        return Idle()

    monkeypatch.setattr(steps, "prepared", prepared)
    monkeypatch.setattr(steps, "at_equal_batch", lambda *_: {})
    monkeypatch.setattr(steps.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(steps, "pairs", lambda *_: pytest.fail("no pairs"))
    for _ in range(10):
        began = clock[0]
        rows = steps.work(settings, out, minutes=5)
        assert clock[0] - began <= 300
        if len(rows) == 2:
            break
    assert asked == [2, 4, 8, 16, 32, 24, 20, 22, 21, 21]  # the last is measured
    assert (rows[-1]["sequences"], rows[-1]["bound"], rows[-1]["took"]) == (21, 22, 100.0)
    call = steps.Call(settings, out, 9)
    assert call.time_for("tiny", "probe") and call.time_for("other", "probe")
    clock[0] += 541 - 100
    assert not call.time_for("tiny", "probe") and call.time_for("other", "probe")
    clock[0] += 40
    assert not call.time_for("other", "probe")


def test_every_unbiased_law_is_a_contender() -> None:
    laws = [fields["law"] for fields in steps.CONTENDERS.values() if fields["method"] == "lowrank"]
    assert sorted(laws) == sorted(name for name, law in LAWS.items() if law.unbiased)
    assert list(steps.CONTENDERS)[:2] == ["adamw", "haar_stiefel"]
    assert {name for _, _, name in steps.plan(Settings())[: 4 * len(Settings().models)]} == {"adamw", "haar_stiefel"}


def test_the_committed_table_is_of_a_cuda_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "steps.jsonl", tmp_path / "gpu" / "steps.csv"
    monkeypatch.setattr(steps, "FILE", file)
    told = [row("1b", "largest", "adamw", took=1.0, device="A device"), row("1b", "probe", "adamw", took=1.0, status="full")]
    for text in (None, "", json.dumps(told[0] | {"device": "cpu, 2 threads"}) + "\n", json.dumps(told[1]) + "\n"):
        if text is not None:
            out.write_text(text)
        assert steps.main(["--out", str(out), "--table"]) == 2
        assert capsys.readouterr().err == f"experiments.gpu.steps: {out} has no rows of a CUDA device\n" and not file.exists()
    out.write_text("".join(json.dumps(one) + "\n" for one in told))
    assert steps.main(["--out", str(out), "--table"]) == 0
    assert len(pd.read_csv(file)) == 1 and "| at least 16 |" in steps_table.table(file)


def row(model: str, batch: str, contender: str, **values: Any) -> dict[str, Any]:
    same = {"status": "done", "ratio": 1.0, "tokens_per_second": 1e5, "utilisation": 0.5, "sequences": 16, "error": ""}
    return {"model": model, "batch": batch, "contender": contender} | same | values


def test_targets_are_decided_by_their_rows(tmp_path: Path) -> None:
    assert steps_table.table(tmp_path / "none.csv") == "not yet run"
    rows = [
        row("350m", "equal", "adamw", utilisation=0.40),
        row("350m", "largest", "adamw", utilisation=0.46),
        row("100m", "equal", "haar_stiefel", ratio=0.85),
        row("350m", "equal", "haar_stiefel", ratio=0.95),
        row("1b", "largest", "adamw", sequences=10, bound=11),
        row("1b", "largest", "haar_stiefel", sequences=14, bound=15),
    ]
    assert steps_table.verdicts(pd.DataFrame(rows)) == [
        "- full AdamW at 350m, utilisation: 0.46, at least 0.45: holds.",
        "- Haar–Stiefel at 100m, step over full AdamW: 0.85, at most 0.9: holds.",
        "- Haar–Stiefel at 350m, step over full AdamW: 0.95, at most 0.9: missed.",
        "- Haar–Stiefel at 1b, largest batch over full AdamW's: 1.40, at least 1.5: missed.",
    ]
    assert steps_table.verdicts(pd.DataFrame(rows[:1]))[0].endswith("missed.")


@pytest.mark.parametrize(
    ("mine", "peer", "said"),
    [
        ((156, 160), (100, 103), "between 1.53 and 1.59, at least 1.5: holds."),
        ((150, 155), (100, 103), "between 1.47 and 1.54, at least 1.5: not decided."),
        ((140, 144), (100, 103), "between 1.37 and 1.43, at least 1.5: missed."),
        ((15, 16), (10, 11), "1.50, at least 1.5: holds."),
        ((200, None), (100, 103), "between 1.96 and inf, at least 1.5: holds."),
        ((200, None), (200, None), "between 0.00 and inf, at least 1.5: not decided."),
    ],
)
def test_the_largest_batches_are_judged_by_their_bounds(mine: tuple[int, int | None], peer: tuple[int, int | None], said: str) -> None:
    both = [row("1b", "largest", name, sequences=one[0], bound=one[1]) for name, one in (("adamw", peer), ("haar_stiefel", mine))]
    assert steps_table.verdicts(pd.DataFrame(both)) == [f"- Haar–Stiefel at 1b, largest batch over full AdamW's: {said}"]


def test_a_device_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steps.main(["--out", str(tmp_path / "a"), "--device", "nowhere"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
