"""TensorBoard shows the rows of a run, each once, however often the run was interrupted; without the option, or the package, nothing is written."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module, util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import cli, finetune, pretrain, runs
from experiments.finetuning import tuner
from experiments.finetuning.config import Tuning
from experiments.finetuning.contenders import trial
from experiments.training import tensorboard
from tests.experiments.test_pretrain import few
from tests.experiments.test_resume import LONG, dies

Curves = dict[str, list[tuple[int, float]]]


@pytest.fixture
def installed() -> None:
    pytest.importorskip("tensorboard")


def part(name: str) -> Any:
    """A module of TensorBoard."""
    return import_module(f"tensorboard.{name}")


def shown(path: Path) -> Curves:
    """What TensorBoard reads from the event files of a run, tag → points: its server, and its interface for programs, which purge differently."""
    folder, number = str(path / "tensorboard"), part("util.tensor_util").make_ndarray
    served = part("backend.event_processing.plugin_event_accumulator").EventAccumulator(folder, size_guidance={"tensors": 0}).Reload()
    read = part("backend.event_processing.event_accumulator").EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    curves = {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    for tag, points in curves.items():
        assert [(event.step, float(number(event.tensor_proto))) for event in served.Tensors(tag)] == points
    return curves


def written(path: Path) -> int:
    """Scalars in all event files, those included that TensorBoard does not show."""
    load, files = part("backend.event_processing.event_file_loader").LegacyEventFileLoader, (path / "tensorboard").iterdir()
    return sum(len(event.summary.value) for file in files for event in load(str(file)).Load())


def expected(rows: list[dict[str, Any]]) -> Curves:
    """The numbers of ``rows``, in the float32 of event files."""
    curves: Curves = defaultdict(list)
    for row in rows:
        told = [row[name] for name in ("kind", "layer", "part", "collective") if name in row]
        for name in row.keys() - {"kind", "layer", "part", "collective", "step", "where"}:
            if not isinstance(row[name], str) and row[name] is not None:
                curves["/".join([*told, name])].append((row["step"], float(np.float32(row[name]))))
    return curves


def next_second(path: Path) -> None:
    """Event files are read in the order of their names, which begin with a time in seconds; people do not resume within one."""
    newest = max(int(file.name.split(".")[3]) for file in (path / "tensorboard").iterdir())
    while time.time() < newest + 1:
        time.sleep(0.02)


@pytest.mark.usefixtures("installed")
def test_an_uninterrupted_run_is_shown_as_it_was_recorded(text: Path, tmp_path: Path) -> None:
    run = pretrain.main(few(text, tmp_path, tensorboard=True, **LONG))
    curves = shown(run.path)
    assert curves == expected(run.rows())
    assert {"train/grad_norm", "eval/perplexity", "live/all/signal", "live/model.layers.0.mlp.up_proj/noise", "end/seconds"} <= set(curves)
    assert [step for step, _ in curves["train/loss"]] == list(range(1, 9)) and [step for step, _ in curves["eval/loss"]] == [4, 8]
    assert len(list((run.path / "tensorboard").iterdir())) == 1


@pytest.mark.usefixtures("installed")
def test_a_resumed_run_has_every_step_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It dies after step 3 and after step 7, and goes on from 2 and from 6: what came after these is in the files and is not shown."""
    config = few(text, tmp_path, tensorboard=True, **LONG)
    path = dies(config, 3, monkeypatch)
    assert [step for step, _ in shown(path)["train/loss"]] == [1, 2, 3]
    next_second(path)
    dies(config, 7, monkeypatch)
    next_second(path)
    run = pretrain.main(config)
    assert shown(path) == expected(run.rows()) and [step for step, _ in shown(path)["train/lr"]] == list(range(1, 9))
    assert written(path) > sum(map(len, shown(path).values()))


