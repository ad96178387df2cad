"""``lowrank memory``: the measuring tool against sizes known by hand, predicted against measured steps, what the command says and refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import cli, memory, publish, runs
from experiments.memory import Config
from experiments.pages import summary
from experiments.training import footprint, models
from tests.experiments.launch import MEASURED

CPU = torch.device("cpu")
HERE: dict[str, Any] = {"sequences": 8, "length": 128, "accumulate": 1, "device": "cpu", "quiet": True}


# the tool


def test_a_watch_counts_what_is_held_and_the_most_that_was() -> None:
    with footprint.watching(CPU) as watch:
        a = torch.zeros(1000)
        with watch.part("first"):
            b = torch.zeros(500, dtype=torch.bfloat16)
            c = torch.zeros(2000)
            del b, c
            d = torch.zeros(100)
        with watch.part("second"):
            del a
            e = torch.zeros(500)
        del d, e
    assert watch.parts == {"first": footprint.Stretch(4000, 4000 + 1000 + 8000), "second": footprint.Stretch(4400, 4400)}


def test_a_watch_sees_temporaries_and_views_as_the_allocator_does() -> None:
    """exp(exp(x)) holds both results at once, a view holds nothing, x is freed inside."""
    with footprint.watching(CPU) as watch:
        x = torch.zeros(10, 100)
        with watch.part("work"):
            y = x.exp().exp()
            z = y.mT
            del x
    assert watch.parts["work"] == footprint.Stretch(4000, 12000)
    assert z.shape == (100, 10)


def test_what_an_earlier_watch_left_is_not_counted_and_names_are_single() -> None:
    with footprint.watching(CPU):
        old: list[Any] = [torch.zeros(10_000)]
        old.append(old)  # only the garbage collector can free it
    del old
    with footprint.watching(CPU) as watch:
        with watch.part("work"):
            torch.zeros(10)
        with pytest.raises(ValueError, match="a part of this name"), watch.part("work"):
            pass
    assert watch.parts["work"] == footprint.Stretch(0, 40)


# predicted and measured


def measured(text: Path, tmp_path: Path, **fields: Any) -> list[dict[str, Any]]:
    config = Config(**{**HERE, "data": str(text), "runs_dir": tmp_path, "measure": True, **fields})
    return [row for row in memory.main(config).rows() if row["kind"] == "measured"]


CASES: dict[str, dict[str, Any]] = {
    "full AdamW": {"method": "adamw"},
    "full AdamW, bf16 weights, micro-batches": {"method": "adamw", "precision": "bf16_weights", "accumulate": 4},
    "full AdamW, recomputed, bf16": {"method": "adamw", "precision": "bf16", "checkpoint_activations": True},
    "full AdamW, many tokens, recomputed": {"method": "adamw", "length": 256, "checkpoint_activations": True},
    "full AdamW, hardly any tokens": {"method": "adamw", "sequences": 1, "length": 8},
    "Haar": {},
    "Haar, bf16": {"precision": "bf16"},
    "Haar, bf16 weights, r = 16": {"precision": "bf16_weights", "rank": 16},
    "Haar, V not kept": {"store": False},
    "Haar, half rank": {"rank": 0.5},
    "spectral": {"law": "spectral"},
    "spectral, bf16": {"law": "spectral", "precision": "bf16", "rank": 16},
    "spectral, recomputed": {"law": "spectral", "checkpoint_activations": True, "rank": 16},
    "top SVD, micro-batches": {"law": "top_svd", "accumulate": 2, "rank": 16},
    "LoRA": {"method": "lora"},
    "LoRA, recomputed, bf16": {"method": "lora", "precision": "bf16", "checkpoint_activations": True},
    "SGD": {"optimizer": "sgd"},
    "Muon": {"method": "adamw", "optimizer": "muon"},
    "8-bit AdamW": {"method": "adamw", "optimizer": "adamw8bit"},
    "9m": {"model": "9m"},
    "9m, full AdamW, bf16": {"model": "9m", "method": "adamw", "precision": "bf16", "sequences": 2, "length": 16},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=list(CASES))
def test_predicted_and_measured_peak_agree(fields: dict[str, Any], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the 10 % that are promised; a fitted law's redraw step as well."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # 8-bit AdamW without a compiler
    rows = measured(text, tmp_path, **fields)
    assert [row["step"] for row in rows] == (["plain", "redraw"] if fields.get("law") else ["plain"])
    for row in rows:
        assert abs(row["predicted"] / row["measured"] - 1) <= 0.1 and row["holds"], row


@pytest.mark.parametrize("fields", [{"method": "adamw"}, {}, {"precision": "bf16"}])
def test_grouped_queries_are_predicted(fields: dict[str, Any], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.PRESETS, "tiny", models.PRESETS["tiny"] | {"num_key_value_heads": 1})
    assert all(row["holds"] for row in measured(text, tmp_path, **fields))


# the command


def test_a_prediction_stands_beside_full_adamw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = ["--model", "7b", "--rank", "1024", "--world-size", "8", "--shard", "fsdp", "--runs-dir", str(tmp_path)]
    assert cli.main(["memory", *fields]) == 0
    shown = capsys.readouterr().out
    for word in ("weights", "activations", "total", "all_gather", "reduce_scatter", "haar_stiefel", "adamw", "GiB"):
        assert word in shown
    (path,) = tmp_path.iterdir()
    run = runs.load(path)
    mine, full = (row for row in run.rows() if row["kind"] == "memory")
    assert mine["total"] < full["total"] and mine["states"] < full["states"]
    assert sum(mine[name] for name in mine if isinstance(mine[name], int) and name != "total") == mine["total"]
    written = publish.main(publish.Config(run=(path,), out=tmp_path / "results"))
    assert {p.name for p in written} == {*(f"7b-haar_stiefel-fsdp8{end}" for end in ("-memory.csv", "-communication.csv", ".json"))}


def test_batches_are_those_of_training_shared_out(tmp_path: Path) -> None:
    one = memory.step(Config(model="60m", runs_dir=tmp_path))
    assert (one.sequences, one.length, one.accumulate) == (512, 256, 8)
    four = memory.step(Config(model="60m", world_size=4))
    assert (four.sequences, four.accumulate) == (512, 2)
    assert memory.setting(four, 4, "ddp", "cpu").sequences == 64
    assert memory.step(Config(model="60m", sequences=8)).accumulate == 1
    assert memory.setting(memory.step(Config(sequences=8, accumulate=2, world_size=2)), 2, "fsdp", "cuda").sequences == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "3b"], "unknown model '3b'"),
        (["--method", "relora"], "unknown method 'relora'"),
        (["--law", "nothing"], "unknown law 'nothing'"),
        (["--world-size", "0"], "world_size must be at least 1"),
        (["--world-size", "3"], "must be a multiple of accumulate=1 times world_size=3"),
        (["--measure", "--world-size", "2"], "measure runs on the 1 devices that were started"),
        (["--every"], "add --measure"),
        (["--rank", "0"], "rank must be a positive integer"),
        (["--world-size", "2", "--shard", "fsdp", "--optimizer", "adamw8bit"], "states of adamw8bit cannot be sharded"),
        (["--rank", "128"], "no layer of a block has min(m, n) above the rank"),
        (["--sequences", "0"], "sequences must be at least 1"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--precision", "fp8"], "precision"),
    ],
)
def test_wrong_input_ends_with_one_line(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", *arguments, "--runs-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lowrank: memory: ") and message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_everything_that_is_measured_can_be_trained() -> None:
    chosen = list(memory.every(memory.step(Config()), 1))
    assert len(chosen) == 26 and len({str(one) for one in chosen}) == 26
    assert {one.optimizer for one in chosen} == {"adamw", "sgd", "muon", "adamw8bit"}
    assert len(list(memory.every(memory.step(Config(shard="fsdp")), 2))) == 24  # 8-bit states cannot be sharded


def test_a_gpu_is_predicted_without_one(tmp_path: Path) -> None:
    """On a GPU all parameters of a group are updated at once: more passes in the optimizer step, which is the peak of a small batch."""
    fields: dict[str, Any] = {"method": "adamw", "model": "60m", "sequences": 1, "length": 8, "accumulate": 1, "runs_dir": tmp_path}
    there, here = (memory.main(Config(device=device, **fields)) for device in ("cuda", "cpu"))
    rows = [next(row for row in run.rows() if row["kind"] == "memory") for run in (there, here)]
    assert rows[0]["moment"] == "optimizer step" and rows[0]["total"] > rows[1]["total"]


def measured_again(name: str, folder: Path) -> dict[str, Any]:
    """The same by two processes of their own."""
    flags = [word for field, value in MEASURED[name].items() for word in (f"--{field.replace('_', '-')}", str(value))]
    flags += [
        "--sequences",
        "8",
        "--length",
        "32",
        "--world-size",
        "2",
        "--measure",
        "--device",
        "cpu",
        "--quiet",
        "--runs-dir",
        str(folder),
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "experiments.memory", "9m"]
    root = Path(__file__).parents[2]
    subprocess.run([*launch, *flags], cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=300, check=False)
    return measured_row(folder)


def measured_row(folder: Path) -> dict[str, Any]:
    (path,) = folder.iterdir()
    (row,) = (row for row in runs.load(path).rows() if row["kind"] == "measured")
    return row


@pytest.mark.parametrize("name", MEASURED)
def test_two_devices_hold_what_is_predicted(name: str, two: Path, tmp_path: Path) -> None:
    """Of sharded micro-batches what gloo's own threads release is not seen; that case is derived, not measured. What they release in the others is
    not seen by chance, rarely: a peak may be too large, never too small, and is measured again then."""
    row = measured_row(two / f"memory {name}")
    for attempt in range(2):
        if not row["holds"] and row["measured"] > row["predicted"]:
            row = measured_again(name, tmp_path / str(attempt))
    assert row["holds"] and row["world_size"] == 2 and row["shard"] == MEASURED[name]["shard"], row


def test_sizes_are_shown_in_binary_units() -> None:
    assert [summary.binary(size) for size in (2**19, 2**30, 3 * 2**40)] == ["0.5 MiB", "1.00 GiB", "3,072.00 GiB"]
