"""A run that dies at any moment ends where an uninterrupted one does, and what breaks on the way is said in one line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from estimators.transport import SECONDS
from experiments import cli, pretrain, runs
from experiments.text import tokens
from experiments.training import checkpoint, gradinit
from experiments.training.trainer import Trainer
from tests.experiments import forked
from tests.experiments.test_data import texts, write_jsonl
from tests.experiments.test_pretrain import few, losses

TIMES = ("seconds", "matmul_flops", "cost_share", "tokens_per_second", "model_flops_utilisation", "peak_bytes", "measuring_share")
LONG: dict[str, Any] = {"steps": 8, "refresh_every": 4, "measure_every": 3, "eval_every": 4, "checkpoint_every": 2, "save_model": True}
SPECTRAL: dict[str, Any] = {"law": "spectral", "online": 0.5, "basis_every": 2, "refresh_every": 3, "state": "reproject_both"}


class Death(BaseException):
    """Nothing in the program catches it."""


class Unheard(Exception):
    """A signal that nobody asked for reached the process."""


@pytest.fixture
def unheard() -> Iterator[Callable[..., None]]:
    """The handler of SIGINT and SIGTERM meanwhile, which raises."""

    def handler(number: int, _: object) -> None:
        raise Unheard(signal.Signals(number).name)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield handler
    for number, old in before.items():
        signal.signal(number, old)


def outcome(run: runs.Run) -> tuple[bytes, list[dict[str, Any]]]:
    """The weights, and all rows without what depends on the clock."""
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in run.rows()]
    return (run.path / "model" / "model.safetensors").read_bytes(), rows


def dies(config: pretrain.Config, at: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train until ``at`` steps are made and logged, then die; the run directory."""
    with monkeypatch.context() as patch:
        step = Trainer._step
        patch.setattr(Trainer, "_step", lambda self: step(self) if self.step < at else (_ for _ in ()).throw(Death))
        with pytest.raises(Death):
            pretrain.main(config)
    return pretrain.opened(config).path