@pytest.mark.usefixtures("installed")
def test_without_a_checkpoint_it_begins_again(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = few(text, tmp_path, tensorboard=True)
    next_second(dies(config, 3, monkeypatch))
    run = pretrain.main(config)
    assert shown(run.path) == expected(run.rows())


@pytest.mark.usefixtures("installed")
def test_a_continuation_that_does_not_purge_would_be_seen(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the tests above."""
    from torch.utils import tensorboard as package

    writer = package.SummaryWriter
    monkeypatch.setattr(package, "SummaryWriter", lambda folder, **_: writer(folder))
    config = few(text, tmp_path, tensorboard=True, **LONG)
    next_second(dies(config, 3, monkeypatch))
    run = pretrain.main(config)
    assert [step for step, _ in shown(run.path)["train/loss"]] == [1, 2, 3, *range(3, 9)]


@pytest.mark.usefixtures("installed")
def test_the_option_may_come_later_and_is_no_part_of_the_run(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier rows are written first; of a run that is done all are."""
    plain, asked = (few(text, tmp_path, tensorboard=asked, **LONG) for asked in (False, True))
    path = dies(plain, 5, monkeypatch)
    assert not (path / "tensorboard").exists() and pretrain.opened(asked).path == path
    run = pretrain.main(asked)
    assert shown(path) == expected(run.rows())
    other = few(text, tmp_path / "other", **LONG)
    done = pretrain.main(other)
    before = done.rows()
    again = pretrain.main(few(text, tmp_path / "other", tensorboard=True, **LONG))
    assert again.path == done.path and done.rows() == before and shown(done.path) == expected(before)


@pytest.mark.usefixtures("installed")
def test_rows_are_in_the_file_when_they_are_logged(tmp_path: Path) -> None:
    """Nothing is lost with the process: a reader sees them while the file is still open."""
    with tensorboard.followed(runs.Run(tmp_path, {}), True) as run:
        run.keep([])
        for step in range(1, 4):
            run.log({"kind": "train", "step": step, "loss": 1 / step, "where": "nowhere"}, {"kind": "skip", "step": step, "loss": "nan"})
            assert shown(tmp_path) == expected([row for row in run.rows() if row["kind"] == "train"])


@pytest.mark.usefixtures("installed")
def test_one_process_of_several_writes(two: Path, tmp_path: Path) -> None:
    """Of two that were interrupted, and of one that does not record."""
    (path,) = (two / "interrupted").iterdir()
    assert shown(path) == expected(runs.read_rows(path)) and "traffic/all_reduce/payload" in shown(path)
    assert len(list((path / "tensorboard").iterdir())) == 1
    other = runs.Run(tmp_path / "other", {}, recording=False)
    with tensorboard.followed(other, True) as run:
        run.keep([])
        run.log({"kind": "train", "step": 1, "loss": 1.0})
    assert run is other and not other.path.exists()


@pytest.mark.usefixtures("installed")
def test_a_fine_tuning_is_shown_once_too(bert: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"k": 8, "tests": 40, "length": 16, "steps": 5, "sequences": 4, "rank": 4, "refresh_every": 2}
    config = Tuning(model=str(bert), task=str(folder), quiet=True, runs_dir=tmp_path, checkpoint_every=2, tensorboard=True, **sizes)
    advance: Callable[..., dict[str, Any]] = tuner.Tuner.advance

    def dying(self: tuner.Tuner) -> dict[str, Any]:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(tuner.Tuner, "advance", dying)
        with pytest.raises(runs.Stopped):
            tuner.tune(config)
    next_second(tuner.opened(config).path)
    run = tuner.tune(config)
    curves = shown(run.path)
    assert curves == expected(run.rows()) and [step for step, _ in curves["train/loss"]] == [1, 2, 3, 4, 5]
    assert {"eval/test/accuracy", "eval/validation/loss"} <= set(curves)


@pytest.mark.usefixtures("installed")
def test_every_training_of_a_comparison_is_asked() -> None:
    config = finetune.Config(tensorboard=True)
    assert all(trial(config, label, 1.0).tensorboard for label in config.method)
    assert not any(trial(replace(config, tensorboard=False), label, 1.0).tensorboard for label in config.method)


@pytest.mark.parametrize("command", ["pretrain tiny", "finetune", "finetune smoke --method mezo"])
def test_without_the_package_it_is_refused_before_anything_is_written(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = util.find_spec
    monkeypatch.setattr("experiments.training.options.find_spec", lambda name: None if name == "tensorboard" else find(name))
    assert cli.main([*command.split(), "--tensorboard", "--runs-dir", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    question = command.split()[0]
    assert told == (
        f"lowrank: {question}: tensorboard is not installed: pip install 'lowrank-gradients[tensorboard]', or leave --tensorboard out\n"
    )
    assert not list(tmp_path.iterdir())
    assert not pretrain.Config().tensorboard and not finetune.Config().tensorboard
