"""``lowrank memory measure``: fake peaks against the allocator's for every method, exact counts, and what the command says and refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from experiments import cli, footprints, publish, runs
from experiments.footprints import CONTENDERS, PLAIN, Config
from experiments.pages import footprints as page
from experiments.training.classifiers import classification
from experiments.training.faked import CATEGORIES, Ledger
from experiments.training.methods import METHODS
from experiments.training.stepper import FusedStepper, Stepper
from optimizers import ZEROTH_ORDER

CPU = torch.device("cpu")
SMALL: dict[str, dict[str, Any]] = {  # in the first the update is the peak of most methods, in the second the end of the forward pass
    "roberta-tiny": {"sequences": 2, "length": 16},
    "tiny": {"sequences": 8, "length": 32},
}


def small(model: str, **fields: Any) -> Config:
    return Config(model=model, **SMALL[model], quiet=True, **fields)


def test_every_method_of_the_registries_is_there() -> None:
    settings = CONTENDERS.values()
    assert {fields["method"] for fields in settings if "method" in fields} == set(METHODS)
    assert {fields["kind"] for fields in settings if "kind" in fields} == set(ZEROTH_ORDER.values())


FORWARD_PEAK = ("adamw", "haar_stiefel", "galore", "muon", "mezo")  # of all methods: memory/measure-tiny-8x32-real


@pytest.mark.parametrize(
    ("name", "model"), [*((name, "roberta-tiny") for name in CONTENDERS), *((name, "tiny") for name in FORWARD_PEAK)], ids=" ".join
)
def test_fake_tensors_weigh_what_the_allocator_hands_out(name: str, model: str) -> None:
    row, *seen = footprints.measured(small(model, real=True), name, CPU)
    assert row["total"] == sum(row[category] for category in CATEGORIES)
    assert [one["step"] for one in seen] == ["plain", "change"][: 1 if row["change"] is None else 2]
    for one in seen:
        assert one["holds"] and abs(one["ratio"] - 1) <= 0.1, one


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["adamw", "haar_stiefel fused", "galore", "lowrank_lr"])
def test_fake_tensors_weigh_what_a_gpu_hands_out(name: str) -> None:
    config = Config(model="9m", sequences=16, length=128, real=True, device="cuda", quiet=True)
    for one in footprints.measured(config, name, runs.device("cuda"))[1:]:
        assert one["holds"], one


# what must be there exactly


def faults(config: Config, name: str, ledger: Ledger) -> list[str]:
    """Where a plain step of AdamW, or of a method without gradients, does not hold what it must."""
    made = footprints.side(config, name, CPU)
    parameters = list(made.task.model.parameters())
    weights = 4 * sum(p.numel() for p in parameters)
    buffers = sum(b.numel() * b.element_size() for b in made.task.model.buffers())
    wanted = {"weights": weights + buffers, "projector": 0, "gradients": 0, "states": 0}
    if name == "adamw":  # and a counter of its steps for each parameter
        wanted |= {"gradients": weights, "states": 2 * weights + 4 * len(parameters)}
    held = ledger.peak(PLAIN)
    return [f"{category}: {held[category]} in the place of {size}" for category, size in wanted.items() if held[category] != size]


@pytest.mark.parametrize("name", ["adamw", *ZEROTH_ORDER])
def test_what_must_be_there_is_there_to_the_byte(name: str) -> None:
    """Weights at 4 bytes a number; AdamW: as many gradients and twice as many moments; nothing of either without gradients."""
    config = small("roberta-tiny")
    ledger = footprints.faked_steps(config, name, CPU)
    assert not faults(config, name, ledger)
    if name in ZEROTH_ORDER:
        assert ledger.peak(PLAIN)["activations"] == 0


class Twice(Ledger):
    """Enters what an operation gives back again, whether it is new or not."""

    def _recorded(self, result: Any) -> Any:
        self._live.clear()
        return super()._recorded(result)


class Deaf(Ledger):
    """Does not hear that storages are released."""

    def _number(self, tensor: Tensor) -> int:
        self.__dict__.setdefault("kept", []).append(tensor.untyped_storage())
        return super()._number(tensor)


@pytest.mark.parametrize("mutant", [Twice, Deaf])
def test_a_ledger_that_counts_wrongly_is_seen(mutant: type[Ledger], monkeypatch: pytest.MonkeyPatch) -> None:
    config = small("roberta-tiny", real=True)
    monkeypatch.setattr(footprints, "Ledger", mutant)
    _, plain = footprints.measured(config, "adamw", CPU)
    assert not plain["holds"]


def test_a_category_that_is_dropped_or_named_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    config, right = small("roberta-tiny"), footprints.owned

    def without(made: Any) -> Iterable[tuple[str, Tensor]]:
        return ((category, t) for category, t in right(made) if category != "states")

    def confused(made: Any) -> Iterable[tuple[str, Tensor]]:
        return (("weights" if category == "gradients" else category, t) for category, t in right(made))

    for wrong in (without, confused):
        monkeypatch.setattr(footprints, "owned", wrong)
        assert faults(config, "adamw", footprints.faked_steps(config, "adamw", CPU))


def test_v_and_residuals_are_told_from_moments() -> None:
    """LowRank-IPA's V, n×r a layer; of GaLore V likewise; LDAdam's also its error, as large as the weights."""
    config = small("roberta-tiny")
    made = footprints.side(config, "haar_stiefel", CPU)
    assert isinstance(made, Stepper) and made.method.handle is not None
    layers = made.method.handle.layers.values()
    peak = footprints.faked_steps(config, "haar_stiefel", CPU).peak(PLAIN)
    assert peak["projector"] == 4 * sum(layer.in_features * layer.rank for layer in layers)
    galore, ldadam = (footprints.faked_steps(config, name, CPU).peak(PLAIN)["projector"] for name in ("galore", "ldadam"))
    matrices = footprints.side(config, "galore", CPU)
    assert isinstance(matrices, Stepper)
    assert ldadam - galore == 4 * sum(p.numel() for p in matrices.method.matrices())


def test_a_fused_step_is_the_same_step_with_one_gradient_at_a_time() -> None:
    """One step of two, from equal weights: the same new weights to the last bit, and the largest gradient the most that is held."""
    config = small("roberta-tiny")
    made = footprints.settings(config, method="adamw")
    task = classification("roberta-tiny", 2, 16, 0, "fp32", CPU)
    twin = copy.deepcopy(task.model)
    fused = FusedStepper(made, CPU, task)
    fused.step()
    twin.train()
    optimizer = Stepper(made, CPU, type(task)(twin, task.loss)).optimizers[0]
    other = classification("roberta-tiny", 2, 16, 0, "fp32", CPU)
    other.loss().backward()
    for mine, theirs in zip(twin.parameters(), other.model.parameters(), strict=True):
        mine.grad = theirs.grad
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(task.model.parameters(), twin.parameters(), strict=True))
    assert all(p.grad is None for p in task.model.parameters())
    peak = footprints.faked_steps(config, "adamw fused", CPU).peak(PLAIN)
    assert 0 < peak["gradients"] <= 4 * max(p.numel() for p in task.model.parameters())


# the command


def test_the_command_measures_shows_and_publishes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "memory measure roberta-tiny --method adamw mezo --sequences 2 --length 16 --real --quiet --runs-dir"
    assert cli.main([*flags.split(), str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for word in ("adamw", "mezo", "gradients", "projector, residual", "peak MiB", "/ AdamW", "fake tensors and allocator", "2/2"):
        assert word in shown
    (path,) = tmp_path.iterdir()
    written = publish.main(publish.Config(run=(path,), out=tmp_path / "results"))
    assert {p.name for p in written} == {f"measure-roberta-tiny-2x16-real{end}" for end in ("-footprint.csv", "-agreement.csv", ".json")}
    assert cli.main([*flags.split(), str(tmp_path)]) == 0  # finds the finished run


def test_targets_say_what_a_peak_is_made_of() -> None:
    held = dict.fromkeys(CATEGORIES, 0)
    rows = [
        {"model": "roberta-large", "name": "adamw", **held, "total": 1000},
        {"model": "roberta-large", "name": "lowrank_lr", **held, "weights": 100, "temporaries": 50, "total": 150},
        {"model": "roberta-large", "name": "haar_stiefel fused", **held, "activations": 500, "weights": 100, "total": 600},
    ]
    first, second = footprints.targets(rows)
    assert first["holds"] and first["ratio"] == 0.15
    assert not second["holds"] and second["of"] == "activations 0.50×, weights 0.10×"
    assert page.verdict(second) == "haar_stiefel fused: 0.60× of full AdamW, at most 0.45×: missed; activations 0.50×, weights 0.10×"
    assert footprints.targets([row | {"model": "60m"} for row in rows]) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "3b"], "unknown model '3b'"),
        (["--method", "nothing"], "unknown method 'nothing'"),
        (["--sequences", "0"], "sequences must be at least 1"),
        (["--operations", "0"], "operations must be at least 1"),
        (["--length", "600"], "length must be between 2 and the model's 512"),
        (["--rank", "0"], "rank must be a positive integer"),
        (["--precision", "fp8"], "precision"),
        (["3b"], "unknown preset '3b'"),
    ],
)
def test_wrong_input_ends_with_one_line(arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "measure", *arguments, "--runs-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lowrank: memory measure: ") and message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_a_method_refuses_is_a_row_and_no_gap(tmp_path: Path) -> None:
    chosen = ("galore", "haar_stiefel", "adamw")
    run = footprints.main(Config(model="roberta-tiny", method=chosen, rank=100, sequences=2, length=16, quiet=True, runs_dir=tmp_path))
    kinds = [(row["kind"], row["name"]) for row in run.rows()]
    assert kinds == [("not_run", "galore"), ("not_run", "haar_stiefel"), ("footprint", "adamw")]
    assert [row["name"] for row in run.rows() if "rank" in row.get("why", "")] == ["galore", "haar_stiefel"]


def test_work_that_would_take_too_long_is_a_row_too(tmp_path: Path) -> None:
    config = small("roberta-tiny", method=("mezo",), operations=100, runs_dir=tmp_path)
    (row,) = footprints.main(config).rows()
    assert row == {"kind": "not_run", "model": "roberta-tiny", "name": "mezo", "why": "more than 100 operations"}


def test_tables_are_of_committed_rows(tmp_path: Path) -> None:
    assert page.markdown(tmp_path) == page.llamas(tmp_path) == "not yet run"
    folder = tmp_path / "memory"
    folder.mkdir()
    said = {"sequences": 2, "length": 16, "precision": "fp32"} | dict.fromkeys(CATEGORIES, 2**20)
    for model in ("roberta-large", "60m"):
        rows = [
            {"model": model, "name": name, **said, "total": total, "change": None} for name, total in (("adamw", 2**30), ("mezo", 2**29))
        ]
        pd.DataFrame(rows).to_csv(folder / f"measure-{model}-footprint.csv", index=False)
        pd.DataFrame([{"model": model, "name": "galore", "why": "a reason"}]).to_csv(folder / f"measure-{model}-not_run.csv", index=False)
        runs.write_json(folder / f"measure-{model}.json", {"config": {"rank": 0.125}})
    text = page.markdown(tmp_path)
    assert "roberta-large, batch 2 × 16 tokens, fp32, r/n = 0.125" in text and "`galore` on roberta-large was not run: a reason" in text
    assert "| `mezo` | 1 | 1 | 1 | 1 | 1 | 1 | 512 | 0.50× |  |" in text
    assert "LLaMA-7B: not yet run." in page.llamas(tmp_path) and "LLaMA-60M: not" not in page.llamas(tmp_path)
    assert "| `mezo` | 0.50 (0.50×) |" in page.llamas(tmp_path) and "`galore` on 60m was not run: a reason" in page.llamas(tmp_path)