# interrupted in this process


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "relora", "refresh_every": 3},
        {"method": "lora", "optimizer": "muon"},
        {"method": "adamw", "optimizer": "sgd"},
        {**SPECTRAL, "checkpoint_every": 1},
        {"lift_every": 3, "state": "reproject_first", "accumulate": 2, "weight_decay": 0.1},
        {"precision": "bf16_weights", "lift": "stochastic", "lift_every": 3},
        {"precision": "bf16_weights", "optimizer": "adamw8bit", "state": "row_scale"},
        {"law": "top_svd", "precision": "bf16", "checkpoint_activations": True, "store": False},
        {"method": "tokens", "law": "coordinate", "accumulate": 2},
        {"method": "tokens", "law": "spectral", "checkpoint_activations": True},
        {"method": "rad", "precision": "bf16"},
        {"method": "wta_crs"},
        {"method": "velora", "weight_decay": 0.1},
        {"method": "compact", "refresh_every": 3},
        *({"second_moment": second, "refresh_every": 5, "checkpoint_every": 1} for second in SECONDS),  # dies just after a redraw
        {"second_moment": "first_batch", "optimizer": "adamw8bit", "precision": "bf16_weights", "state": "keep", "refresh_every": 5},
        {"coupled": 0.5, "lift_every": 4},
        {"method": "relora", "coupled": 0.5, "refresh_every": 3, "weight_decay": 0.1},
        {"init": "gradinit", "checkpoint_every": 6},  # begun anew once
    ],
    ids=lambda fields: "-".join(map(str, fields.values())),
)
def test_dying_twice_changes_nothing(fields: dict[str, Any], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # torchao's update
    monkeypatch.setattr(gradinit, "ROUNDS", 3)
    monkeypatch.setattr(gradinit, "FRESH", 2)
    fields = LONG | fields
    whole = pretrain.main(few(text, tmp_path / "whole", **fields))
    config = few(text, tmp_path / "parts", **fields)
    dies(config, 5, monkeypatch)  # where the spectral law awaits a full gradient
    dies(config, 7, monkeypatch)
    assert outcome(pretrain.main(config)) == outcome(whole)


def test_a_stream_is_continued_where_it_was(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = {**LONG, "tokenizer": text / "tokenizer.json", "sequences": 8, "length": 32}
    file = text.parent / "few.jsonl"
    whole = pretrain.main(few(file, tmp_path / "whole", **stream))
    config = few(file, tmp_path / "parts", **stream)
    dies(config, 7, monkeypatch)
    assert outcome(pretrain.main(config)) == outcome(whole)
    assert losses(whole)[-1] < losses(whole)[0] - 2 and whole.read("facts.json")["data"][0]["name"] == "few.jsonl"


def test_a_damaged_checkpoint_is_passed_over(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = pretrain.main(few(text, tmp_path / "whole", **LONG))
    config = few(text, tmp_path / "parts", **LONG | {"quiet": False})
    path = dies(config, 7, monkeypatch)
    newest = path / "checkpoints" / "checkpoint-00000006" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1000])
    capsys.readouterr()
    assert outcome(pretrain.main(config)) == outcome(whole)
    told = capsys.readouterr().out
    assert "checkpoint-00000006 is damaged" in told and "checkpoint-00000004 is used instead" in told


def test_resuming_from_another_run(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = dies(few(text, tmp_path, **LONG), 7, monkeypatch)
    for fields, message in (
        ({"lr": 2e-2, "seed": 1}, r"another configuration: lr=0.01 \(now 0.02\), seed=0 \(now 1\)$"),
        ({"rank": 8}, r"rank=0.25 \(now 8\)"),
        ({"steps": 6}, "the checkpoint is of step 6, nothing is left to do with steps=6"),
        ({"resume": tmp_path / "nowhere"}, "nowhere has no checkpoint to resume from"),
    ):
        with pytest.raises(runs.WrongInput, match=message):
            pretrain.main(few(text, tmp_path, **{**LONG, "resume": other, **fields}))
    run = pretrain.main(few(text, tmp_path, **LONG | {"resume": other, "steps": 9, "measure_every": 0}))
    assert run.path != other and [row["step"] for row in run.rows() if row["kind"] == "train"] == [7, 8, 9]
    assert losses(run)[0] == losses(pretrain.main(few(text, tmp_path, **LONG)))[6]  # the first loss is that of the same weights


def test_other_text_at_the_same_place_is_refused(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration names a folder, the checkpoint knows its contents. The run is as it was, and goes on with the old text."""
    folder = Path(shutil.copytree(text, tmp_path / "text"))
    config = few(folder, tmp_path, **LONG)
    path = dies(config, 5, monkeypatch)
    rows = runs.read_rows(path)
    shutil.rmtree(folder)
    tokens.build(folder, (str(write_jsonl(tmp_path / "other.jsonl", texts(1500, start=7))),), 300)
    with pytest.raises(runs.WrongInput, match=f"the text of {folder} is no longer that of the checkpoint; restore it, or start in another"):
        pretrain.main(config)
    assert runs.read_rows(path) == rows
    shutil.rmtree(folder)
    shutil.copytree(text, folder)
    assert pretrain.main(config).done


# a process that is killed


def process(config: pretrain.Config, told: Path) -> ForkServerProcess:
    """The real command."""
    default = pretrain.Config()
    given = {name.replace("_", "-"): value for name, value in vars(config).items() if value != getattr(default, name)}
    switches = {True: "--", False: "--no-"}
    flags = [f"{switches[value]}{name}" if isinstance(value, bool) else f"--{name}={value}" for name, value in given.items()]
    return forked.started(["pretrain", "tiny", *flags], told)


def wait_for_steps(started: ForkServerProcess, path: Path, more: int, told: Path) -> None:
    trained = lambda: sum(row["kind"] == "train" for row in runs.read_rows(path))  # noqa: E731
    enough = trained() + more
    while trained() < enough:
        assert started.is_alive(), told.read_text(encoding="utf-8")
        time.sleep(0.005)


@pytest.mark.parametrize(
    "fields, signals",
    [({}, [signal.SIGINT, signal.SIGKILL, signal.SIGKILL]), (SPECTRAL, [signal.SIGKILL])],
    ids=["haar_stiefel", "spectral"],
)
def test_stopped_at_random_moments(fields: dict[str, Any], signals: list[signal.Signals], text: Path, tmp_path: Path) -> None:
    """A step and its checkpoint take about as long as each other, so some kills fall into the writing of one. SIGINT saves, and says so."""
    fields = {**LONG, "steps": 16, **fields}
    whole = pretrain.main(few(text, tmp_path / "whole", **fields))
    config = few(text, tmp_path / "parts", **fields)
    path = pretrain.opened(config).path
    generator = np.random.default_rng(len(fields))
    for number in signals:
        every = 0 if number == signal.SIGINT else 1  # not part of what a run is
        started = process(few(text, tmp_path / "parts", **fields | {"checkpoint_every": every}), tmp_path / "told")
        assert started.pid
        wait_for_steps(started, path, 2, tmp_path / "told")
        time.sleep(generator.uniform(0, 0.15))
        os.kill(started.pid, number)
        started.join(60)
        assert not (path / "DONE").exists()
        if number == signal.SIGKILL:
            assert started.exitcode == -signal.SIGKILL
            continue
        found = checkpoint.load_latest(path / "checkpoints", pytest.fail)
        told = (tmp_path / "told").read_text(encoding="utf-8")
        assert started.exitcode == 130 and found is not None and 2 <= found[0] < 16
        assert found[0] == max(row["step"] for row in runs.read_rows(path) if row["kind"] == "train")
        assert told == f"lowrank: pretrain: interrupted after step {found[0]}, saved; the same command continues it\n"
    assert outcome(pretrain.main(config)) == outcome(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_in_the_last_step_lets_the_run_finish(
    number: signal.Signals, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unheard: Callable[..., None]
) -> None:
    step = Trainer._step

    def interrupted(self: Trainer) -> dict[str, Any]:
        if self.step == 3:
            os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    assert pretrain.main(few(text, tmp_path)).done and signal.getsignal(number) is unheard
    config = few(text, tmp_path, steps=5)
    with pytest.raises(runs.Stopped, match="interrupted after step 4, saved") as stop:
        pretrain.main(config)
    assert stop.value.code == 130 and pretrain.main(config).done


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_later_sigint_is_not_held_back_and_more_sigterms_change_nothing(first: signal.Signals, unheard: Callable[..., None]) -> None:
    with runs.interruptible() as asked:
        assert not asked.is_set()
        signal.raise_signal(first)
        assert asked.is_set()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Unheard, match="SIGINT"):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is unheard


# what breaks


def poison(monkeypatch: pytest.MonkeyPatch, *steps: int, factor: float = float("nan"), name: str | None = None) -> list[bool]:
    """At these steps the loss, or the gradient of one parameter alone, is multiplied by ``factor``; which of them form full gradients."""
    original, watched = Trainer._loss, []

    def loss(self: Trainer, ids: Tensor) -> Tensor:
        value = original(self, ids)
        if not self.model.training or self.step not in steps:
            return value
        watched.append(self.method.handle is not None and self.method.handle.watching)
        if name is None:
            return value * factor

        def spoil(p: Tensor) -> None:
            hook.remove()
            assert p.grad is not None
            p.grad.view(-1)[5] *= factor

        hook = self.model.get_parameter(name).register_post_accumulate_grad_hook(spoil)
        return value

    monkeypatch.setattr(Trainer, "_loss", loss)
    return watched


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [None, "lm_head.weight", "model.layers.1.mlp.up_proj.B"])
def test_a_step_without_a_finite_gradient_leaves_no_trace(
    name: str | None, factor: float, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 1, factor=factor, name=name)
    config = few(text, tmp_path, optimizer="muon", weight_decay=0.1, refresh_every=2)
    made = Trainer(config, pretrain.opened(config))
    made._step()
    before = [state.clone() for state in made.model.state_dict().values()]
    row = made._step()
    after = list(made.model.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert row["kind"] == "skip" and row["step"] == 2 and made.skipped == 1 and made.method.steps == 1
    assert row["where"] == (name or row["where"]) and json.loads(json.dumps(row)) == row
    assert made._step()["kind"] == "train" and made.method.handle is not None and made.method.handle.draws == 1


@pytest.mark.parametrize("fields", [{}, SPECTRAL, {"method": "relora"}], ids=["haar_stiefel", "spectral", "relora"])
def test_a_run_goes_on_after_skips_and_resumes_exactly(
    fields: dict[str, Any], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The spectral law forms full gradients at the first two: it loses what it would have learned there, and learns at a later one."""
    fields = LONG | fields | {"steps": 10, "measure_every": 0, "basis_every": 1, "refresh_every": 3}
    watched = poison(monkeypatch, 0, 3, 4)
    whole = pretrain.main(few(text, tmp_path / "whole", **fields))
    spectral = fields.get("law") == "spectral"
    assert watched == [spectral, spectral, False] and bool(whole.rows()[-1]["fitting_bytes"]) is spectral
    rows = [row for row in whole.rows() if row["kind"] in ("train", "skip")]
    assert [row["step"] for row in rows if row["kind"] == "skip"] == [1, 4, 5] and len(rows) == 10
    assert whole.rows()[-1]["skipped"] == 3 and min(losses(whole)) < losses(whole)[0] - 1
    config = few(text, tmp_path / "parts", **fields)
    dies(config, 6, monkeypatch)
    assert outcome(pretrain.main(config)) == outcome(whole)


def cli_of(text: Path, tmp_path: Path, more: str) -> list[str]:
    return f"pretrain tiny --data {text} --runs-dir {tmp_path} --sequences 2 --length 16 --quiet {more}".split()


def test_too_many_skips_stop_the_run_and_name_the_parameter(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, *range(2, 20), name="model.layers.2.self_attn.k_proj.B")
    assert cli.main(cli_of(text, tmp_path, "--steps 20 --max-skipped 3")) == 1
    told = capsys.readouterr().err
    assert told.startswith(
        "lowrank: pretrain: 4 steps without a finite loss and gradient, the last at step 6 in model.layers.2.self_attn.k_"
    )
    assert len(told.splitlines()) == 1
    (path,) = tmp_path.glob("pretrain-*")
    assert [row["kind"] for row in runs.read_rows(path) if row["kind"] != "live"] == ["train"] * 2 + ["skip"] * 4


@contextmanager
def room(most: int) -> Iterator[None]:
    """No file grows beyond ``most`` bytes: what is written there fails with EFBIG, after as much as fits."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("where", ["checkpoint", "metrics"])
def test_a_full_disk_stops_with_one_line_and_keeps_the_last_checkpoint(
    where: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the row of step 4, as of its checkpoint, a part is on the disk."""
    whole = pretrain.main(few(text, tmp_path / "whole", **LONG))
    save, log = Trainer._save, runs.Run.log
    more = "--steps 8 --refresh-every 4 --lr 1e-2 --measure-every 3 --eval-every 4 --eval-tokens 256 --checkpoint-every 2"

    def full_at_save(self: Trainer) -> None:
        with room(2**20) if self.step == 4 else nullcontext():
            save(self)

    def full_at_log(self: runs.Run, *rows: dict[str, Any]) -> None:
        file = self.path / "metrics.jsonl"
        with room(file.stat().st_size + 20) if rows[0]["step"] == 4 else nullcontext():
            log(self, *rows)

    with monkeypatch.context() as patch:
        if where == "checkpoint":
            patch.setattr(Trainer, "_save", full_at_save)
        else:
            patch.setattr(runs.Run, "log", full_at_log)
        assert cli.main(cli_of(text, tmp_path, more)) == 1
    (path,) = tmp_path.glob("pretrain-*")
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1 and [p.name for p in (path / "checkpoints").iterdir()] == ["checkpoint-00000002"]
    if where == "checkpoint":
        assert "checkpoint-00000004 was not written, no room" in told and "checkpoint-00000002 is kept" in told
    else:
        reason = f"no room left at {path}: File too large; the same command continues from the last checkpoint"
        assert told == f"lowrank: pretrain: {reason}\n" and (path / "metrics.jsonl").read_text(encoding="utf-8")[-1] != "\n"
    assert cli.main(cli_of(text, tmp_path, more)) == 0
    assert outcome(runs.load(path)) == outcome(whole)
